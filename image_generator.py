"""Draw images of chosen classes, with and without AMM from the same noise, as a grid.

python image_generator.py --model EDT-XL/2 --ckpt EDT-XL.pt --classes 207 360 --cfg-scale 4
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image

from edt.cli import add_sampling_arguments, apply_amm, exit_on_user_error, find_place, load_for_sampling
from edt.errors import UserError
from edt.files import whole_file
from edt.grids import grid
from edt.sampling import Recipe, check_classes, generate

# The release's: two sharks, sea anemone, two dogs, cat, goldfinch, magpie, titmouse.
IMAGENET_CLASSES = (2, 3, 108, 230, 232, 281, 11, 18, 19)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sampling_arguments(p, cfg_scale=4.0)
    p.add_argument("--classes", "--class-labels", type=int, nargs="+", help="default: nine of ImageNet, or the first nine")
    p.add_argument("--num-variations", type=int, default=5, help="images of a class")
    p.add_argument("--per-proc-batch-size", type=int, default=50)
    p.add_argument("--seed", "--global-seed", type=int, default=1)
    p.add_argument("--output-dir", "--results-dir", default="visual")
    return p


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    device = find_place().device
    recipe = Recipe(args.seed, args.num_sampling_steps, args.solver, args.cfg_scale, args.precision)
    model, vae, notes = load_for_sampling(args, device)
    classes = (
        args.classes
        or [label for label in IMAGENET_CLASSES if model.num_classes == 1000]
        or range(min(9, model.num_classes or 1))
    )
    check_classes(classes, model.num_classes)
    if args.num_variations < 1:
        raise UserError("--num-variations must be 1 or more")
    names = notes["features"].get("classes") or [str(label) for label in range(max(model.num_classes, 1))]
    labels = torch.tensor([label for label in classes for _ in range(args.num_variations)])

    folder = Path(args.output_dir) / f"seed{args.seed}-cfg{args.cfg_scale}"
    folder.mkdir(parents=True, exist_ok=True)
    # Both, from the same noise, unless one is asked for.
    for on in [True, False] if args.amm is None else [args.amm]:
        blocks = apply_amm(model, args, on)
        done = list(generate(model, vae, recipe, torch.arange(len(labels)), args.per_proc_batch_size, labels=labels,
                             progress=True))  # fmt: skip
        images = torch.cat([batch.images for batch in done]).unflatten(0, (len(classes), args.num_variations))
        path = folder / f"grid-{'amm-' + '-'.join(map(str, blocks)) if blocks else 'noamm'}.png"
        with whole_file(path) as temporary:
            Image.fromarray(grid(images).numpy()).save(temporary, format="png")
        print(f"{path}: rows {', '.join(names[label] for label in classes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Draw images of chosen classes, with and without AMM and their difference, from the same noise, as
a grid.

python image_generator.py --model EDT-XL/2 --ckpt EDT-XL.pt --classes "golden retriever" 360
--cfg-scale 4"""

import argparse
import sys
from pathlib import Path

import torch

from edt.cli.build import (
    COUNT,
    add_sampling_arguments,
    apply_amm,
    exit_on_user_error,
    find_place,
    load_for_sampling,
    make_recipe,
    true_or_false,
)
from edt.data.class_names import class_names, find_class
from edt.sampling.generate import generate
from edt.sampling.image_grid import captioned_grid, difference
from edt.utils.files import atomic_write, make_folder

# The release's: two sharks, sea anemone, two dogs, cat, goldfinch, magpie, titmouse.
IMAGENET_CLASSES = (2, 3, 108, 230, 232, 281, 11, 18, 19)


def both_or_one(text: str) -> str | bool:
    """Argument type of --amm."""
    return "both" if text.lower() == "both" else true_or_false(text)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sampling_arguments(p, cfg_scale=4.0, amm=both_or_one, amm_values="both|True|False")
    p.set_defaults(amm="both")
    p.add_argument(
        "--classes",
        "--class-labels",
        nargs="+",
        metavar="CLASS",
        help="numbers, or names of ImageNet or of your folders; default: nine of ImageNet, or the first nine",
    )
    p.add_argument("--num-variations", type=COUNT, default=5, help="images of a class")
    p.add_argument("--per-proc-batch-size", type=COUNT, default=50)
    p.add_argument("--seed", "--global-seed", type=int, default=1)
    p.add_argument("--output-dir", "--results-dir", default="visual")
    return p


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    recipe = make_recipe(args, args.seed)
    model, vae, notes = load_for_sampling(args, find_place().device)
    names = class_names(model.num_classes, notes["features"].get("classes"))
    if args.classes:
        classes = [find_class(text, names) for text in args.classes]
    else:
        classes = IMAGENET_CLASSES if model.num_classes == 1000 else range(min(9, len(names)))
    blocks = apply_amm(model, args, on=bool(args.amm))
    folder = make_folder(Path(args.output_dir) / f"seed{args.seed}-cfg{args.cfg_scale}")
    labels = torch.tensor([label for label in classes for _ in range(args.num_variations)])

    def draw() -> torch.Tensor:
        """Images (classes, variations, H, W, 3)."""
        batches = generate(
            model,
            vae,
            recipe,
            torch.arange(len(labels)),
            args.per_proc_batch_size,
            labels=labels,
            progress=True,
        )
        return torch.cat([batch.images for batch in batches]).unflatten(
            0, (len(classes), args.num_variations)
        )

    images = draw()
    name, captions = "amm-" + "-".join(map(str, blocks)) if blocks else "noamm", ()
    if args.amm == "both":
        apply_amm(model, args, on=False)
        without = draw()
        images = torch.stack([images, without, difference(images, without)], dim=2).flatten(1, 2)
        captions = [
            f"AMM {', '.join(map(str, blocks))}",
            "without",
            "difference",
        ] * args.num_variations
        name += "-and-without"
    path = folder / f"grid-{name}.png"
    shown = [" ".join(dict.fromkeys([str(label), names[label][0]])) for label in classes]
    with atomic_write(path) as temporary:
        captioned_grid(images, shown, captions).save(temporary, format="png")
    print(f"rows: {'; '.join(shown)}\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

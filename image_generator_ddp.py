"""Sample many images, on any number of processes, into an .npz that ADM's evaluator reads.

    torchrun --nproc_per_node 8 image_generator_ddp.py --model EDT-S/2 --ckpt EDT-S.pt --amm --num-images 50000

Image i is the same on any number of processes and at any batch size. Run the same command again after a crash: only
what is missing is drawn.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from edt.checkpoint import fingerprint_weights
from edt.cli import add_sampling_arguments, apply_amm, exit_on_user_error, find_place, load_for_sampling
from edt.errors import UserError
from edt.npz import SampleArchive
from edt.recipe import open_sample_folder
from edt.sampling import Recipe, generate


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sampling_arguments(p, cfg_scale=1.0)
    p.add_argument("--num-images", type=int, default=50_000)
    p.add_argument("--per-proc-batch-size", type=int, default=50)
    p.add_argument("--global-seed", type=int, default=42)
    p.add_argument("--labels", default="uniform", help="uniform (at random), balanced, or classes like 207,360")
    p.add_argument("--output-dir", "--results-dir", default="samples", help="a folder named by the recipe is made in it")
    p.add_argument("--png", action="store_true", help="write a folder of PNGs besides")
    return p


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    rank, world_size, device = find_place()
    recipe = Recipe(args.global_seed, args.num_sampling_steps, args.solver, args.cfg_scale, args.precision, args.labels)
    if args.num_images < 1 or args.per_proc_batch_size < 1:
        raise UserError("--num-images and --per-proc-batch-size must be 1 or more")
    model, vae, notes = load_for_sampling(args, device)
    blocks = apply_amm(model, args, on=args.amm or (args.amm is None and args.amm_blocks is not None))
    recipe.labels_of(torch.arange(1), model.num_classes)
    size = notes["features"]["image_size"]
    name = f"{(args.model or notes.get('name', 'EDT')).replace('/', '-')}-{Path(args.ckpt).stem}-size-{size}-" \
           f"vae-{Path(notes['features']['vae']).name}-cfg-{args.cfg_scale}-seed-{args.global_seed}-" \
           f"{recipe.solver}-{recipe.num_sampling_steps}-" \
           f"{'amm-' + '-'.join(map(str, blocks)) if blocks else 'noamm'}"  # fmt: skip
    folder = Path(args.output_dir) / name
    open_sample_folder(folder, {
        **dataclasses.asdict(recipe), "weights": args.weights, "weights_sha256": fingerprint_weights(args.ckpt, args.weights),
        "model": dataclasses.asdict(model.config), "vae": notes["features"]["vae"], "image_size": size,
        "amm": {"blocks": blocks, "form": args.amm_form, "radius": args.amm_radius},
    })  # fmt: skip

    archive = SampleArchive(folder, (args.num_images, size, size, 3))
    archive.open()
    mine = archive.missing()
    mine = torch.from_numpy(mine[mine % world_size == rank])
    with tqdm(total=len(mine), unit="image", disable=rank > 0) as bar:
        for batch in generate(model, vae, recipe, mine, args.per_proc_batch_size):
            archive.write(batch.indices.numpy(), batch.images.numpy())
            if args.png:
                for index, image in zip(batch.indices.tolist(), batch.images.numpy(), strict=True):
                    Image.fromarray(image).save(folder / f"{index:06d}.png")
            bar.update(len(batch.indices))
    if archive.finish():
        labels = recipe.labels_of(torch.arange(args.num_images), model.num_classes)
        np.save(folder / "labels.npy", labels.numpy())
        print(archive.path, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Sample many images, on any number of processes, into an .npz that ADM's evaluator reads.

    torchrun --nproc_per_node 8 image_generator_ddp.py --model EDT-S/2 --ckpt EDT-S.pt --amm
    --num-images 50000

Image i is the same on any number of processes and at any batch size. Run the same command again
after a crash: only what is missing is drawn."""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from edt.checkpoints.folder import fingerprint_weights
from edt.cli.build import (
    COUNT,
    add_sampling_arguments,
    apply_amm,
    exit_on_user_error,
    find_place,
    load_for_sampling,
    make_recipe,
)
from edt.models import EDT
from edt.sampling.generate import Recipe, generate
from edt.sampling.npz_writer import SampleArchive
from edt.sampling.sidecar import open_sample_folder
from edt.utils.files import atomic_write


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sampling_arguments(p, cfg_scale=1.0)
    p.add_argument("--num-images", type=COUNT, default=50_000)
    p.add_argument("--per-proc-batch-size", type=COUNT, default=50)
    p.add_argument("--global-seed", type=int, default=42)
    p.add_argument(
        "--labels", default="uniform", help="uniform (at random), balanced, or classes like 207,360"
    )
    p.add_argument(
        "--output-dir",
        "--results-dir",
        default="samples",
        help="a folder named by the recipe is made in it",
    )
    p.add_argument("--png", action="store_true", help="write a folder of PNGs besides")
    return p


def open_folder(
    args: argparse.Namespace, recipe: Recipe, model: EDT, vae_sha256: str | None, notes: dict
) -> Path:
    """The folder of these samples, named by the recipe; the whole recipe is in its recipe.json."""
    features, blocks = notes["features"], [modulation.block for modulation in model.modulations]
    guidance = [
        f"cfg-{recipe.cfg_scale}",
        *(["all"] if recipe.cfg_channels == "all" else []),
        *(["t-{}-{}".format(*recipe.cfg_interval)] if recipe.cfg_interval else []),
    ]
    name = "-".join(
        [
            (args.model or notes.get("name", "EDT")).replace("/", "-"),
            Path(args.ckpt).stem,
            f"size-{features['image_size']}",
            f"vae-{Path(features['vae']).name}",
            *guidance,
            f"seed-{recipe.seed}",
            recipe.solver,
            recipe.num_sampling_steps,
            "amm-" + "-".join(map(str, blocks)) if blocks else "noamm",
        ]
    )
    folder = Path(args.output_dir) / name
    open_sample_folder(
        folder,
        {
            **dataclasses.asdict(recipe),
            "weights": args.weights,
            "weights_sha256": fingerprint_weights(args.ckpt, args.weights),
            "model": dataclasses.asdict(model.config),
            "vae": features["vae"],
            "vae_sha256": vae_sha256,
            "image_size": features["image_size"],
            "amm": {
                "blocks": blocks,
                "form": model.modulations[0].form if blocks else None,
                "radii": [modulation.radius for modulation in model.modulations],
            },
        },
    )
    return folder


def write_pngs(folder: Path, archive: SampleArchive, indices: range) -> None:
    """PNGs of the images that have none yet, from the archive: asked for late or cut short, they
    need no drawing.
    """
    absent = [index for index in indices if not (folder / f"{index:06d}.png").exists()]
    for index, image in zip(absent, archive.read(absent), strict=True):
        with atomic_write(folder / f"{index:06d}.png", durable=False) as temporary:
            Image.fromarray(image).save(temporary, format="png")


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    rank, world_size, device = find_place()
    recipe = make_recipe(args, args.global_seed, args.labels)
    model, vae, notes = load_for_sampling(args, device)
    explicit = any(value is not None for value in (args.amm_blocks, args.amm_form, args.amm_radius))
    apply_amm(model, args, on=explicit if args.amm is None else args.amm)
    recipe.labels_of(torch.arange(1), model.num_classes)
    size = notes["features"]["image_size"]
    folder = open_folder(args, recipe, model, vae.sha256, notes)

    archive = SampleArchive(folder, (args.num_images, size, size, 3))
    archive.open()
    missing = archive.missing()
    mine = torch.from_numpy(missing[missing % world_size == rank])
    done = args.num_images - len(missing)
    with tqdm(initial=done, total=args.num_images, unit="images", disable=rank > 0) as bar:
        for batch in generate(model, vae, recipe, mine, args.per_proc_batch_size):
            archive.write(batch.indices.numpy(), batch.images.numpy())
            bar.update(
                args.num_images - len(archive.missing()) - bar.n
            )  # those of the other processes too
    if args.png:
        write_pngs(folder, archive, range(rank, args.num_images, world_size))
    if archive.finish():
        with atomic_write(folder / "labels.npy") as temporary, open(temporary, "wb") as file:
            np.save(
                file, recipe.labels_of(torch.arange(args.num_images), model.num_classes).numpy()
            )
        print(archive.path, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Sample many images, on any number of processes, into an .npz that ADM's evaluator reads.

    torchrun --nproc_per_node 8 image_generator_ddp.py --model EDT-S/2 --ckpt EDT-S.pt --amm \\
        --num-images 50000

Up to float rounding, image i does not depend on the number of processes or on the batch size. Run
the same command again after a crash: it draws only the images that are missing. AMM is off unless
you ask for it.
"""

import argparse
import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from edt.amm import Modulation
from edt.cli.arguments import (
    COUNT,
    HelpFormatter,
    add_sampling_arguments,
    describe,
    from_arguments,
    nonempty_path,
    true_or_false,
)
from edt.cli.build import LoadedModel, load_for_sampling, set_amm_from_arguments, settings_of
from edt.cli.main import exit_on_user_error
from edt.data.class_names import class_names, find_classes
from edt.sampling.config import LABEL_POLICIES, SamplingConfig
from edt.sampling.generate import generate, image_bar
from edt.sampling.npz_writer import SampleArchive
from edt.sampling.sidecar import open_sample_folder
from edt.utils.distributed import get_distributed_env
from edt.utils.files import atomic_write, shorten_name

MOST_NAME_BYTES = 255  # of a folder's name, on common file systems


def parser() -> argparse.ArgumentParser:
    """The command line of the 50,000-image script."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_sampling_arguments(
        p,
        amm_type=true_or_false,
        amm_values="True|False",
        amm_default="off, unless an option below is given",
    )
    p.add_argument("--num-images", type=COUNT, default=50_000, help="over all processes")
    p.add_argument("--per-proc-batch-size", type=COUNT, default=50, help="images per batch")
    p.add_argument("--seed", "--global-seed", type=int, help="fixes noise and labels")
    p.add_argument(
        "--labels",
        metavar="LABELS",
        help=f"{describe(LABEL_POLICIES)}; 207,cat: a list of classes, by index or name, repeated "
        "in this order",
    )
    p.add_argument(
        "--output-dir",
        "--results-dir",
        type=nonempty_path,
        default="samples",
        metavar="DIR",
        help="a folder named by the settings is made in it",
    )
    p.add_argument("--png", action="store_true", help="write a folder of PNGs, too")
    return p


def resolve_labels(labels: str, num_classes: int, folders: Sequence[str] | None) -> str:
    """``--labels`` with indices in place of the names of classes.

    Args:
        labels: a policy of LABEL_POLICIES, or classes as for find_classes.
        num_classes: of the model.
        folders: its class folders, as for class_names.

    Raises:
        UserError: a class cannot be found.
    """
    parts = labels.split(",")
    if labels in LABEL_POLICIES or not all(map(str.strip, parts)):  # labels_of refuses the latter
        return labels
    classes = find_classes(labels, class_names(num_classes, folders))
    is_indices = all(part.strip().isdecimal() for part in parts)
    if is_indices and [int(part) for part in parts] == classes:
        return labels  # as it is, since a folder of samples may have recorded it so
    return ",".join(map(str, classes))


def folder_name(
    model: str,
    checkpoint: Path,
    loaded: LoadedModel,
    config: SamplingConfig,
    modulations: tuple[Modulation, ...],
) -> str:
    """Name of the folder of samples, which shows the settings that are changed most often.

    Its longest parts are shortened if the file system could not hold the name.
    """
    blocks = "-".join(str(modulation.block) for modulation in modulations)
    parts = [model.replace("/", "-"), checkpoint.stem, f"size-{loaded.image_size}"]
    parts += [f"vae-{Path(loaded.vae_name).name}", f"cfg-{config.cfg_scale}"]
    if config.cfg_channels == "all":
        parts.append("all")
    if config.cfg_interval is not None:
        parts.append("t-{}-{}".format(*config.cfg_interval))
    parts += [f"seed-{config.seed}", config.solver, config.num_sampling_steps]
    parts.append(f"amm-{blocks}" if blocks else "noamm")
    if len(os.fsencode("-".join(parts))) > MOST_NAME_BYTES:
        parts = [shorten_name(part, 60) for part in parts]
    return shorten_name("-".join(parts), MOST_NAME_BYTES)


def draw_missing(
    archive: SampleArchive,
    loaded: LoadedModel,
    config: SamplingConfig,
    batch_size: int,
    rank: int,
    world_size: int,
) -> None:
    """Draw this process's share of the images that are missing.

    The bar of the first process counts its own share, so it ends full. Processes do not wait for
    one another, and the others may still be drawing then.
    """
    count = archive.shape[0]
    missing = archive.missing()
    indices = torch.from_numpy(missing[missing % world_size == rank])
    share = len(range(rank, count, world_size))
    title = f"process 1 of {world_size}" if world_size > 1 else None
    done = share - len(indices)
    with image_bar(share, initial=done, desc=title, disable=rank > 0) as bar:
        batches = generate(loaded.model, loaded.vae, config, indices, batch_size, progress=bar)
        for batch in batches:
            archive.write(batch.indices.numpy(), batch.images.numpy())
            if world_size > 1:
                written = count - len(archive.missing())
                bar.set_postfix_str(f"{written} of {count} by all", refresh=False)


def write_pngs(folder: Path, archive: SampleArchive, indices: range) -> None:
    """Write the PNGs that do not exist yet, from the images in the archive."""
    absent = [index for index in indices if not (folder / f"{index:06d}.png").exists()]
    for index, image in zip(absent, archive.read(absent), strict=True):
        with atomic_write(folder / f"{index:06d}.png", durable=False) as temporary:
            Image.fromarray(image).save(temporary, format="png")


@exit_on_user_error()
def main(argv: list[str] | None = None) -> int:
    """Sample; returns the exit code."""
    args = parser().parse_args(argv)
    rank, world_size, device = get_distributed_env()
    if rank > 0:
        logging.getLogger("edt").setLevel(logging.ERROR)  # the first process warns for all
    config: SamplingConfig = from_arguments(SamplingConfig, args)
    loaded = load_for_sampling(args, device)
    model, info = loaded.model, loaded.info
    set_amm_from_arguments(model, args)
    labels = resolve_labels(config.labels, model.num_classes, info.features.classes)
    if labels != config.labels:
        config = dataclasses.replace(config, labels=labels)
    config.labels_of(torch.arange(1), model.num_classes)  # refuses labels before work starts
    name = args.model or info.name or model.config.family
    folder_path = args.output_dir / folder_name(name, args.ckpt, loaded, config, model.modulations)
    open_sample_folder(folder_path, settings_of(loaded, config))

    archive = SampleArchive(folder_path, (args.num_images, loaded.image_size, loaded.image_size, 3))
    archive.open()
    draw_missing(archive, loaded, config, args.per_proc_batch_size, rank, world_size)
    if args.png:
        write_pngs(folder_path, archive, range(rank, args.num_images, world_size))
    if archive.finish():
        image_labels = config.labels_of(torch.arange(args.num_images), model.num_classes)
        with atomic_write(archive.labels_path) as temporary, open(temporary, "wb") as file:
            np.save(file, image_labels.numpy())
        print(archive.path, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Sample many images, on any number of processes, into an .npz that ADM's evaluator reads.

    torchrun --nproc_per_node 8 image_generator_ddp.py --model EDT-S/2 --ckpt EDT-S.pt --amm \\
        --num-images 50000

Up to float rounding, image i does not depend on the number of processes or on the batch size. Run
the same command again after a crash: it draws only the images that are missing.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from edt.amm import Modulation
from edt.cli.arguments import (
    COUNT,
    add_sampling_arguments,
    from_arguments,
    true_or_false,
)
from edt.cli.build import LoadedModel, load_for_sampling, set_amm_from_arguments
from edt.cli.main import exit_on_user_error
from edt.sampling.config import LABEL_POLICIES, SamplingConfig
from edt.sampling.generate import generate
from edt.sampling.npz_writer import SampleArchive
from edt.sampling.sidecar import open_sample_folder, sample_settings
from edt.utils.distributed import get_distributed_env
from edt.utils.files import atomic_write


def parser() -> argparse.ArgumentParser:
    """The command line of the 50,000-image script."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sampling_arguments(p, amm_type=true_or_false, amm_values="True|False")
    p.add_argument("--num-images", type=COUNT, default=50_000, help="over all processes")
    p.add_argument("--per-proc-batch-size", type=COUNT, default=50, help="images per batch")
    p.add_argument("--global-seed", type=int, dest="seed", help="fixes noise and labels")
    p.add_argument(
        "--labels", help="; ".join(f"{name}: {text}" for name, text in LABEL_POLICIES.items())
    )
    p.add_argument(
        "--output-dir",
        "--results-dir",
        default="samples",
        metavar="DIR",
        help="a folder named by the settings is made in it",
    )
    p.add_argument("--png", action="store_true", help="write a folder of PNGs, too")
    return p


def folder_name(
    model: str,
    checkpoint: Path,
    loaded: LoadedModel,
    config: SamplingConfig,
    modulations: tuple[Modulation, ...],
) -> str:
    """Name of the folder of samples, which shows the settings that are changed most often."""
    blocks = "-".join(str(modulation.block) for modulation in modulations)
    parts = [model.replace("/", "-"), checkpoint.stem, f"size-{loaded.image_size}"]
    parts += [f"vae-{Path(loaded.vae_name).name}", f"cfg-{config.cfg_scale}"]
    if config.cfg_channels == "all":
        parts.append("all")
    if config.cfg_interval is not None:
        parts.append("t-{}-{}".format(*config.cfg_interval))
    parts += [f"seed-{config.seed}", config.solver, config.num_sampling_steps]
    parts.append(f"amm-{blocks}" if blocks else "noamm")
    return "-".join(parts)


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
    config: SamplingConfig = from_arguments(SamplingConfig, args)
    loaded = load_for_sampling(args, device)
    model, vae, info = loaded.model, loaded.vae, loaded.info
    set_amm_from_arguments(model, args)
    config.labels_of(torch.arange(1), model.num_classes)  # refuses labels before work starts
    name = args.model or info.name or model.config.family
    folder_path = Path(args.output_dir) / folder_name(
        name, Path(args.ckpt), loaded, config, model.modulations
    )
    settings = sample_settings(
        config,
        model.config,
        model.modulations,
        args.weights,
        info.weights_sha256,
        loaded.vae_name,
        vae.sha256,
        loaded.image_size,
    )
    open_sample_folder(folder_path, settings)

    archive = SampleArchive(folder_path, (args.num_images, loaded.image_size, loaded.image_size, 3))
    archive.open()
    missing = archive.missing()
    my_indices = torch.from_numpy(missing[missing % world_size == rank])
    written = args.num_images - len(missing)
    with tqdm(initial=written, total=args.num_images, unit="images", disable=rank > 0) as bar:
        for batch in generate(model, vae, config, my_indices, args.per_proc_batch_size):
            archive.write(batch.indices.numpy(), batch.images.numpy())
            written_by_all = args.num_images - len(archive.missing())
            bar.update(written_by_all - bar.n)
    if args.png:
        write_pngs(folder_path, archive, range(rank, args.num_images, world_size))
    if archive.finish():
        labels = config.labels_of(torch.arange(args.num_images), model.num_classes)
        with atomic_write(folder_path / "labels.npy") as temporary, open(temporary, "wb") as file:
            np.save(file, labels.numpy())
        print(archive.path, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Extract VAE features from a folder of images with one sub-folder per class.

    torchrun --nproc_per_node 8 extract_features.py --data-path imagenet/train

The command can be repeated. It then writes only the files that are missing or damaged.
"""

import argparse
import dataclasses

from tqdm.auto import tqdm

from edt.cli.arguments import (
    COUNT,
    COUNT_OR_ZERO,
    HelpFormatter,
    from_arguments,
    nonempty,
    nonempty_path,
)
from edt.cli.main import exit_on_user_error
from edt.data.extraction import Extraction, ExtractionConfig
from edt.data.features import DrawMode, Layout
from edt.data.images import CroppedImages
from edt.data.vae import latent_shape, load_vae
from edt.models import EDTConfig
from edt.utils.choices import choices
from edt.utils.distributed import get_distributed_env


def parser() -> argparse.ArgumentParser:
    """The script's arguments."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    p.add_argument(
        "--data-path",
        type=nonempty_path,
        required=True,
        help="folder with one sub-folder of images per class",
    )
    p.add_argument(
        "--features-path",
        "--feature-path",
        type=nonempty_path,
        default="features256",
        help="folder of the features (default: %(default)s)",
    )
    p.add_argument(
        "--vae",
        type=nonempty,
        default="ema",
        help="ema, mse, a diffusers folder, a hub id, or pixels for no VAE (default: %(default)s)",
    )
    p.add_argument(
        "--batch-size",
        type=COUNT,
        default=32,
        help="images per VAE call, in each process (default: %(default)s)",
    )
    p.add_argument(
        "--num-workers",
        type=COUNT_OR_ZERO,
        default=4,
        help="data loader workers per process (default: %(default)s)",
    )
    add_config_arguments(p)
    return p


def add_config_arguments(p: argparse.ArgumentParser) -> None:
    """Add the fields of :class:`ExtractionConfig`, under their names and with their defaults."""
    p.add_argument(
        "--image-size", type=COUNT, help="side of the images in pixels (default: %(default)s)"
    )
    p.add_argument(
        "--draw",
        choices=choices(DrawMode),
        help="once: one flip and one posterior sample per image, as in the release; "
        "fresh: every epoch draws new flips and samples (default: %(default)s)",
    )
    p.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="mirror half of the images (default: %(default)s)",
    )
    p.add_argument(
        "--layout",
        choices=choices(Layout),
        help="packed: large files; npy: two files per image, as in the release "
        "(default: %(default)s)",
    )
    p.add_argument(
        "--shard-size",
        type=COUNT,
        help="images per file of the packed layout (default: %(default)s)",
    )
    p.add_argument(
        "--seed",
        "--global-seed",
        type=int,
        help="seed of flips and posterior samples (default: %(default)s)",
    )
    p.set_defaults(**dataclasses.asdict(ExtractionConfig()))


@exit_on_user_error()
def main(argv: list[str] | None = None) -> int:
    """Run the script on these arguments, or on the command line's. Returns the exit code."""
    args = parser().parse_args(argv)
    config: ExtractionConfig = from_arguments(ExtractionConfig, args)
    images = CroppedImages(args.data_path, config.image_size)
    env = get_distributed_env()
    if env.rank == 0:
        print(images.folder.describe())
    vae = load_vae(args.vae, env.device)
    # Raises if EDT does not support this image size. The VAE supports more sizes, so without this
    # check the error would come only in training, after hours of extraction.
    EDTConfig(input_size=latent_shape(vae, config.image_size)[-1])
    extraction = Extraction(
        images, vae, args.vae, args.features_path, config, env.rank, env.world_size
    )
    for file in extraction.drop_damaged():
        print(f"{file} is missing or damaged and will be extracted again")
    with tqdm(total=extraction.num_images, unit="image", disable=env.rank > 0) as progress:
        for count in extraction.run(args.batch_size, args.num_workers, env.device):
            progress.update(count)
    if env.rank == 0:
        num_classes = len(images.folder.classes)
        print(f"{len(images)} images of {num_classes} classes: features in {args.features_path}")
    return 0

"""Extract VAE features of an image folder (one sub-folder a class).

torchrun --nproc_per_node 8 extract_features.py --data-path imagenet/train --features-path
features256"""

import argparse
import sys

from tqdm.auto import tqdm

from edt.cli.build import COUNT, exit_on_user_error, find_place, number
from edt.data.extraction import CroppedImages, Extraction, ExtractionConfig
from edt.data.vae import latent_shape, load_vae
from edt.models import EDTConfig


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--data-path", required=True, help="folder with one sub-folder of images per class"
    )
    p.add_argument("--features-path", "--feature-path", default="features256")
    p.add_argument(
        "--vae",
        default="ema",
        help="ema, mse, a folder, a hub id, or pixels (images are the latents)",
    )
    p.add_argument("--image-size", type=COUNT, default=256, help="pixels")
    p.add_argument("--batch-size", type=COUNT, default=32, help="images per process and VAE call")
    p.add_argument(
        "--draw",
        choices=["once", "fresh"],
        default="once",
        help="once: one flip and one posterior sample an image, as the release; fresh: new ones every epoch",
    )
    p.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="mirror half of the images",
    )
    p.add_argument(
        "--layout",
        choices=["packed", "npy"],
        default="packed",
        help="npy: the release's two files an image",
    )
    p.add_argument(
        "--shard-size",
        type=COUNT,
        default=8192,
        help="images of a packed file; one is the work of one process",
    )
    p.add_argument("--num-workers", type=number(least=0), default=4)
    p.add_argument("--global-seed", type=int, default=0)
    return p


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    images = CroppedImages(args.data_path, args.image_size)
    rank, world_size, device = find_place()
    config = ExtractionConfig(
        args.image_size, args.global_seed, args.draw, args.flip, args.layout, args.shard_size
    )
    vae = load_vae(args.vae, device)
    EDTConfig(
        input_size=latent_shape(vae, args.image_size)[-1]
    )  # refuses, before any work, a size that no EDT takes
    extraction = Extraction(images, vae, args.vae, args.features_path, config, rank, world_size)
    for file in extraction.drop_damaged():
        print(f"{file} is damaged and made anew")
    share = sum(len(extraction.units[unit]) for unit in extraction.share)
    with tqdm(total=share, unit="image", disable=rank > 0) as bar:
        for number in extraction.run(args.batch_size, args.num_workers, device):
            bar.update(number)
    if rank == 0:
        print(
            f"{len(images)} images of {len(images.folder.classes)} classes: features in {args.features_path}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

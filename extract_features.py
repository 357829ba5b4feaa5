"""Extract VAE features of an image folder (one sub-folder a class).

torchrun --nproc_per_node 8 extract_features.py --data-path imagenet/train --features-path features256
"""

import argparse
import sys

from tqdm.auto import tqdm

from edt.cli import exit_on_user_error, make_accelerator
from edt.extraction import CroppedImages, ExtractionConfig, extract_features
from edt.vae import load_vae


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data-path", required=True, help="folder with one sub-folder of images per class")
    p.add_argument("--features-path", "--feature-path", default="features256")
    p.add_argument("--vae", default="ema", help="ema, mse, a folder, a hub id, or pixels (images are the latents)")
    p.add_argument("--image-size", type=int, default=256, help="pixels")
    p.add_argument("--batch-size", type=int, default=32, help="images per process and VAE call")
    p.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True,
                   help="mirror half of the images, drawn once an image, as the release does")  # fmt: skip
    p.add_argument("--num-workers", type=int, default=4)
    p.add_argument("--global-seed", type=int, default=0)
    return p


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    images = CroppedImages(args.data_path, args.image_size)
    accelerator = make_accelerator()
    config = ExtractionConfig(args.image_size, args.global_seed, args.flip)
    done = extract_features(
        images, load_vae(args.vae, accelerator.device), args.vae, args.features_path, config,
        rank=accelerator.process_index, world_size=accelerator.num_processes,
        batch_size=args.batch_size, num_workers=args.num_workers, device=accelerator.device,
    )  # fmt: skip
    share = len(range(accelerator.process_index, len(images), accelerator.num_processes))
    with tqdm(total=share, unit="image", disable=not accelerator.is_main_process) as bar:
        for number in done:
            bar.update(number)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if accelerator.is_main_process:
        print(f"{len(images)} features of {len(images.folder.classes)} classes in {args.features_path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

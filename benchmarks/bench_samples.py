"""Memory and speed of writing samples as the 50,000-image script does.

    # 50,000 x 256 x 256 x 3; it takes 9.2 GiB of disk while it runs
    python benchmarks/bench_samples.py

Random latents are enlarged to images in place of a decoder, converted and stored. The result is
JSON; "peak_beyond_baseline_gib" is how much the process grew after its imports.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from edt.data.vae import to_uint8
from edt.sampling.npz_writer import SampleArchive
from edt.utils.randomness import normal


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--num-images", type=int, default=50_000)
    p.add_argument("--image-size", type=int, default=256)
    p.add_argument("--batch-size", type=int, default=50)
    p.add_argument(
        "--output-dir", type=Path, help="where a temporary folder is made; default: the system's"
    )
    return p


def peak_gib() -> float:
    """The most memory this process has had resident, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def fake_decode(latents: torch.Tensor, size: int) -> torch.Tensor:
    """Latents (B, 4, h, w) -> "images" (B, 3, size, size)."""
    return torch.nn.functional.interpolate(latents[:, :3], size=(size, size))


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    shape = (args.num_images, args.image_size, args.image_size, 3)
    with tempfile.TemporaryDirectory(dir=args.output_dir) as folder:
        baseline, start = peak_gib(), time.perf_counter()
        archive = SampleArchive(Path(folder), shape)
        archive.open()
        side = args.image_size // 8
        batches = torch.from_numpy(archive.missing()).split(args.batch_size)
        for indices in tqdm(batches, unit="batches"):
            latents = normal(0, "noise", 0, indices, (4, side, side), "cpu")
            pixels = fake_decode(latents, args.image_size)
            archive.write(indices.numpy(), to_uint8(pixels).numpy())
        written = time.perf_counter()
        archive.finish()
        ended, peak = time.perf_counter(), peak_gib()
        report = {
            "shape": shape,
            "file_gib": round(archive.path.stat().st_size / 2**30, 3),
            "baseline_gib": round(baseline, 3),
            "peak_beyond_baseline_gib": round(peak - baseline, 3),
            "images_per_second": round(args.num_images / (written - start), 1),
            "finish_seconds": round(ended - written, 1),
        }
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

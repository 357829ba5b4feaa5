"""The VAE's decoder as released against the one that sampling with --precision bf16 uses.

    python benchmarks/bench_vae.py --json

The released decoder computes in fp32 (no TF32) on the batch at once. The VAE has Stable Diffusion's
architecture and random weights.
"""

import argparse
import copy
import sys

import measure
import torch
from bench_sampling import stable_diffusion_vae

from edt.nn.precision import set_matmul_precision

MAX_ERRORS = {"fp32": 1e-4, "bf16": 0.05}  # relative error of the images


def main() -> int | str:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--num-images", type=int, help="default: 2 on a CPU, 64 on a GPU")
    p.add_argument("--image-size", type=int, default=256)
    p.add_argument("--repeats", type=int, default=3)
    measure.add_arguments(p)
    args = p.parse_args()
    device = torch.device(args.device)
    count, side = args.num_images or (64 if device.type == "cuda" else 2), args.image_size // 8
    exact = stable_diffusion_vae(device)
    fast = stable_diffusion_vae(device, torch.bfloat16)
    released = copy.deepcopy(exact.autoencoder).to(memory_format=torch.contiguous_format)
    latents = 0.9 * torch.randn(count, 4, side, side, device=device)
    decode = {
        "reference": lambda: released.decode(latents / exact.scaling_factor).sample,
        "fp32": lambda: exact.decode(latents),
        "bf16": lambda: fast.decode(latents),
    }
    set_matmul_precision("fp32")
    with torch.no_grad():
        rows = measure.in_turn(decode, args.repeats, device)
        expected = decode["reference"]()
        errors = {
            name: measure.relative_error(decode[name](), expected) for name in ("fp32", "bf16")
        }
    for row in rows.values():
        row["images_per_sec"] = count / row["median_sec"]
    measure.finish(f"vae-{measure.kind(device)}", args, device, rows, errors)
    if all(error <= MAX_ERRORS[name] for name, error in errors.items()):
        return 0
    return "error: the images differ from the reference's"


if __name__ == "__main__":
    sys.exit(main())

"""Guided ancestral sampling against the released arithmetic, in one run.

    # a CPU: EDT-S/2, 8 images, 5 steps
    python benchmarks/bench_sampling.py --json
    # a GPU
    python benchmarks/bench_sampling.py --num-images 256 --steps 250 --decode --json

With --decode the images are decoded and written, too. The VAE is Stable Diffusion's with random
weights.
"""

import argparse
import copy
import functools
import sys
import tempfile
from pathlib import Path

import measure
import torch
from bench_step import make_model
from PIL import Image
from reference import as_released, reference_sampling

from edt.data.vae import LatentVAE, to_uint8
from edt.diffusion import SOLVERS
from edt.models import EDT
from edt.nn.compilation import COMPILE_MODES, compile_network
from edt.nn.precision import PRECISIONS, round_weights, set_matmul_precision
from edt.registry import MODELS
from edt.sampling.config import SamplingConfig
from edt.sampling.generate import generate, sample_latents
from edt.sampling.npz_writer import SampleArchive
from edt.utils.randomness import ImageNoise

LATENT_SHAPE, IMAGE_SIZE = (4, 32, 32), 256
RELEASED_BATCH_SIZE, RELEASED_SCALING_FACTOR = 50, 0.18215


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", default="EDT-S/2", choices=MODELS)
    p.add_argument("--num-images", type=int, default=8)
    p.add_argument(
        "--batch-size",
        type=int,
        help="batch size of the fast row; default: --num-images. The reference row uses 50",
    )
    p.add_argument("--steps", default="5", help="denoising steps")
    p.add_argument("--solver", choices=SOLVERS, default="ddpm", help="of the fast row")
    p.add_argument("--solver-steps", help="of the fast row; default: --steps")
    p.add_argument("--cfg-scale", type=float, default=4.0)
    p.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of the fast row")
    p.add_argument("--compile", choices=COMPILE_MODES, default="off")
    p.add_argument(
        "--decode",
        action="store_true",
        help="also decode and write images: PNGs in the reference row, one .npz in the fast row",
    )
    p.add_argument("--repeats", type=int, default=3)
    measure.add_arguments(p)
    return p


def stable_diffusion_vae(device: torch.device, dtype: torch.dtype = torch.float32) -> LatentVAE:
    from diffusers import AutoencoderKL  # slow to import

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=IMAGE_SIZE,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    )
    return LatentVAE(vae.to(device), dtype)


def run_reference(
    model: EDT, vae: LatentVAE | None, args: argparse.Namespace, labels: torch.Tensor, folder: Path
) -> None:
    """Sample as released and, with a VAE, write PNGs."""
    set_matmul_precision("tf32")
    device = torch.device(args.device)
    for indices in torch.arange(len(labels)).split(RELEASED_BATCH_SIZE):
        x = torch.randn(len(indices), *LATENT_SHAPE, device=device)
        y = labels[indices].to(device)
        latents = reference_sampling(model, args.steps, x, y, args.cfg_scale)
        if vae is None:
            continue
        pixels = vae.autoencoder.decode(latents / RELEASED_SCALING_FACTOR).sample
        for index, image in zip(indices.tolist(), to_uint8(pixels).cpu(), strict=True):
            Image.fromarray(image.numpy()).save(folder / f"{index}.png")


def run_fast(
    model: EDT,
    vae: LatentVAE | None,
    config: SamplingConfig,
    batch_size: int,
    labels: torch.Tensor,
    folder: Path,
) -> None:
    """Sample as the 50,000-image script does and, with a VAE, write the archive."""
    all_indices = torch.arange(len(labels))
    if vae is None:
        for indices in all_indices.split(batch_size):
            sample_latents(model, config, indices, labels[indices])
        return
    with tempfile.TemporaryDirectory(dir=folder) as archive_folder:
        archive = SampleArchive(Path(archive_folder), (len(labels), IMAGE_SIZE, IMAGE_SIZE, 3))
        archive.open()
        for batch in generate(model, vae, config, all_indices, batch_size, labels=labels):
            archive.write(batch.indices.numpy(), batch.images.numpy())
        archive.finish()


def latent_error(
    model: EDT, reference: EDT, args: argparse.Namespace, labels: torch.Tensor
) -> float:
    """Relative error of the latents of four images after 5 steps of DDPM, from the same noise."""
    config = SamplingConfig(
        precision=args.precision, num_sampling_steps="5", cfg_scale=args.cfg_scale
    )
    device, labels = torch.device(args.device), labels[:4]
    indices = torch.arange(len(labels))
    noise = ImageNoise(config.seed, indices, LATENT_SHAPE, device)
    set_matmul_precision("fp32")
    y = labels.to(device)
    expected = reference_sampling(reference, "5", noise(0), y, args.cfg_scale, noise)
    return measure.relative_error(sample_latents(model, config, indices, labels), expected)


def main() -> int | str:
    args = parser().parse_args()
    device, count = torch.device(args.device), args.num_images
    labels = torch.arange(count) % 1000
    config = SamplingConfig(
        num_sampling_steps=args.solver_steps or args.steps,
        solver=args.solver,
        cfg_scale=args.cfg_scale,
        precision=args.precision,
    )
    model = make_model(args.model).to(device).eval().requires_grad_(False)
    model.set_amm("auto", cfg_scale=args.cfg_scale)
    reference = as_released(copy.deepcopy(model))
    if args.precision == "bf16":
        round_weights(model)
    compile_network(model, args.compile)
    vae = fast_vae = None
    if args.decode:
        vae = stable_diffusion_vae(device)
        vae.autoencoder.to(memory_format=torch.contiguous_format)  # as released
        dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        fast_vae = stable_diffusion_vae(device, dtype)

    fast_name = f"{args.precision}, {args.solver} {config.num_sampling_steps}"
    if args.compile != "off":
        fast_name += f", compile {args.compile}"
    with tempfile.TemporaryDirectory() as name:
        folder, batch_size = Path(name), args.batch_size or count
        calls = {
            "reference": functools.partial(run_reference, reference, vae, args, labels, folder),
            fast_name: functools.partial(
                run_fast, model, fast_vae, config, batch_size, labels, folder
            ),
        }
        rows = measure.in_turn(calls, args.repeats, device)
    for name, row in rows.items():
        steps = args.steps if name == "reference" else config.num_sampling_steps
        row["images_per_sec"] = count / row["median_sec"]
        if not args.decode:
            row["sec_per_step"] = row["median_sec"] / int(steps.removeprefix("ddim"))

    error = latent_error(model, reference, args, labels)
    parts = ["sampling", measure.kind(device), args.model.split("/")[0], args.precision]
    parts += [args.solver + config.num_sampling_steps] + ["decode"] * args.decode
    measure.finish("-".join(parts), args, device, rows, {"latents": error})
    if error <= (1e-4 if args.precision == "fp32" else 0.05):
        return 0
    return "error: the latents differ from the reference's"


if __name__ == "__main__":
    sys.exit(main())

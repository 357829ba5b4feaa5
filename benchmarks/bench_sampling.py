"""Guided ancestral sampling against the released arithmetic, in one run; with --decode the VAE and
the writing too.

    python benchmarks/bench_sampling.py --json                            # a CPU: EDT-S/2, 8
    images, 5 steps python benchmarks/bench_sampling.py --num-images 256 --steps 250 --decode --json
    # a GPU

The VAE is Stable Diffusion's with random weights.
"""

import argparse
import copy
import sys
import tempfile
from pathlib import Path

import measure
import torch
from bench_step import make_model
from PIL import Image
from reference import reference_sampling, released

from edt.data.vae import LatentVAE, to_uint8
from edt.models import EDT_models
from edt.nn.compilation import COMPILE, compile_network
from edt.nn.precision import PRECISIONS, allow_tf32, round_weights
from edt.sampling.generate import SOLVERS, Recipe, generate, sample_latents
from edt.sampling.npz_writer import SampleArchive
from edt.utils.randomness import normal


def stable_diffusion_vae(device: torch.device, dtype: torch.dtype = torch.float32) -> LatentVAE:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=256,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    )
    return LatentVAE(vae.to(device), dtype)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", default="EDT-S/2", choices=EDT_models)
    p.add_argument("--num-images", type=int, default=8)
    p.add_argument(
        "--batch-size",
        type=int,
        help="of the fast row; default: all at once. The released one's is 50",
    )
    p.add_argument("--steps", default="5", help="denoising steps")
    p.add_argument("--solver", choices=SOLVERS, default="ddpm", help="of the fast row")
    p.add_argument("--solver-steps", help="of the fast row, if others than --steps")
    p.add_argument("--cfg-scale", type=float, default=4.0)
    p.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of the fast row")
    p.add_argument("--compile", choices=COMPILE, default="off")
    p.add_argument(
        "--decode",
        action="store_true",
        help="to pixels and to disk: PNGs as released, the archive of samples",
    )
    p.add_argument("--repeats", type=int, default=3)
    measure.add_arguments(p)
    return p


def main() -> int:
    args = parser().parse_args()
    device, count = torch.device(args.device), args.num_images
    indices, labels = torch.arange(count), torch.arange(count) % 1000
    recipe = Recipe(
        num_sampling_steps=args.solver_steps or args.steps,
        solver=args.solver,
        cfg_scale=args.cfg_scale,
        precision=args.precision,
    )

    model = make_model(args.model).to(device).eval().requires_grad_(False)
    model.set_amm("auto", cfg_scale=args.cfg_scale)
    reference = released(copy.deepcopy(model))
    if args.precision == "bf16":
        round_weights(model)
    compile_network(model, args.compile)
    vae = stable_diffusion_vae(device) if args.decode else None
    fast_vae = (
        stable_diffusion_vae(device, torch.bfloat16 if args.precision == "bf16" else torch.float32)
        if vae
        else None
    )
    if vae:  # as released
        vae.autoencoder.to(memory_format=torch.contiguous_format)

    def run_reference() -> None:
        allow_tf32("tf32")
        for some in indices.split(50):
            x = torch.randn(len(some), 4, 32, 32, device=device)
            latents = reference_sampling(
                reference, args.steps, x, labels[some].to(device), args.cfg_scale
            )
            if vae:
                for index, image in zip(
                    some.tolist(),
                    to_uint8(vae.autoencoder.decode(latents / 0.18215).sample).cpu(),
                    strict=True,
                ):
                    Image.fromarray(image.numpy()).save(Path(folder) / f"{index}.png")

    def run_fast() -> None:
        batch = args.batch_size or count
        if not vae:
            for some in indices.split(batch):
                sample_latents(model, recipe, some, labels[some])
            return
        with tempfile.TemporaryDirectory(dir=folder) as fresh:
            archive = SampleArchive(Path(fresh), (count, 256, 256, 3))
            archive.open()
            for done in generate(model, fast_vae, recipe, indices, batch, labels=labels):
                archive.write(done.indices.numpy(), done.images.numpy())
            archive.finish()

    with tempfile.TemporaryDirectory() as folder:
        fast = (
            f"{args.precision}, {args.solver} {recipe.num_sampling_steps}"
            + f", compile {args.compile}" * (args.compile != "off")
        )
        rows = measure.in_turn({"reference": run_reference, fast: run_fast}, args.repeats, device)
    for name, row in rows.items():
        steps = args.steps if name == "reference" else recipe.num_sampling_steps
        row["images_per_sec"] = count / row["median_sec"]
        if not vae:
            row["sec_per_step"] = row["median_sec"] / int(steps.removeprefix("ddim"))
    few = indices[:4]

    def noise_at(i: int) -> torch.Tensor:
        return normal(recipe.seed, "noise", i, few.to(device), (4, 32, 32), device)

    allow_tf32("fp32")
    exact = reference_sampling(
        reference, "5", noise_at(0), labels[few].to(device), args.cfg_scale, noise_at
    )
    checked = Recipe(precision=args.precision, num_sampling_steps="5", cfg_scale=args.cfg_scale)
    error = measure.relative_error(sample_latents(model, checked, few, labels[few]), exact)
    kind = "gpu" if device.type == "cuda" else "cpu"
    what = (
        f"sampling-{kind}-{args.model.split('/')[0]}-{args.precision}-{args.solver}{recipe.num_sampling_steps}"
        + "-decode" * args.decode
    )
    measure.finish(what, args, device, rows, {"latents": error})
    return (
        0
        if error <= (1e-4 if args.precision == "fp32" else 0.05)
        else "error: the latents differ from the reference's"
    )


if __name__ == "__main__":
    sys.exit(main())

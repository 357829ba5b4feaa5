"""Do the fast step and the released arithmetic learn alike? 300 steps of each on real images from
the same draws.

    python benchmarks/loss_curve.py --json --plot benchmarks/results/loss-curve.png

Handwritten digits, EDT-Tiny, the demo's settings; fast is bfloat16 (where asked for), both passes
as one batch."""

import argparse
import copy
import json
import sys
from pathlib import Path

import measure
import numpy as np
import torch
from accelerate import Accelerator
from reference import ReferenceStep
from sklearn.datasets import load_digits

from edt.models import EDT_models
from edt.training.trainer import BatchIndices, TrainConfig, Trainer

WINDOW = 20  # steps whose losses are averaged
BAND = 0.03  # by how much of it the averages may differ


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, 3, 16, 16) in [-1, 1] and labels."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    return torch.nn.functional.interpolate(images, size=16, mode="bicubic").expand(
        -1, 3, -1, -1
    ), torch.from_numpy(data.target)


def curves(
    steps: int, precision: str, noise: str, batch: int = 32, lr: float = 3e-3
) -> dict[str, np.ndarray]:
    """Importance-weighted loss of each step, (steps,), of the reference and of the fast step."""
    images, labels = digits()
    torch.manual_seed(0)
    model = EDT_models["EDT-Tiny/2"](input_size=16, in_channels=3, num_classes=10)
    reference = ReferenceStep(copy.deepcopy(model), copy.deepcopy(model), lr=lr)
    config = TrainConfig(
        global_batch_size=batch, init_lr=lr, lr_steps=10**9, noise=noise, precision=precision
    )
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision="bf16" if precision == "bf16" else "no"
    )
    trainer = Trainer(model, config, accelerator)
    reference.model.to(accelerator.device), reference.ema.to(accelerator.device)
    found = {"reference": [], "fast": []}
    for _, (indices, _) in zip(
        range(steps), BatchIndices(len(images), 0, batch, slice(None)), strict=False
    ):
        x, y, draws = (
            images[indices].to(accelerator.device),
            labels[indices].to(accelerator.device),
            trainer.draw(),
        )
        for name, losses in (
            ("reference", reference.update(x, y, draws)),
            ("fast", trainer.update(x, y, draws).losses),
        ):
            found[name].append((losses.sum(dim=1) * draws.weight).mean())
    return {name: torch.stack(losses).cpu().numpy() for name, losses in found.items()}


def largest_difference(found: dict[str, np.ndarray]) -> float:
    """Of the averages over windows, relative."""
    means = {
        name: losses[: len(losses) // WINDOW * WINDOW].reshape(-1, WINDOW).mean(axis=1)
        for name, losses in found.items()
    }
    return float(np.abs(means["fast"] / means["reference"] - 1).max())


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    p.add_argument("--noise", choices=["independent", "shared"], default="shared")
    p.add_argument("--json", type=Path, nargs="?", const=measure.RESULTS / "loss-curve.json")
    p.add_argument("--plot", type=Path)
    args = p.parse_args()
    found = curves(args.steps, args.precision, args.noise)
    difference = largest_difference(found)
    print(
        f"largest difference of the {WINDOW}-step averages: {difference:.2%} (at most {BAND:.0%})"
    )
    print(
        f"first {found['reference'][:WINDOW].mean():.4f}, last {found['reference'][-WINDOW:].mean():.4f}"
    )
    if args.json:
        record = {
            **vars(args),
            "json": None,
            "plot": None,
            "largest_difference": difference,
            "machine": measure.machine(
                torch.device("cuda" if torch.cuda.is_available() else "cpu")
            ),
            **{name: np.round(losses, 5).astype(float).tolist() for name, losses in found.items()},
        }
        args.json.write_text(json.dumps(record) + "\n")
    if args.plot:
        from matplotlib.figure import Figure

        axes = Figure(figsize=(6, 3.5), layout="constrained").subplots()
        for name, losses in found.items():
            axes.plot(np.convolve(losses, np.ones(WINDOW) / WINDOW, mode="valid"), label=name, lw=1)
        axes.set(xlabel="step", ylabel=f"loss, mean of {WINDOW} steps", yscale="log")
        axes.legend()
        axes.figure.savefig(args.plot, dpi=120)
    return 0 if difference <= BAND else "error: the curves part"


if __name__ == "__main__":
    sys.exit(main())

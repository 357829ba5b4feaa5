"""Compare the losses of the fast step and of the released arithmetic over 300 steps.

    python benchmarks/loss_curve.py --json --plot benchmarks/results/loss-curve.png

Both train on the same inputs: EDT-Tiny on handwritten digits, with the demo's settings. The fast
step is bfloat16 by default, with both passes as one batch.
"""

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

from edt.data.batches import BatchIndices
from edt.data.features import Batch
from edt.registry import create_model
from edt.training.config import PASS_NOISES, PassNoise, TrainConfig
from edt.training.trainer import Trainer

WINDOW = 20  # steps whose losses are averaged
MAX_DIFFERENCE = 0.03  # of the averages, relative
BATCH_SIZE, LEARNING_RATE = 32, 3e-3


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, 3, 16, 16) in [-1, 1] and labels (n,)."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    images = torch.nn.functional.interpolate(images, size=16, mode="bicubic")
    return images.expand(-1, 3, -1, -1), torch.from_numpy(data.target)


def loss_curves(steps: int, precision: str, noise: PassNoise) -> dict[str, np.ndarray]:
    """Importance-weighted loss of each step, (steps,), of "reference" and "fast"."""
    images, labels = digits()
    torch.manual_seed(0)
    model = create_model("EDT-Tiny/2", input_size=16, in_channels=3, num_classes=10)
    reference = ReferenceStep(copy.deepcopy(model), copy.deepcopy(model), lr=LEARNING_RATE)
    config = TrainConfig(
        global_batch_size=BATCH_SIZE,
        init_lr=LEARNING_RATE,
        lr_steps=10**9,  # constant
        noise=noise,
        precision=precision,
    )
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    trainer = Trainer(model, config, accelerator)
    device = accelerator.device
    reference.model.to(device)
    reference.ema.to(device)
    losses: dict[str, list[torch.Tensor]] = {"reference": [], "fast": []}
    indices = BatchIndices(len(images), 0, BATCH_SIZE, slice(None))
    for step in range(steps):
        rows, _ = indices.global_batch(step)
        x, y, inputs = images[rows].to(device), labels[rows].to(device), trainer.draw_inputs()
        step_losses = {
            "reference": reference.update(x, y, inputs),
            "fast": trainer.train_step(Batch(x, y), inputs).losses,
        }
        for name, values in step_losses.items():
            losses[name].append((values.sum(dim=1) * inputs.weight).mean())
    return {name: torch.stack(values).cpu().numpy() for name, values in losses.items()}


def largest_difference(losses: dict[str, np.ndarray]) -> float:
    """Largest relative difference between the averages over windows."""
    means = {}
    for name, values in losses.items():
        windows = len(values) // WINDOW
        means[name] = values[: windows * WINDOW].reshape(windows, WINDOW).mean(axis=1)
    return float(np.abs(means["fast"] / means["reference"] - 1).max())


def plot(losses: dict[str, np.ndarray], picture: Path) -> None:
    """Plot the moving averages of both losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, values in losses.items():
        average = np.convolve(values, np.ones(WINDOW) / WINDOW, mode="valid")
        axes.plot(average, label=name, lw=1)
    axes.set(xlabel="step", ylabel=f"loss, mean of {WINDOW} steps", yscale="log")
    axes.legend()
    figure.savefig(picture, dpi=120)


def main() -> int | str:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--steps", type=int, default=300)
    p.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    p.add_argument("--noise", choices=PASS_NOISES, default="shared")
    p.add_argument("--json", type=Path, nargs="?", const=measure.RESULTS / "loss-curve.json")
    p.add_argument("--plot", type=Path)
    args = p.parse_args()
    losses = loss_curves(args.steps, args.precision, args.noise)
    difference = largest_difference(losses)
    print(
        f"largest difference of the {WINDOW}-step averages: {difference:.2%} "
        f"(at most {MAX_DIFFERENCE:.0%})"
    )
    first, last = losses["reference"][:WINDOW].mean(), losses["reference"][-WINDOW:].mean()
    print(f"first {first:.4f}, last {last:.4f}")
    if args.json:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        record = {
            **vars(args),
            "json": None,
            "plot": None,
            "largest_difference": difference,
            "machine": measure.machine(device),
        }
        for name, values in losses.items():
            record[name] = np.round(values, 5).astype(float).tolist()
        args.json.write_text(json.dumps(record) + "\n")
    if args.plot:
        plot(losses, args.plot)
    return 0 if difference <= MAX_DIFFERENCE else "error: the losses of the two differ"


if __name__ == "__main__":
    sys.exit(main())

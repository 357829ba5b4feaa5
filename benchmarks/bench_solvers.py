"""Image quality after few sampling steps, for every solver.

    make demo
    python benchmarks/bench_solvers.py

The scores are the Fréchet distance to the training images in pixel space, and the share of samples
in their class. A support vector machine that is fitted on the training images finds the class. This
suits small images and a model that is trained on a folder of them. AMM is off. The script writes
solvers.json (after every setting) and solvers.png, and prints the table of docs/sampling.md.
"""

import argparse
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.svm import SVC
from tqdm.auto import tqdm

from edt.cli.arguments import add_speed_arguments
from edt.cli.build import LoadedModel, load_for_sampling
from edt.cli.main import exit_on_user_error
from edt.data.images import center_crop
from edt.diffusion import SOLVERS, Solver
from edt.metrics.frechet import Moments, StreamingMoments, frechet_distance
from edt.sampling.config import SamplingConfig
from edt.sampling.generate import generate
from edt.utils.distributed import get_distributed_env
from edt.utils.files import write_json
from edt.utils.image_files import read_image
from edt.utils.image_folder import list_images

SEED = 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--ckpt", default="runs/demo/run")
    p.add_argument(
        "--images",
        type=Path,
        default=Path("runs/demo/images"),
        help="with sub-folders train and test",
    )
    p.add_argument(
        "--num-images",
        type=int,
        default=360,
        help="of each setting; default: about as many as held back",
    )
    p.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    p.add_argument("--steps", nargs="+", type=int, default=[5, 10, 20, 50, 250])
    p.add_argument("--cfg-scale", type=float, default=3.0, help="default: the demo's")
    add_speed_arguments(p)
    p.add_argument("--batch-size", type=int, default=250)
    p.add_argument("--output-dir", type=Path, default=Path("runs/demo/solvers"))
    p.set_defaults(
        precision="fp32", weights="ema", model=None, num_classes=None, vae=None, image_size=None
    )  # as the checkpoint says
    return p


def real_images(folder: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, size * size * 3) in [0, 1] and labels (n,) of an image folder."""
    paths, labels = list_images(folder).labelled_paths()
    images = [np.asarray(center_crop(read_image(folder / path), size)) for path in paths]
    return flat(np.stack(images)), labels


def flat(images: np.ndarray) -> np.ndarray:
    """Images (n, H, W, 3) uint8 -> vectors (n, H * W * 3) in [0, 1]."""
    return images.reshape(len(images), -1) / 255


def moments(images: np.ndarray) -> Moments:
    streaming = StreamingMoments(images.shape[1])
    streaming.update(images)
    return streaming.moments()


def score(
    loaded: LoadedModel,
    args: argparse.Namespace,
    solver: Solver,
    steps: int,
    classifier: SVC,
    reference: Moments,
) -> dict:
    """Sample with a solver and a number of steps; returns the row of both scores."""
    config = SamplingConfig(
        SEED, str(steps), solver, args.cfg_scale, args.precision, labels="balanced"
    )
    indices = torch.arange(args.num_images)
    start = time.perf_counter()
    batches = list(generate(loaded.model, loaded.vae, config, indices, args.batch_size))
    seconds = time.perf_counter() - start
    images = flat(torch.cat([batch.images for batch in batches]).numpy())
    labels = torch.cat([batch.labels for batch in batches]).numpy()
    return {
        "solver": solver,
        "steps": steps,
        "frechet_distance": frechet_distance(*reference, *moments(images)),
        "class_accuracy": float(classifier.score(images, labels)),
        "seconds": round(seconds, 1),
    }


def plot(rows: list[dict], real: dict, picture: Path) -> None:
    """Plot both scores over the sampling steps, a line per solver."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    names = ("frechet_distance", "class_accuracy")
    titles = ("pixel-space Fréchet distance", "class accuracy")
    for panel, name, title in zip(axes, names, titles, strict=True):
        for solver in dict.fromkeys(row["solver"] for row in rows):
            solver_rows = [row for row in rows if row["solver"] == solver]
            steps = [row["steps"] for row in solver_rows]
            panel.plot(steps, [row[name] for row in solver_rows], "o-", label=solver)
        panel.axhline(real[name], color="grey", linestyle="--", label="held-back real images")
        panel.set(xlabel="sampling steps (model calls)", xscale="log", title=title)
        panel.set_xticks(sorted({row["steps"] for row in rows}))
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].legend()
    figure.savefig(picture, dpi=120)


def table(rows: list[dict], real: dict) -> str:
    """Markdown: a line for each solver, a column for each number of steps."""

    def cell(scores: dict) -> str:
        return f"{scores['frechet_distance']:.2f}, {scores['class_accuracy']:.1%}"

    columns = list(dict.fromkeys(row["steps"] for row in rows))
    lines = [
        ["distance, in class", *(f"{steps} steps" for steps in columns)],
        ["---"] * (1 + len(columns)),
    ]
    for solver in dict.fromkeys(row["solver"] for row in rows):
        lines.append([f"`{solver}`", *(cell(row) for row in rows if row["solver"] == solver)])
    lines.append([f"{real['count']} held-back real images", *[cell(real)] * len(columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@exit_on_user_error()
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    loaded = load_for_sampling(args, get_distributed_env().device)
    train, train_labels = real_images(args.images / "train", loaded.image_size)
    test, test_labels = real_images(args.images / "test", loaded.image_size)
    classifier, reference = SVC().fit(train, train_labels), moments(train)
    real = {
        "frechet_distance": frechet_distance(*reference, *moments(test)),
        "class_accuracy": float(classifier.score(test, test_labels)),
        "count": len(test),
    }
    packages = ("torch", "diffusers", "scikit-learn")
    settings = {
        "weights_sha256": loaded.info.weights_sha256,
        "num_images": args.num_images,
        "cfg_scale": args.cfg_scale,
        "precision": args.precision,
        "seed": SEED,
        "labels": "balanced",
        "amm": False,
        "versions": {package: version(package) for package in packages},
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    report = args.output_dir / "solvers.json"
    rows: list[dict] = []
    pairs = [(solver, steps) for solver in args.solvers for steps in args.steps]
    for solver, steps in tqdm(pairs, unit="settings"):
        rows.append(score(loaded, args, solver, steps, classifier, reference))
        write_json(report, {**settings, "held_back_real_images": real, "rows": rows})
    plot(rows, real, args.output_dir / "solvers.png")
    print(table(rows, real))
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())

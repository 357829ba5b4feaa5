"""How good images are after few steps: Fréchet distance and class accuracy against sampling steps,
for every solver.

    make demo
    python benchmarks/bench_solvers.py

For small images and a model trained on a folder of them: the distance is that of the pixels to the
training images, and the classifier is a support vector machine fitted on these. AMM is off. Writes
solvers.json (after every setting) and solvers.png, and prints the table of docs/sampling.md."""

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

from edt.checkpoints.folder import fingerprint_weights
from edt.cli.build import add_speed_arguments, exit_on_user_error, find_place, load_for_sampling
from edt.data.images import center_crop, open_image_folder
from edt.metrics.frechet import StreamingMoments, frechet_distance
from edt.sampling.generate import SOLVERS, Recipe, generate
from edt.utils.files import write_json


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
    p.add_argument("--solvers", nargs="+", choices=SOLVERS, default=SOLVERS)
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
    pairs = [
        (np.asarray(center_crop(image, size)), label) for image, label in open_image_folder(folder)
    ]
    images, labels = (np.stack(part) for part in zip(*pairs, strict=True))
    return flat(images), labels


def flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255


def moments(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    streaming = StreamingMoments(images.shape[1])
    streaming.update(images)
    return streaming.moments()


def plot(rows: list[dict], real: dict, picture: Path) -> None:
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for panel, score, title in zip(
        axes,
        ("frechet_distance", "class_accuracy"),
        ("pixel-space Fréchet distance", "class accuracy"),
        strict=True,
    ):
        for solver in dict.fromkeys(row["solver"] for row in rows):
            of_solver = [row for row in rows if row["solver"] == solver]
            panel.plot(
                [row["steps"] for row in of_solver],
                [row[score] for row in of_solver],
                "o-",
                label=solver,
            )
        panel.axhline(real[score], color="grey", linestyle="--", label="held-back real images")
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


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    model, vae, notes = load_for_sampling(args, find_place().device)
    size = notes["features"]["image_size"]
    (train, train_labels), (test, test_labels) = (
        real_images(args.images / split, size) for split in ("train", "test")
    )
    classifier, reference = SVC().fit(train, train_labels), moments(train)
    real = {
        "frechet_distance": frechet_distance(*reference, *moments(test)),
        "class_accuracy": float(classifier.score(test, test_labels)),
        "count": len(test),
    }
    about = {
        "weights_sha256": fingerprint_weights(args.ckpt),
        "num_images": args.num_images,
        "cfg_scale": args.cfg_scale,
        "precision": args.precision,
        "seed": 0,
        "labels": "balanced",
        "amm": False,
        "versions": {
            package: version(package) for package in ("torch", "diffusers", "scikit-learn")
        },
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for solver, steps in tqdm(
        [(solver, steps) for solver in args.solvers for steps in args.steps], unit="settings"
    ):
        recipe = Recipe(0, str(steps), solver, args.cfg_scale, args.precision, labels="balanced")
        start = time.perf_counter()
        batches = list(generate(model, vae, recipe, torch.arange(args.num_images), args.batch_size))
        seconds = time.perf_counter() - start
        images = flat(torch.cat([batch.images for batch in batches]).numpy())
        labels = torch.cat([batch.labels for batch in batches]).numpy()
        rows.append(
            {
                "solver": solver,
                "steps": steps,
                "frechet_distance": frechet_distance(*reference, *moments(images)),
                "class_accuracy": float(classifier.score(images, labels)),
                "seconds": round(seconds, 1),
            }
        )
        write_json(
            args.output_dir / "solvers.json", {**about, "held_back_real_images": real, "rows": rows}
        )
    plot(rows, real, args.output_dir / "solvers.png")
    print(table(rows, real))
    print(args.output_dir / "solvers.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())

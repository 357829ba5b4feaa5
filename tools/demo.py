"""The complete EDT pipeline on real images, in minutes on a CPU.

    make demo        # or: python tools/demo.py [--out runs/demo]

The demo extracts features, trains with masking, samples with and without AMM, evaluates and writes
pictures. It runs the five scripts as a user would, on scikit-learn's handwritten digits.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from edt.sampling.image_grid import make_grid
from edt.training.plots import plot_losses

ROOT = Path(__file__).resolve().parent.parent
IMAGE_SIZE = 16  # pixels: token grids of 8, 4 and 2
STEPS, BATCH_SIZE, SAMPLES, CFG_SCALE = 900, 64, 200, 3.0
SEEDS = range(5)  # of sampling; the scores of one seed change with the rounding of a machine
HELD_BACK = 5  # every fifth image is not trained on
CLASSES, GRID_ROWS, AMM_ROWS, ENLARGEMENT = 10, 8, 3, 3  # layout of the pictures


class Samples(NamedTuple):
    """Samples of one setting, a file for each seed, and their scores."""

    name: str  # of the row in the table
    paths: list[Path]  # the .npz of each seed
    scores: list[dict[str, Any]]  # of each seed, from evaluator.py


Images = dict[str, tuple[np.ndarray, np.ndarray]]
"""Images (n, S, S) uint8 and labels (n,) of each split, "train" and "test"."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, default=ROOT / "runs" / "demo")
    p.add_argument("--steps", type=int, default=STEPS, help="training steps")
    cpu = Path("/proc/cpuinfo").read_text()
    has_bf16 = "avx512_bf16" in cpu or "amx_bf16" in cpu
    p.add_argument("--precision", choices=["fp32", "bf16"], default="bf16" if has_bf16 else "fp32")
    return p


def run_script(name: str, *paths: Path, **options: Any) -> str:
    """Run one of the project's scripts as a process; returns what it printed.

    ``data_path=folder`` becomes ``--data-path folder``; True stands for a flag without a value.
    """
    arguments = [str(path) for path in paths]
    for option, value in options.items():
        values = value if isinstance(value, list) else [value]
        arguments.append(f"--{option.replace('_', '-')}")
        arguments += [str(part) for part in values if part is not True]
    print("\n$ python", name, *arguments, flush=True)
    command = [sys.executable, str(ROOT / name), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    print(process.stdout, end="", flush=True)
    return process.stdout


def make_image_folders(folder: Path) -> Images:
    """Write 1,797 handwritten digits as PNGs, one sub-folder per digit, in two splits."""
    digits = load_digits()
    splits: dict[str, list] = {"train": [], "test": []}
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "test" if i % HELD_BACK == HELD_BACK - 1 else "train"
        image = Image.fromarray((pixels * 255 / 16).astype(np.uint8))
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        path = folder / split / str(label) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        splits[split].append((np.asarray(image), label))
    images = {}
    for split, pairs in splits.items():
        pictures, labels = zip(*pairs, strict=True)
        images[split] = (np.stack(pictures), np.stack(labels))
    return images


def train(out: Path, steps: int, precision: str) -> None:
    """Extract features and train."""
    run_script(
        "extract_features.py",
        data_path=out / "images/train",
        features_path=out / "features",
        vae="pixels",
        image_size=IMAGE_SIZE,
        no_flip=True,
        num_workers=2,
    )
    run_script(
        "train_mask_adan.py",
        model="EDT-Tiny/2",
        feature_path=out / "features",
        run_dir=out / "run",
        global_batch_size=BATCH_SIZE,
        max_steps=steps,
        init_lr=3e-3,
        lr_steps=steps,
        ema_decay=0.99,
        precision=precision,
        log_every=20,
        ckpt_every=500,
        num_workers=0,
    )


def sample(out: Path, precision: str) -> list[Samples]:
    """Sample with and without AMM, with every seed, and evaluate; draw the grid of all classes."""
    sampling = {
        "ckpt": out / "run",
        "cfg_scale": CFG_SCALE,
        "num_sampling_steps": 50,
        "precision": precision,
    }
    samples = []
    for amm in ("on", "off"):
        row = Samples(f"EDT-Tiny, AMM {amm}", [], [])
        for seed in SEEDS:
            printed = run_script(
                "image_generator_ddp.py",
                **sampling,
                amm=str(amm == "on"),
                seed=seed,
                num_images=SAMPLES,
                labels="balanced",
                per_proc_batch_size=100,
                output_dir=out / "samples",
            )
            row.paths.append(Path(printed.strip().splitlines()[-1]))
            scores = out / f"scores-amm-{amm}-seed-{seed}.json"
            run_script(
                "evaluator.py", out / "images/train", row.paths[-1], features="pixels", json=scores
            )
            row.scores.append(json.loads(scores.read_text()))
        samples.append(row)
    run_script(
        "image_generator.py",
        **sampling,
        classes=list(range(CLASSES)),
        num_variations=4,
        output_dir=out / "visual",
    )
    return samples


def draw(out: Path, samples: list[Samples]) -> None:
    """Write the pictures: samples, AMM on and off from the same noise, losses.

    Args:
        out: folder of the demo.
        samples: with AMM, then without; the first file of both has at least
            ``GRID_ROWS * CLASSES`` images.
    """
    with_amm, without_amm = (
        np.load(row.paths[0])["arr_0"][: GRID_ROWS * CLASSES].reshape(
            GRID_ROWS, CLASSES, IMAGE_SIZE, IMAGE_SIZE, 3
        )
        for row in samples
    )
    # A row with AMM, then the same noise without, and so on.
    pairs = np.stack([with_amm[:AMM_ROWS], without_amm[:AMM_ROWS]], axis=1)
    pictures = {"samples.png": with_amm, "amm-on-off.png": np.concatenate(pairs)}
    for name, images in pictures.items():
        image = Image.fromarray(make_grid(torch.from_numpy(images)).numpy())
        size = (image.width * ENLARGEMENT, image.height * ENLARGEMENT)
        image.resize(size, Image.Resampling.NEAREST).save(out / name)
    plot_losses(out / "run" / "metrics.jsonl", out / "losses.png")


COLUMNS = ("distance", "precision", "recall", "% in its class")  # of the table


def score_seeds(row: Samples, classifier: SVC) -> np.ndarray:
    """The values of COLUMNS for each seed, (seeds, 4)."""
    values = []
    for path, scores in zip(row.paths, row.scores, strict=True):
        images = np.load(path)["arr_0"].mean(axis=-1)
        predicted = classifier.predict(images.reshape(len(images), -1) / 255)
        in_class = 100 * (predicted == np.load(path.with_suffix(".labels.npy"))).mean()
        distance = scores["frechet_distance"]
        values.append((distance, scores["precision"], scores["recall"], in_class))
    return np.array(values)


def report(samples: list[Samples], real: Images) -> str:
    """The table of scores, as mean and standard deviation over the seeds.

    Args:
        samples: with AMM, then without. The difference of the two is taken seed by seed, because
            equal seeds share labels and noise.
        real: the images that the demo trains on, and those that it holds back. A classifier of the
            former decides which class a sample is in.
    """
    vectors = {
        split: (images.reshape(len(images), -1) / 255, labels)
        for split, (images, labels) in real.items()
    }
    classifier = SVC().fit(*vectors["train"])
    rows = {row.name: score_seeds(row, classifier) for row in samples}
    with_amm, without_amm = rows.values()
    rows["difference"] = with_amm - without_amm
    lines = [f"{'':22}" + "".join(f"{column:>17}" for column in COLUMNS)]
    for name, values in rows.items():
        statistics = zip(values.mean(axis=0), values.std(axis=0, ddof=1), strict=True)
        cells = (f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in statistics)
        lines.append(f"{name:22}" + "".join(f"{cell:>17}" for cell in cells))
    held_back = 100 * classifier.score(*vectors["test"])
    lines.append(f"{'held-back real digits':22}{'':51}{held_back:17.3f}")
    lines.append(
        f"\nPixel space; {SAMPLES} samples for each of {len(SEEDS)} seeds; mean ± standard "
        "deviation.\nThe seeds are those of sampling, from one trained network: they do not show "
        "how much another\ntraining run would differ."
    )
    return "\n".join(lines)


def main() -> None:
    args = parser().parse_args()
    start, out = time.perf_counter(), args.out
    real = make_image_folders(out / "images")
    train(out, args.steps, args.precision)
    samples = sample(out, args.precision)
    draw(out, samples)
    print(f"\n{report(samples, real)}")
    minutes = (time.perf_counter() - start) / 60
    pictures = "samples.png, amm-on-off.png, losses.png, visual/"
    print(f"\n{minutes:.1f} minutes in {args.precision}; pictures in {out}: {pictures}")


if __name__ == "__main__":
    main()

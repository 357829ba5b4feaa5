"""The whole of EDT on real images in minutes on a CPU: features, masked training, sampling with and
without AMM, evaluation, pictures. Runs the five scripts as a user would on a folder of their own,
here scikit-learn's digits.

    make demo        # or: python tools/demo.py [--out runs/demo]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from edt.sampling.image_grid import grid
from edt.training.plots import plot_losses

ROOT = Path(__file__).resolve().parent.parent
SIZE = 16  # pixels: token grids of 8, 4 and 2
STEPS, BATCH, SAMPLES, CFG = 900, 64, 200, 3.0


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, default=ROOT / "runs" / "demo")
    p.add_argument("--steps", type=int, default=STEPS, help="training steps")
    has_bf16 = any(
        flag in Path("/proc/cpuinfo").read_text() for flag in ("avx512_bf16", "amx_bf16")
    )
    p.add_argument("--precision", choices=["fp32", "bf16"], default="bf16" if has_bf16 else "fp32")
    args = p.parse_args()
    precision = args.precision
    start, out = time.perf_counter(), args.out

    real = make_image_folders(out / "images")
    script(
        "extract_features.py",
        "--data-path",
        out / "images/train",
        "--features-path",
        out / "features",
        "--vae",
        "pixels",
        "--image-size",
        SIZE,
        "--no-flip",
        "--num-workers",
        2,
    )
    script(
        "train_mask_adan.py",
        "--model",
        "EDT-Tiny/2",
        "--feature-path",
        out / "features",
        "--run-dir",
        out / "run",
        "--global-batch-size",
        BATCH,
        "--max-steps",
        args.steps,
        "--init-lr",
        3e-3,
        "--lr-steps",
        args.steps,
        "--ema-decay",
        0.99,
        "--precision",
        precision,
        "--log-every",
        20,
        "--ckpt-every",
        500,
        "--num-workers",
        0,
    )
    sampling = (
        "--ckpt",
        out / "run",
        "--cfg-scale",
        CFG,
        "--num-sampling-steps",
        50,
        "--precision",
        precision,
    )
    rows = []
    for amm in ("True", "False"):
        printed = script(
            "image_generator_ddp.py",
            *sampling,
            "--amm",
            amm,
            "--num-images",
            SAMPLES,
            "--labels",
            "balanced",
            "--per-proc-batch-size",
            100,
            "--output-dir",
            out / "samples",
        )
        samples = Path(printed.strip().splitlines()[-1])
        scores = out / f"scores-amm-{amm.lower()}.json"
        script(
            "evaluator.py", out / "images/train", samples, "--features", "pixels", "--json", scores
        )
        rows.append(
            (
                f"EDT-Tiny, AMM {'on' if amm == 'True' else 'off'}",
                samples,
                json.loads(scores.read_text()),
            )
        )
    script(
        "image_generator.py",
        *sampling,
        "--classes",
        *range(10),
        "--num-variations",
        4,
        "--output-dir",
        out / "visual",
    )

    draw(out, rows)
    report(rows, real, time.perf_counter() - start, precision, out)


def script(name: str, *arguments) -> str:
    """Run one of the project's scripts as a process; returns what it printed."""
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    print("\n$ python", " ".join([name, *map(str, arguments)]), flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    print(done.stdout, end="", flush=True)
    return done.stdout


def make_image_folders(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """1,797 handwritten digits as PNGs, one sub-folder a digit, a fifth held back; returns {split:
    (images, labels)}.
    """
    digits = load_digits()
    splits: dict[str, list] = {"train": [], "test": []}
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "test" if i % 5 == 4 else "train"
        image = Image.fromarray((pixels * 255 / 16).astype(np.uint8)).resize(
            (SIZE, SIZE), Image.Resampling.BICUBIC
        )
        path = folder / split / str(label) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        splits[split].append((np.asarray(image), label))
    return {
        split: tuple(map(np.stack, zip(*pairs, strict=True))) for split, pairs in splits.items()
    }


def draw(out: Path, rows: list) -> None:
    """The PNGs: samples, AMM on and off from the same noise, losses."""
    on, off = (
        np.load(samples)["arr_0"][:80].reshape(8, 10, SIZE, SIZE, 3) for _, samples, _ in rows
    )
    pictures = {
        "samples.png": on,
        "amm-on-off.png": np.stack([on[:3], off[:3]], axis=1).reshape(6, 10, SIZE, SIZE, 3),
    }
    for name, images in pictures.items():
        image = Image.fromarray(grid(torch.from_numpy(images)).numpy())
        image.resize((image.width * 3, image.height * 3), Image.Resampling.NEAREST).save(out / name)
    plot_losses(out / "run" / "metrics.jsonl", out / "losses.png")


def report(rows: list, real: dict, seconds: float, precision: str, out: Path) -> None:
    """The table."""
    flat = {
        split: (images.reshape(len(images), -1) / 255, labels)
        for split, (images, labels) in real.items()
    }
    classifier = SVC().fit(*flat["train"])
    print(
        f"\n{'':24}{'distance':>10}{'precision':>11}{'recall':>8}{'in its class':>14}    (pixel space, {SAMPLES} samples)"
    )
    for name, samples, scores in rows:
        images = np.load(samples)["arr_0"].mean(axis=-1).reshape(SAMPLES, -1) / 255
        share = (classifier.predict(images) == np.load(samples.parent / "labels.npy")).mean()
        print(
            f"{name:24}{scores['frechet_distance']:10.3f}{scores['precision']:11.3f}{scores['recall']:8.3f}{share:13.1%}"
        )
    print(f"{'held-back real digits':24}{'':29}{classifier.score(*flat['test']):13.1%}")
    print(
        f"\n{seconds / 60:.1f} minutes in {precision}; pictures in {out}: samples.png, amm-on-off.png, losses.png, visual/"
    )


if __name__ == "__main__":
    main()

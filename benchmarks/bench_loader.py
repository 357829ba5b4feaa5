"""How fast features are read: the packed and the per-file layout in one run, and the memory it takes.

    python benchmarks/bench_loader.py --count 200000

One process, one thread, page cache warm where it fits: latents of (4, 32, 32) in batches of 256, in the order of training.
"""

import argparse
import json
import platform
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from edt.extraction import ExtractionConfig
from edt.features import FEATURES, LABELS, open_features, sample_posterior
from edt.randomness import generator
from edt.train import BatchIndices

SHAPE, BATCH = (4, 32, 32), 256


def write_packed(folder: Path, count: int, draw: str) -> None:
    """Random features in the packed layout."""
    shape, dtype = (SHAPE, "float32") if draw == "once" else ((2, 8, 32, 32), "float16")
    folder.mkdir()
    rng, shards = np.random.default_rng(0), []
    for start in range(0, count, ExtractionConfig.shard_size):
        rows = min(ExtractionConfig.shard_size, count - start)
        file = f"shard-{len(shards):05d}.npy"
        np.save(folder / file, rng.standard_normal((rows, *shape), dtype=np.float32).astype(dtype))
        shards.append({"file": file, "start": start, "count": rows})
    np.save(folder / "labels.npy", rng.integers(0, 1000, count))
    manifest = {"count": count, "shape": shape, "dtype": dtype, "draw": draw, "shards": shards}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def write_npy(folder: Path, count: int) -> None:
    for kind in (FEATURES, LABELS):
        (folder / kind).mkdir(parents=True)
    row, label = np.zeros((1, *SHAPE), np.float32), np.zeros(1, np.int64)
    for i in range(count):
        np.save(folder / FEATURES / f"{i}.npy", row)
        np.save(folder / LABELS / f"{i}.npy", label)


def samples_per_sec(folder: Path, seconds: float) -> float:
    """Read for some seconds after a warm-up, posterior sampling included where there is one."""
    features = open_features(folder)
    done, start = 0, None
    for step, batch in enumerate(BatchIndices(len(features), 0, BATCH, slice(0, BATCH))):
        stored, _ = features[batch]
        if features.fresh:
            noise = torch.randn((BATCH, *SHAPE), generator=generator(0, "posterior", step))
            sample_posterior(stored, noise)
        if step == 20:
            start = time.perf_counter()
        elif step > 20:
            done += BATCH
            if time.perf_counter() - start > seconds:
                return done / (time.perf_counter() - start)
    raise AssertionError("the indices never end")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--count", type=int, default=200_000)
    p.add_argument("--seconds", type=float, default=5.0, help="of reading, for each layout")
    p.add_argument("--folder", type=Path, help="where the features are made and removed; default: the temporary folder")
    args = p.parse_args()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        rates = {}
        for name, write in (
            ("packed, once", lambda folder: write_packed(folder, args.count, "once")),
            ("packed, fresh", lambda folder: write_packed(folder, args.count, "fresh")),
            ("npy, once", lambda folder: write_npy(folder, args.count)),
        ):
            folder = root / name.replace(", ", "-")
            write(folder)
            rates[name] = samples_per_sec(folder, args.seconds)
            peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(f"{name:14} {rates[name]:10.0f} samples/s   peak memory so far {peak_gib:.2f} GiB", flush=True)
            shutil.rmtree(folder)
        print(f"packed over npy, one draw: {rates['packed, once'] / rates['npy, once']:.1f} x")
        machine = platform.processor() or platform.machine()
        print(f"{args.count} latents of {SHAPE}; one thread; {machine}, torch {torch.__version__}, numpy {np.__version__}")
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()

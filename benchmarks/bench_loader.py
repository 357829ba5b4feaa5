"""How fast features are read: the packed and the per-file layout in one run, and the memory it
takes.

    python benchmarks/bench_loader.py --count 200000        # 14 GiB of disk for a while

One thread, page cache warm where it fits: latents of (4, 32, 32) in batches of 256, in the order of
training. The rows are measured in turn, each time in a process of its own; prints their medians.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from edt.data.extraction import ExtractionConfig
from edt.data.features import FEATURES, LABELS, open_features, sample_posterior
from edt.training.trainer import BatchIndices
from edt.utils.randomness import generator

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


class ReleaseDataset(torch.utils.data.Dataset):
    """The npy layout as the release reads it: both files of one sample at a time, put together by
    the default collate.
    """

    def __init__(self, folder: Path):
        self.folders = [folder / kind for kind in (FEATURES, LABELS)]
        self.names = sorted(os.listdir(self.folders[0]))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.from_numpy(np.load(folder / self.names[i])) for folder in self.folders)


def read(folder: Path) -> Iterator:
    """Batches as training gets them, posterior sampling included where there is one; without
    end.
    """
    features = open_features(folder)
    for step, batch in enumerate(BatchIndices(len(features), 0, BATCH, slice(0, BATCH))):
        stored, labels = features[batch]
        if features.fresh:
            noise = torch.randn((BATCH, *SHAPE), generator=generator(0, "posterior", step))
            stored = sample_posterior(stored, noise)
        yield stored, labels


def read_as_the_release(folder: Path) -> Iterator:
    loader = torch.utils.data.DataLoader(
        ReleaseDataset(folder), BATCH, shuffle=True, drop_last=True
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


ROWS = {  # what is read: its folder, and how
    "packed, once": ("once", read),
    "packed, fresh": ("fresh", read),
    "npy, once": ("npy", read),
    "npy, once, as the release reads it": ("npy", read_as_the_release),
}


def measure(
    folder: Path, read: Callable[[Path], Iterator], seconds: float
) -> tuple[float, float, float]:
    """Samples a second after a warm-up of the same length; GiB of the process's own memory and of
    mapped files.
    """
    torch.set_num_threads(1)
    batches = read(folder)
    for _ in range(2):
        done, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            next(batches)
            done += BATCH
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped = (int(status[name].split()[0]) / 2**20 for name in ("RssAnon", "RssFile"))
    return done / elapsed, own, mapped


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--count", type=int, default=200_000)
    p.add_argument(
        "--seconds", type=float, default=5.0, help="of warm-up, and again of measuring, each time"
    )
    p.add_argument("--repeats", type=int, default=5, help="each of all rows in turn")
    p.add_argument(
        "--folder",
        type=Path,
        help="where the features are made and removed; default: the temporary folder",
    )
    args = p.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as root:
        for draw in ("once", "fresh"):
            write_packed(Path(root) / draw, args.count, draw)
        write_npy(Path(root) / "npy", args.count)
        measured = {row: [] for row in ROWS}
        for _ in range(args.repeats):
            for row, (folder, how) in ROWS.items():
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh_process:
                    measured[row].append(
                        fresh_process.submit(
                            measure, Path(root) / folder, how, args.seconds
                        ).result()
                    )
    medians = {
        row: [statistics.median(column) for column in zip(*values, strict=True)]
        for row, values in measured.items()
    }
    print(
        "| | samples/s (least, most) | packed, once over it | own memory, GiB | mapped files, GiB |\n|---|---|---|---|---|"
    )
    for row, (rate, own, mapped) in medians.items():
        least, most = min(measured[row])[0], max(measured[row])[0]
        ratio = medians["packed, once"][0] / rate
        print(
            f"| {row} | {rate:,.0f} ({least:,.0f}, {most:,.0f}) | {ratio:.1f} x | {own:.2f} | {mapped:.2f} |"
        )
    machine = platform.processor() or platform.machine()
    print(
        f"\n{args.count:,} latents of {SHAPE}, batches of {BATCH}; median of {args.repeats}; one thread of {os.cpu_count()} cores, "
        f"{machine}; torch {torch.__version__}, numpy {np.__version__}"
    )


if __name__ == "__main__":
    main()

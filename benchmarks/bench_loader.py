"""How fast features are read, in the packed and in the npy layout, and how much memory this takes.

    python benchmarks/bench_loader.py --count 200000        # 14 GiB of disk while it runs

One thread reads latents of (4, 32, 32) in batches of 256, in the order of training. The page cache
is warm as far as the files fit into it. Every round measures each row once, in a process of its
own; the table shows the medians.
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
from typing import Any, NamedTuple

import numpy as np
import torch

from edt.data.batches import BatchIndices
from edt.data.extraction import ExtractionConfig
from edt.data.features import (
    FEATURES_FOLDER,
    LABELS_FILE,
    LABELS_FOLDER,
    MANIFEST_FILE,
    Batch,
    DrawMode,
    open_features,
    sample_posterior,
)
from edt.utils.randomness import generator

LATENT_SHAPE, BATCH_SIZE = (4, 32, 32), 256
GIB_PER_KIB = 2**-20


def write_packed(folder: Path, count: int, draw: DrawMode) -> None:
    """Write random features in the packed layout."""
    shape: tuple[int, ...] = LATENT_SHAPE
    dtype = "float32"
    if draw == "fresh":
        shape, dtype = (2, 8, 32, 32), "float16"
    folder.mkdir()
    rng = np.random.default_rng(0)
    shards: list[dict[str, Any]] = []
    for start in range(0, count, ExtractionConfig.shard_size):
        rows = min(ExtractionConfig.shard_size, count - start)
        file = f"shard-{len(shards):05d}.npy"
        np.save(folder / file, rng.standard_normal((rows, *shape), dtype=np.float32).astype(dtype))
        shards.append({"file": file, "start": start, "count": rows})
    np.save(folder / LABELS_FILE, rng.integers(0, 1000, count))
    manifest = {"count": count, "shape": shape, "dtype": dtype, "draw": draw, "shards": shards}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))


def write_npy(folder: Path, count: int) -> None:
    """Write features of zeros in the release's layout."""
    for kind in (FEATURES_FOLDER, LABELS_FOLDER):
        (folder / kind).mkdir(parents=True)
    latent, label = np.zeros((1, *LATENT_SHAPE), np.float32), np.zeros(1, np.int64)
    for i in range(count):
        np.save(folder / FEATURES_FOLDER / f"{i}.npy", latent)
        np.save(folder / LABELS_FOLDER / f"{i}.npy", label)


class ReleaseDataset(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The npy layout as the release reads it: the two files of one image at a time. torch's default
    collation joins them to batches.
    """

    def __init__(self, folder: Path):
        self.features, self.labels = folder / FEATURES_FOLDER, folder / LABELS_FOLDER
        self.names = sorted(os.listdir(self.features))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        latent = np.load(self.features / self.names[i])
        label = np.load(self.labels / self.names[i])
        return torch.from_numpy(latent), torch.from_numpy(label)


def read(folder: Path) -> Iterator[Batch]:
    """Batches as training gets them, without end. Fresh features are sampled, as training does."""
    features = open_features(folder)
    indices = BatchIndices(len(features), 0, BATCH_SIZE, slice(0, BATCH_SIZE))
    for step, selection in enumerate(indices):
        batch = features[selection]
        if features.fresh:
            noise = torch.randn(
                (BATCH_SIZE, *LATENT_SHAPE), generator=generator(0, "posterior", step)
            )
            batch = batch._replace(stored=sample_posterior(batch.stored, noise))
        yield batch


def read_as_the_release(folder: Path) -> Iterator[Any]:
    """Batches of the release's data set, epoch after epoch."""
    loader = torch.utils.data.DataLoader(
        ReleaseDataset(folder), BATCH_SIZE, shuffle=True, drop_last=True
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


# Name of a row -> the folder that it reads, and how.
ROWS: dict[str, tuple[str, Callable[[Path], Iterator[Any]]]] = {
    "packed, once": ("once", read),
    "packed, fresh": ("fresh", read),
    "npy, once": ("npy", read),
    "npy, once, as the release reads it": ("npy", read_as_the_release),
}


class Measurement(NamedTuple):
    """One measurement of a row, or the medians of several."""

    samples_per_second: float
    own_memory: float  # GiB, of the process itself
    mapped_files: float  # GiB in memory


def measure(
    folder: Path, read_folder: Callable[[Path], Iterator[Any]], seconds: float
) -> Measurement:
    """Read for ``seconds`` after a warm-up of the same length."""
    torch.set_num_threads(1)
    batches = read_folder(folder)
    for _ in range(2):  # the warm-up is overwritten
        samples, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            next(batches)
            samples += BATCH_SIZE
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped = (int(status[name].split()[0]) * GIB_PER_KIB for name in ("RssAnon", "RssFile"))
    return Measurement(samples / elapsed, own, mapped)


def measure_rows(root: Path, seconds: float, repeats: int) -> dict[str, list[Measurement]]:
    """All measurements of every row. The rows take turns, so that a slow minute of the machine
    affects all of them.
    """
    measurements: dict[str, list[Measurement]] = {row: [] for row in ROWS}
    for _ in range(repeats):
        for row, (folder, read_folder) in ROWS.items():
            # A new process, since memory that an earlier row used would be counted too.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                future = process.submit(measure, root / folder, read_folder, seconds)
                measurements[row].append(future.result())
    return measurements


def print_table(measurements: dict[str, list[Measurement]]) -> None:
    """Print a row of medians per row of ``ROWS``, in Markdown."""
    medians = {
        row: Measurement(*(statistics.median(column) for column in zip(*values, strict=True)))
        for row, values in measurements.items()
    }
    print(
        "| | samples/s (least, most) | packed, once over it | own memory, GiB "
        "| mapped files, GiB |\n|---|---|---|---|---|"
    )
    for row, median in medians.items():
        rates = [measurement.samples_per_second for measurement in measurements[row]]
        ratio = medians["packed, once"].samples_per_second / median.samples_per_second
        print(
            f"| {row} | {median.samples_per_second:,.0f} ({min(rates):,.0f}, {max(rates):,.0f}) "
            f"| {ratio:.1f} x | {median.own_memory:.2f} | {median.mapped_files:.2f} |"
        )


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--count", type=int, default=200_000, help="images (default: %(default)s)")
    p.add_argument(
        "--seconds",
        type=float,
        default=5.0,
        help="length of each warm-up and of each measurement (default: %(default)s)",
    )
    p.add_argument(
        "--repeats", type=int, default=5, help="measurements per row (default: %(default)s)"
    )
    p.add_argument(
        "--folder",
        type=Path,
        help="where the features are made, and removed at the end; default: the temporary folder",
    )
    args = p.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        root = Path(name)
        write_packed(root / "once", args.count, "once")
        write_packed(root / "fresh", args.count, "fresh")
        write_npy(root / "npy", args.count)
        measurements = measure_rows(root, args.seconds, args.repeats)
    print_table(measurements)
    machine = platform.processor() or platform.machine()
    print(
        f"\n{args.count:,} latents of {LATENT_SHAPE}, batches of {BATCH_SIZE}; median of "
        f"{args.repeats}; one thread of {os.cpu_count()} cores, {machine}; "
        f"torch {torch.__version__}, numpy {np.__version__}"
    )


if __name__ == "__main__":
    main()

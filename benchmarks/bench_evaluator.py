"""Time and memory of the evaluator: complete runs with each backend, and single statistics.

    python benchmarks/bench_evaluator.py images --count 2000 --backends torch tensorflow
    python benchmarks/bench_evaluator.py statistics --reference 10000 --samples 50000

Every measurement is a process of its own. So its peak memory is its own, and the threads of one
library do not disturb another. CPU time is printed beside wall-clock time, because other load on
the machine affects CPU time less. Without --inception the network has random weights. Its scores
mean nothing then, but its arithmetic is the same.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "metrics")]

import inception_graph  # noqa: E402
from evaluation_helpers import structured_images  # noqa: E402

from edt.metrics import (  # noqa: E402
    Backend,
    StreamingMoments,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from edt.utils.choices import choices  # noqa: E402

STATISTICS = ("moments", "frechet", "precision_recall_adm", "precision_recall_exact", "kid")


def bench_images(args: argparse.Namespace) -> None:
    """Run ``evaluator.py`` on twice ``count`` images, with the backends in turn."""
    with tempfile.TemporaryDirectory() as folder:
        reference, samples, graph = (Path(folder) / name for name in ("r.npz", "s.npz", "g.pb"))
        for seed, path in enumerate((reference, samples)):
            np.savez(path, structured_images(seed, args.count, args.side))
        if not args.inception:
            graph.write_bytes(inception_graph.random_graph(0))
        command = [sys.executable, ROOT / "evaluator.py", reference, samples]
        command += ["--inception", args.inception or graph, "--device", args.device]
        for backend in args.backends * args.repeats:
            run_evaluator([*command, "--backend", backend], backend)


def run_evaluator(command: list, backend: str) -> None:
    """Run a command; print its time, its peak memory and its scores."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    scores = process.stdout.read().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"{backend} failed")
    cpu_seconds = usage.ru_utime + usage.ru_stime
    print(f"{backend}: {seconds:.0f} s, {cpu_seconds:.0f} s of CPU, {gib(usage):.2f} GiB peak")
    print("    " + ", ".join(scores), flush=True)


def bench_statistics(args: argparse.Namespace) -> None:
    """Compute each statistic of synthetic pool features in a process of its own."""
    for statistic in args.only:
        child = os.fork()
        if child == 0:
            run_statistic(statistic, args.reference, args.samples, args.device)
            os._exit(0)
        _, status, usage = os.wait4(child, 0)
        result = f"{gib(usage):.2f} GiB peak" if status == 0 else f"failed ({status})"
        print(f"    {result}", flush=True)


def run_statistic(statistic: str, reference_count: int, sample_count: int, device: str) -> None:
    reference, samples = synthetic_features(1, reference_count), synthetic_features(2, sample_count)
    start, cpu_start = time.perf_counter(), time.process_time()
    if statistic == "moments":
        streaming = StreamingMoments(2048, device)
        for row in range(0, len(samples), 64):
            streaming.update(samples[row : row + 64])
        value = streaming.moments().covariance.trace()
    elif statistic == "frechet":
        mean = np.zeros(2048)
        covariances = [x[:5000].T @ x[:5000] / 5000 for x in (reference, samples)]
        value = frechet_distance(mean, covariances[0], mean, covariances[1])
    elif statistic == "kid":
        value = kernel_distance(reference, samples, device=device)
    else:
        mode = statistic.removeprefix("precision_recall_")
        value = precision_recall(reference, samples, mode=mode, device=device)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    print(f"{statistic}: {seconds:.1f} s, {cpu_seconds:.1f} s of CPU ({value})", flush=True)


def synthetic_features(seed: int, count: int) -> np.ndarray:
    """Non-negative float32 (count, 2048) with a few strong directions.

    They are made in pieces, so that float64 temporaries do not set the peak memory.
    """
    basis = np.random.default_rng(0).standard_normal((16, 2048), dtype=np.float32)
    r = np.random.default_rng(seed)
    features = np.empty((count, 2048), np.float32)
    for piece in np.array_split(features, max(count // 1000, 1)):
        mixed = r.standard_normal((len(piece), 16), dtype=np.float32) @ basis
        noise = r.standard_normal(piece.shape, dtype=np.float32)
        piece[:] = np.abs(np.float32(0.1) * mixed + np.float32(0.3) + np.float32(0.1) * noise)
    return features


def gib(usage: resource.struct_rusage) -> float:
    return usage.ru_maxrss / 2**20  # Linux counts in KiB


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    images = commands.add_parser("images")
    images.add_argument("--count", type=int, default=2000, help="images on each side")
    images.add_argument("--side", type=int, default=256, help="pixels")
    backends = choices(Backend)
    images.add_argument("--backends", nargs="+", choices=backends, default=list(backends))
    images.add_argument("--repeats", type=int, default=1)
    images.add_argument("--inception", type=Path)
    images.set_defaults(run=bench_images)
    statistics = commands.add_parser("statistics")
    statistics.add_argument("--reference", type=int, default=10_000, help="images")
    statistics.add_argument("--samples", type=int, default=50_000, help="images")
    statistics.add_argument("--only", nargs="+", choices=STATISTICS, default=STATISTICS)
    statistics.set_defaults(run=bench_statistics)
    for command in (images, statistics):
        command.add_argument("--device", default="cpu")
    args = parser.parse_args()
    threads = os.environ.get("OMP_NUM_THREADS", "default")
    print(f"{platform.machine()}, {os.cpu_count()} cores, OMP_NUM_THREADS={threads}", flush=True)
    args.run(args)


if __name__ == "__main__":
    main()

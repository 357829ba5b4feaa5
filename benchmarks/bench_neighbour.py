"""Training on a CPU alone and beside one busy process, by how long OpenMP's threads spin.

    python benchmarks/bench_neighbour.py --json
    python benchmarks/bench_neighbour.py --model EDT-S/2 --batch-size 8 --input-size 32 --json

The row "reference" has the default of OpenMP, the row "edt" that of the scripts (edt/cli). Each
timing is a process of its own, since OpenMP reads its settings once. The rows take turns.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = "reference"  # the row with the default of OpenMP


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add("--model", default="EDT-Tiny/2")
    add("--batch-size", type=int, default=64)
    add("--input-size", type=int, default=16, help="side of the latent")
    add("--in-channels", type=int, default=3, help="of the latent")
    add("--precision", default="bf16")
    add("--steps", type=int, default=30, help="timed steps of a process")
    add("--repeats", type=int, default=3, help="processes for each figure")
    add("--spincounts", nargs="*", default=[], help="more rows, with these values")
    add("--json", nargs="?", const="", metavar="FILE", help="keep the result")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return p


def train(args: argparse.Namespace) -> float:
    """Images per second of this process."""
    import torch
    from accelerate import Accelerator

    from edt.data.features import Batch
    from edt.registry import create_model
    from edt.training.config import TrainConfig
    from edt.training.trainer import Trainer

    config = TrainConfig(global_batch_size=args.batch_size, precision=args.precision)
    shape = (args.in_channels, args.input_size, args.input_size)
    model = create_model(
        args.model, input_size=args.input_size, in_channels=args.in_channels, num_classes=10
    )
    trainer = Trainer(model, config, Accelerator(cpu=True))
    batch = Batch(torch.randn(args.batch_size, *shape), torch.randint(10, (args.batch_size,)))
    for _ in range(3):
        trainer.train_step(batch)
    start = time.perf_counter()
    for _ in range(args.steps):
        trainer.train_step(batch)
    return args.steps * args.batch_size / (time.perf_counter() - start)


def run_worker(environment: dict[str, str], code: str) -> float:
    """Images per second of a new process that runs ``code`` first."""
    command = [sys.executable, "-c", f"{code}; import bench_neighbour as b; b.main()"]
    command += ["--worker", *sys.argv[1:]]
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
    run = subprocess.run(
        command, env=environment | paths, check=True, stdout=subprocess.PIPE, text=True
    )
    return float(run.stdout.splitlines()[-1])


def measure_row(row: str, has_neighbour: bool) -> float:
    """One figure of a row, images per second."""
    environment = dict(os.environ)
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        environment.pop(name, None)
    if row.isdigit():
        environment["GOMP_SPINCOUNT"] = row
    neighbour = None
    if has_neighbour:
        neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        return run_worker(environment, "import edt.cli" if row == "edt" else "pass")
    finally:
        if neighbour is not None:
            neighbour.kill()
            neighbour.wait()


def main() -> None:
    args = parser().parse_args()
    if args.worker:
        print(train(args))
        return
    names = [REFERENCE, "edt", *args.spincounts]
    figures: dict[str, dict[str, list[float]]] = {
        name: {"alone": [], "beside": []} for name in names
    }
    for _ in range(args.repeats):
        for name in names:
            for place, has_neighbour in (("alone", False), ("beside", True)):
                figures[name][place].append(measure_row(name, has_neighbour))
    rows: dict[str, dict[str, Any]] = {}
    for name, places in figures.items():
        alone, beside = (statistics.median(places[place]) for place in ("alone", "beside"))
        rows[name] = {
            "images_per_sec_alone": alone,
            "images_per_sec_beside": beside,
            "slowdown_beside": alone / beside,
        }
    for name, row in rows.items():
        row["alone_relative_to_reference"] = (
            row["images_per_sec_alone"] / rows[REFERENCE]["images_per_sec_alone"]
        )
        print(f"{name:12}" + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    import measure  # loads torch, which a worker must not do before edt.cli
    import torch

    size = args.model.split("/")[0]
    result = {**measure.origin(torch.device("cpu")), "rows": rows}
    measure.save(f"neighbour-{size}", args, result)


if __name__ == "__main__":
    main()

"""What the speed benchmarks share: rows timed in turn in one run, what they ran on, dated result
files.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument(
        "--json",
        nargs="?",
        const="",
        metavar="FILE",
        help="keep the result; default: a dated file in results/",
    )


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(
    rows: dict[str, Callable], repeats: int, device: torch.device, warm_up: int = 1
) -> dict[str, dict]:
    """Seconds of each row's calls, the rows taking turns so that a busy machine is busy for all;
    and what a call takes at its peak above what is resident, which is the state of all rows."""
    seconds, memory = {name: [] for name in rows}, {name: 0.0 for name in rows}
    for turn in range(-warm_up, repeats):
        for name, call in rows.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                resident = torch.cuda.memory_allocated(device)
            wait(device)
            start = time.perf_counter()
            call()
            wait(device)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
            if device.type == "cuda":
                memory[name] = (torch.cuda.max_memory_allocated(device) - resident) / 2**30
    return {
        name: {
            "median_sec": statistics.median(each),
            "fastest_sec": min(each),
            "repeats": repeats,
            "peak_memory_gib": memory[name] if device.type == "cuda" else None,
        }
        for name, each in seconds.items()
    }


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of ``exact``."""
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


def machine(device: torch.device) -> dict:
    """Hardware and versions."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next(
        (line.partition(": ")[2] for line in cpu.splitlines() if line.startswith("model name")),
        platform.machine(),
    )
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else model,
        "cpu_threads": torch.get_num_threads(),
        "avx512_bf16": "avx512_bf16" in cpu,
        "load_average": os.getloadavg()[0],
        "process_peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "triton": _triton_version() if device.type == "cuda" else None,
        "python": platform.python_version(),
    }


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def finish(
    name: str,
    args: argparse.Namespace,
    device: torch.device,
    rows: dict[str, dict],
    gates: dict[str, float],
) -> None:
    """Print the rows and, if asked, keep them; ``rows[...]["ratio"]`` is against the row
    "reference".
    """
    for row in rows.values():
        row["ratio"] = rows["reference"]["median_sec"] / row["median_sec"]
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    result = {
        "benchmark": name,
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": machine(device),
        "rows": rows,
        "gates": gates,
    }
    for label, row in rows.items():
        print(
            f"{label:34}"
            + "  ".join(
                f"{key} {round(value, 4)}" for key, value in row.items() if value is not None
            )
        )
    print("correctness", json.dumps({gate: float(f"{value:.2g}") for gate, value in gates.items()}))
    print(json.dumps(result["machine"]))
    if args.json is not None:
        path = Path(args.json) if args.json else RESULTS / f"{result['date']}-{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(path)

"""Shared by the speed benchmarks: rows timed in turn, the machine, dated files of results."""

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
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --device and --json."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--json",
        nargs="?",
        const="",
        metavar="FILE",
        help="keep the result; default: a dated file in results/",
    )


def kind(device: torch.device) -> str:
    """Kind of a device, gpu or cpu, for the names of benchmarks."""
    return "gpu" if device.type == "cuda" else "cpu"


def wait(device: torch.device) -> None:
    """Wait until a GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(
    rows: dict[str, Callable[[], Any]], repeats: int, device: torch.device, warm_up: int = 1
) -> dict[str, dict[str, Any]]:
    """Time each row's calls and, on a GPU, measure the peak memory of a call.

    The rows take turns, so that other load on the machine affects all rows alike. Peak memory is
    the increase over the memory allocated before the call, which holds the models of all rows.

    Args:
        rows: what is called, by name.
        repeats: timed calls of each row.
        device: where the calls compute.
        warm_up: calls of each row before the timed ones.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    memory_gib: dict[str, float | None] = {name: None for name in rows}
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
                memory_gib[name] = (torch.cuda.max_memory_allocated(device) - resident) / 2**30
    return {
        name: {
            "median_sec": statistics.median(row_seconds),
            "fastest_sec": min(row_seconds),
            "repeats": repeats,
            "peak_memory_gib": memory_gib[name],
        }
        for name, row_seconds in seconds.items()
    }


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of ``exact``."""
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    cpu_info = Path("/proc/cpuinfo")
    cpu = cpu_info.read_text() if cpu_info.exists() else ""
    cpu_names = [
        line.partition(": ")[2] for line in cpu.splitlines() if line.startswith("model name")
    ]
    cpu_name = cpu_names[0] if cpu_names else platform.machine()
    is_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_gpu else cpu_name,
        "cpu_threads": torch.get_num_threads(),
        "avx512_bf16": "avx512_bf16" in cpu,
        "load_average": os.getloadavg()[0],
        "process_peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if is_gpu else None,
        "triton": _triton_version() if is_gpu else None,
        "python": platform.python_version(),
    }


def origin(device: torch.device) -> dict[str, Any]:
    """Command, date and machine of a result."""
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": machine(device),
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
    rows: dict[str, dict[str, Any]],
    gates: dict[str, float],
) -> None:
    """Print the rows and, with --json, write them to a file.

    Args:
        name: of the benchmark.
        args: has what :func:`add_arguments` added.
        device: where the rows computed.
        rows: of :func:`in_turn`; each gets its "ratio" to the row "reference".
        gates: errors that were checked, by name.
    """
    for row in rows.values():
        row["ratio"] = rows["reference"]["median_sec"] / row["median_sec"]
    result = {"benchmark": name, **origin(device), "rows": rows, "gates": gates}
    for label, row in rows.items():
        values = [f"{key} {round(value, 4)}" for key, value in row.items() if value is not None]
        print(f"{label:34}{'  '.join(values)}")
    print("correctness", json.dumps({gate: float(f"{error:.2g}") for gate, error in gates.items()}))
    save(name, args, result)


def save(name: str, args: argparse.Namespace, result: dict[str, Any]) -> None:
    """With --json, write a result that has "date" and "machine" to a file."""
    print(json.dumps(result["machine"]))
    if args.json is not None:
        path = Path(args.json) if args.json else RESULTS / f"{result['date']}-{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(path)

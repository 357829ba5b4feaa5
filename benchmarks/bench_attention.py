"""Time, memory and error of attention, forward and with gradients: the release's arithmetic against
this project's.

    python benchmarks/bench_attention.py
    python benchmarks/bench_attention.py --images 64 --heads 18 --tokens 1024 --json attention.json

By default at EDT-S's 256-token stage and 256 images, in bf16, on a GPU; without one, the paths that
a CPU has, at fewer images. One call of each path in turn, over and over, so that a change of clocks
touches all alike; medians. The paths:

    released   plain attention in float32, TF32 products where the device has them plain
    edt.nn.attention.attention in --dtype, bias in float32 sdpa       torch's
    scaled_dot_product_attention with the bias as its mask, in --dtype; heads are padded with zeros
               to a multiple of 8, without which no fused kernel takes them
    triton     edt.nn.attention_triton.triton_attention

TFLOP/s are those of the definition: 4 B H N^2 d forward, 12 with gradients. Errors are relative to
float32 without TF32; above 2e-2 the exit code is 1. Memory is what a call allocates at its peak,
its inputs left out."""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from measure import machine  # noqa: E402

from edt.nn.attention import attention  # noqa: E402
from edt.nn.precision import allow_tf32  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HEAD_WIDTH = 52
WORST = 2e-2


def sdpa(qkv: Tensor, bias: Tensor) -> Tensor:
    width = qkv.shape[-1]
    q, k, v = F.pad(qkv, (0, -width % 8)).permute(2, 0, 3, 1, 4)
    mask = bias.to(qkv.dtype).expand(len(qkv), -1, -1, -1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=width**-0.5)
    return out[..., :width].transpose(1, 2).flatten(2)


def paths(dtype: torch.dtype) -> dict[str, tuple[Callable, torch.dtype]]:
    """Name -> function of (qkv, bias), dtype of qkv."""
    plain = functools.partial(attention, path="reference")
    found = {"released": (plain, torch.float32), "plain": (plain, dtype), "sdpa": (sdpa, dtype)}
    if CUDA:
        from edt.nn.attention_triton import triton_attention

        found["triton"] = (triton_attention, dtype)
    return found


class Case:
    """One path with its inputs."""

    def __init__(self, function: Callable, qkv: Tensor, bias: Tensor, grad_out: Tensor):
        self.function = function
        self.leaves = qkv.clone().requires_grad_(), bias.clone().requires_grad_()
        self.grad_out = grad_out

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.function(*self.leaves)

    def gradients(self) -> tuple[Tensor, ...]:
        out = self.function(*self.leaves)
        return out.detach(), *torch.autograd.grad(out, self.leaves, self.grad_out)


def measure(call: Callable) -> float:
    """Milliseconds of one call."""
    if not CUDA:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_memory(call: Callable) -> float | None:
    """MiB; None on a CPU, which does not tell."""
    if not CUDA:
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def relative_errors(case: Case, exact: tuple[Tensor, ...]) -> dict[str, float]:
    got = zip(("out", "grad_qkv", "grad_bias"), case.gradients(), exact, strict=True)
    return {
        name: float((tensor.float() - truth).norm() / truth.norm()) for name, tensor, truth in got
    }


def run(args: argparse.Namespace) -> dict[str, dict]:
    """One row per path."""
    torch.manual_seed(0)
    qkv = torch.randn(args.images, args.tokens, 3, args.heads, HEAD_WIDTH, device=DEVICE)
    # Rounded first, so that the dtype of the inputs is no error of a path.
    qkv = qkv.to(DTYPES[args.dtype]).float()
    bias = torch.randn(args.heads, args.tokens, args.tokens, device=DEVICE)
    grad_out = (
        torch.randn(args.images, args.tokens, args.heads * HEAD_WIDTH, device=DEVICE)
        .to(DTYPES[args.dtype])
        .float()
    )
    allow_tf32("fp32")
    exact = Case(attention, qkv, bias, grad_out).gradients()
    allow_tf32("tf32")
    cases = {
        name: Case(function, qkv.to(dtype), bias, grad_out.to(dtype))
        for name, (function, dtype) in paths(DTYPES[args.dtype]).items()
    }
    rows = {name: {"relative_error": relative_errors(case, exact)} for name, case in cases.items()}
    del exact
    operations = 4 * args.images * args.heads * args.tokens**2 * HEAD_WIDTH
    for part, factor in (("forward", 1), ("gradients", 3)):
        calls = {name: getattr(case, part) for name, case in cases.items()}
        times = {name: [] for name in calls}
        for repeat in range(args.warmup + args.repeats):
            for name, call in calls.items():
                milliseconds = measure(call)
                if repeat >= args.warmup:
                    times[name].append(milliseconds)
        for name, call in calls.items():
            median = statistics.median(times[name])
            rows[name][part] = {
                "milliseconds": median,
                "teraflops": factor * operations / median / 1e9,
                "mebibytes": peak_memory(call),
                "times_released": statistics.median(times["released"]) / median,
            }
    return rows


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--images", type=int, default=256 if CUDA else 8)
    p.add_argument("--heads", type=int, default=6)
    p.add_argument("--tokens", type=int, default=256)
    p.add_argument("--dtype", choices=DTYPES, default="bf16")
    p.add_argument("--warmup", type=int, default=10 if CUDA else 2)
    p.add_argument("--repeats", type=int, default=100 if CUDA else 10)
    p.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    return p


def main() -> int:
    args = parser().parse_args()
    about = {
        **machine(torch.device(DEVICE)),
        **{name: getattr(args, name) for name in ("images", "heads", "tokens", "dtype", "repeats")},
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    rows = run(args)
    print(
        "path      part              ms  x released  TFLOP/s      MiB   error: out  grad_qkv  grad_bias"
    )
    for name, row in rows.items():
        for part in ("forward", "gradients"):
            memory = "-" if row[part]["mebibytes"] is None else f"{row[part]['mebibytes']:.0f}"
            speed = "{milliseconds:9.3f} {times_released:11.2f} {teraflops:8.2f}".format(
                **row[part]
            )
            print(
                f"{name:9} {part:10}",
                speed,
                f"{memory:>8}",
                *(f"{e:9.1e}" for e in row["relative_error"].values()),
            )
    if args.json:
        args.json.write_text(json.dumps({**about, "paths": rows}, indent=1) + "\n")
    # all() and not max(): NaN is wrong, too.
    wrong = [
        name
        for name, row in rows.items()
        if not all(error < WORST for error in row["relative_error"].values())
    ]
    if wrong:
        print(f"off by more than {WORST}: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

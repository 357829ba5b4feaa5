"""Time, memory and error of attention, forward and with gradients, against the released arithmetic.

    python benchmarks/bench_attention.py
    python benchmarks/bench_attention.py --images 64 --heads 18 --tokens 1024 --json attention.json

The defaults on a GPU are EDT-S's stage of 256 tokens, 256 images and bf16. Without a GPU, fewer
images go through the implementations that run on a CPU. The implementations take turns, one call
each, so that a change of the clock rate affects all of them alike. Times are medians.

    released   the reference backend in float32, with TF32 products on a GPU that has them
    reference  the reference backend in --dtype, with the bias in float32
    sdpa       torch's scaled_dot_product_attention in --dtype, with the bias as its mask; heads are
               padded with zeros to a multiple of 8, because fused kernels accept no other head_dim
    triton     the triton backend in --dtype

TFLOP/s count the operations of the reference: 4 B H N^2 d forward, 12 B H N^2 d with gradients.
Errors are relative to float32 without TF32. The exit code is 1 if an error exceeds 2e-2. Memory is
the peak of what a call allocates, without its inputs.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from measure import machine  # noqa: E402

from edt.nn.attention import attention  # noqa: E402
from edt.nn.precision import set_matmul_precision  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HEAD_DIM = 52
MAX_RELATIVE_ERROR = 2e-2


def sdpa(qkv: Tensor, bias: Tensor) -> Tensor:
    """Attention by torch's scaled_dot_product_attention."""
    head_dim = qkv.shape[-1]
    q, k, v = F.pad(qkv, (0, -head_dim % 8)).permute(2, 0, 3, 1, 4)
    mask = bias.to(qkv.dtype).expand(len(qkv), -1, -1, -1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=head_dim**-0.5)
    return out[..., :head_dim].transpose(1, 2).flatten(2)


def implementations(dtype: torch.dtype) -> dict[str, tuple[Callable, torch.dtype]]:
    """Name -> (function of qkv and bias, dtype of qkv)."""
    reference = functools.partial(attention, backend="reference")
    table: dict[str, tuple[Callable, torch.dtype]] = {
        "released": (reference, torch.float32),
        "reference": (reference, dtype),
        "sdpa": (sdpa, dtype),
    }
    if CUDA:
        table["triton"] = (functools.partial(attention, backend="triton"), dtype)
    return table


class Case:
    """One implementation with its inputs."""

    def __init__(self, function: Callable, qkv: Tensor, bias: Tensor, grad_out: Tensor):
        self.function = function
        self.leaves = qkv.clone().requires_grad_(), bias.clone().requires_grad_()
        self.grad_out = grad_out

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.function(*self.leaves)

    def gradients(self) -> tuple[Tensor, ...]:
        """The output, and the gradients of qkv and the bias."""
        out = self.function(*self.leaves)
        return out.detach(), *torch.autograd.grad(out, self.leaves, self.grad_out)


def milliseconds(call: Callable) -> float:
    """The time of one call."""
    if not CUDA:
        start_sec = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start_sec)
    # Events measure the GPU's own time; the host returns before the kernels end.
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_memory(call: Callable) -> float | None:
    """MiB that one call allocates at its peak; None on a CPU, where torch does not count."""
    if not CUDA:
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def relative_errors(case: Case, exact: tuple[Tensor, ...]) -> dict[str, float]:
    names = ("out", "grad_qkv", "grad_bias")
    return {
        name: float((actual.float() - expected).norm() / expected.norm())
        for name, actual, expected in zip(names, case.gradients(), exact, strict=True)
    }


def make_inputs(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """qkv, bias and the gradient of the output, in float32."""
    torch.manual_seed(0)
    qkv = torch.randn(args.images, args.tokens, 3, args.heads, HEAD_DIM, device=DEVICE)
    bias = torch.randn(args.heads, args.tokens, args.tokens, device=DEVICE)
    grad_out = torch.randn(args.images, args.tokens, args.heads * HEAD_DIM, device=DEVICE)
    # Rounded to --dtype here, so that this rounding is in no implementation's error.
    dtype = DTYPES[args.dtype]
    return qkv.to(dtype).float(), bias, grad_out.to(dtype).float()


def run(args: argparse.Namespace) -> dict[str, dict]:
    """One row of results per implementation."""
    qkv, bias, grad_out = make_inputs(args)
    set_matmul_precision("fp32")
    exact = Case(attention, qkv, bias, grad_out).gradients()
    set_matmul_precision("tf32")
    cases = {
        name: Case(function, qkv.to(dtype), bias, grad_out.to(dtype))
        for name, (function, dtype) in implementations(DTYPES[args.dtype]).items()
    }
    rows: dict[str, dict[str, Any]] = {
        name: {"relative_error": relative_errors(case, exact)} for name, case in cases.items()
    }
    del exact  # frees its memory before the measurement
    operations = 4 * args.images * args.heads * args.tokens**2 * HEAD_DIM
    for part, factor in (("forward", 1), ("gradients", 3)):
        calls: dict[str, Callable] = {name: getattr(case, part) for name, case in cases.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for repeat in range(args.warmup + args.repeats):
            for name, call in calls.items():
                duration = milliseconds(call)
                if repeat >= args.warmup:
                    times[name].append(duration)
        for name, call in calls.items():
            median = statistics.median(times[name])
            rows[name][part] = {
                "milliseconds": median,
                "teraflops": factor * operations / median / 1e9,
                "mebibytes": peak_memory(call),
                "times_released": statistics.median(times["released"]) / median,
            }
    return rows


def print_table(rows: dict[str, dict]) -> None:
    print(
        "name      part              ms  x released  TFLOP/s      MiB   "
        "error: out  grad_qkv  grad_bias"
    )
    for name, row in rows.items():
        errors = [f"{error:9.1e}" for error in row["relative_error"].values()]
        for part in ("forward", "gradients"):
            memory = "-" if row[part]["mebibytes"] is None else f"{row[part]['mebibytes']:.0f}"
            speed = "{milliseconds:9.3f} {times_released:11.2f} {teraflops:8.2f}".format(
                **row[part]
            )
            print(f"{name:9} {part:10}", speed, f"{memory:>8}", *errors)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--images", type=int, default=256 if CUDA else 8)
    p.add_argument("--heads", type=int, default=6)
    p.add_argument("--tokens", type=int, default=256)
    p.add_argument("--dtype", choices=DTYPES, default="bf16")
    p.add_argument("--warmup", type=int, default=10 if CUDA else 2, help="calls not counted")
    p.add_argument("--repeats", type=int, default=100 if CUDA else 10, help="calls measured")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    return p


def main() -> int:
    args = parser().parse_args()
    about = {
        **machine(torch.device(DEVICE)),
        **{name: getattr(args, name) for name in ("images", "heads", "tokens", "dtype", "repeats")},
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    rows = run(args)
    print_table(rows)
    if args.json:
        args.json.write_text(json.dumps({**about, "implementations": rows}, indent=1) + "\n")
    # all() instead of max(), because max() can pass over NaN.
    inaccurate = [
        name
        for name, row in rows.items()
        if not all(error < MAX_RELATIVE_ERROR for error in row["relative_error"].values())
    ]
    if inaccurate:
        print(
            f"relative error above {MAX_RELATIVE_ERROR}: {', '.join(inaccurate)}", file=sys.stderr
        )
    return 1 if inaccurate else 0


if __name__ == "__main__":
    sys.exit(main())

"""Report how the attention kernels compile for a GPU: registers, spills and shared memory.

The script needs no GPU.

    python benchmarks/report_kernels.py    # an H100 or H200, sm_90
    python benchmarks/report_kernels.py --sm 86 --tokens 256 --arithmetic bf16 --json

The shapes are EDT-S's at 256 and 512 pixels. A program may use 255 registers per thread, and the
shared memory that SHARED_KIB lists. Spills are the instructions that store registers to local
memory (STL), counted in the disassembly by the triton package's cuobjdump.
"""

import argparse
import itertools
import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))
from edt.nn.attention_triton import KERNELS, KernelName, kernel_constants  # noqa: E402

# EDT-S: image size -> tokens of a stage -> heads.
NUM_HEADS = {
    256: {256: 6, 64: 8, 16: 10},
    512: {1024: 6, 256: 8, 64: 10},
}
# Name -> dtype of qkv, and Triton's type of a pointer to it.
ARITHMETIC = {
    "bf16": (torch.bfloat16, "*bf16"),
    "tf32": (torch.float32, "*fp32"),
    "fp32": (torch.float32, "*fp32"),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Compute capability -> shared memory that one program can use at most.
SHARED_KIB = {
    80: 163,  # A100
    86: 99,  # RTX 30, A40
    89: 99,  # RTX 40, L40
    90: 227,  # H100, H200
    100: 227,  # B200
    120: 99,  # RTX 50
}


def compile_kernel(
    kernel: KernelName,
    num_heads: int,
    tokens: int,
    arithmetic: str,
    amm: bool,
    head_dim: int,
    sm: int,
) -> dict[str, Any]:
    """One row of the report: compile as a launch would, with bias and AMM matrix in float32."""
    dtype, pointer = ARITHMETIC[arithmetic]
    torch.backends.cuda.matmul.fp32_precision = "tf32" if arithmetic == "tf32" else "ieee"
    constants = kernel_constants(kernel, (1, tokens, 3, num_heads, head_dim), dtype)
    options = {name: constants.pop(name) for name in list(constants) if name.islower()}
    # A launch without AMM passes None, which Triton compiles as a constant.
    fixed = constants if amm else {**constants, "amm_matrix": None}
    types = dict.fromkeys(KERNELS[kernel].arg_names, "*fp32")
    types |= dict.fromkeys(("num_images", "chunk_size"), "i32")
    types |= dict.fromkeys(("qkv", "out", "grad_out", "grad_qkv"), pointer)
    types |= dict.fromkeys(fixed, "constexpr")
    signature = {name: types[name] for name in KERNELS[kernel].arg_names}
    # torch aligns its tensors, and a launch tells the compiler so.
    alignment = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    source = ASTSource(KERNELS[kernel], signature, fixed, alignment)
    compiled = triton.compile(source, GPUTarget("cuda", sm, 32), options)
    return {
        "kernel": kernel,
        "arithmetic": arithmetic,
        "heads": num_heads,
        "tokens": tokens,
        "amm": amm,
        "queries": constants["BLOCK_QUERIES"],
        "keys": constants["BLOCK_KEYS"],
        "warps": options["num_warps"],
        "stages": options["num_stages"],
        **disassemble(compiled.asm["cubin"]),
        "shared_bytes": compiled.metadata.shared,
    }


def disassemble(cubin: bytes) -> dict[str, Any]:
    """Registers per thread, spills, and whether wgmma instructions are used."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers = re.search(r"REG:(\d+)", text)
    if registers is None:
        raise RuntimeError(f"cuobjdump printed no register count: {text[:200]!r}")
    return {
        "registers": int(registers[1]),
        "spills": len(re.findall(r"\bSTL\b", text)),
        "wgmma": "HGMMA" in text,
    }


def markdown(rows: list[dict]) -> str:
    """The report as a table."""
    lines = [
        "| arithmetic | heads x tokens | kernel | AMM | queries x keys, warps, stages "
        "| registers | spills | shared KiB | wgmma |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        cells = [
            row["arithmetic"],
            f"{row['heads']} x {row['tokens']}",
            row["kernel"],
            "yes" if row["amm"] else "no",
            f"{row['queries']} x {row['keys']}, {row['warps']}, {row['stages']}",
            row["registers"],
            row["spills"],
            f"{row['shared_bytes'] / 1024:.1f}",
            "yes" if row["wgmma"] else "no",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--image-sizes",
        nargs="+",
        type=int,
        choices=NUM_HEADS,
        default=list(NUM_HEADS),
        help="pixels",
    )
    p.add_argument(
        "--tokens",
        nargs="+",
        type=int,
        default=[16, 64, 256, 1024],
        help="report the stages with these numbers of tokens",
    )
    p.add_argument("--arithmetic", nargs="+", choices=ARITHMETIC, default=list(ARITHMETIC))
    p.add_argument("--head-width", type=int, default=52, help="head_dim; DiT-XL has 72")
    p.add_argument(
        "--sm",
        type=int,
        choices=SHARED_KIB,
        default=90,
        help="compute capability of the GPU, times ten",
    )
    p.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return p


def main() -> None:
    args = parser().parse_args()
    stages = [
        (num_heads, tokens)
        for size in args.image_sizes
        for tokens, num_heads in NUM_HEADS[size].items()
        if tokens in args.tokens
    ]
    cases = itertools.product(args.arithmetic, stages, KERNELS, (False, True))
    rows = [
        compile_kernel(kernel, num_heads, tokens, arithmetic, amm, args.head_width, args.sm)
        for arithmetic, (num_heads, tokens), kernel, amm in cases
    ]
    about = {
        "triton": triton.__version__,
        "python": platform.python_version(),
        "target": f"sm_{args.sm}",
        "shared_kib": SHARED_KIB[args.sm],
        "head_dim": args.head_width,
    }
    if args.json:
        print(json.dumps({**about, "rows": rows}))
    else:
        summary = ", ".join(f"{name} {value}" for name, value in about.items())
        print(summary, markdown(rows), sep="\n\n")


if __name__ == "__main__":
    main()

"""What the attention kernels compile to for a GPU: registers, spills, shared memory. Needs no GPU.

    python benchmarks/report_kernels.py                                           # an H100 or H200,
    sm_90 python benchmarks/report_kernels.py --sm 86 --tokens 256 --arithmetic bf16 --json

At EDT-S's shapes for 256 and 512 pixels. A program may use 255 registers per thread and the shared
memory below; spills are the instructions that store registers to local memory, as cuobjdump of the
triton package shows them."""

import argparse
import itertools
import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))
from edt.nn.attention_triton import KERNELS, constants  # noqa: E402

HEADS = {
    256: {256: 6, 64: 8, 16: 10},
    512: {1024: 6, 256: 8, 64: 10},
}  # of EDT-S, by image size and tokens
ARITHMETIC = {
    "bf16": (torch.bfloat16, "*bf16"),
    "tf32": (torch.float32, "*fp32"),
    "fp32": (torch.float32, "*fp32"),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_KIB = {
    80: 163,
    86: 99,
    89: 99,
    90: 227,
    100: 227,
    120: 99,
}  # a program's most: A100, RTX 30 and A40, L40 and RTX 40,
# H100, B200, RTX 50


def compile_kernel(
    kernel: str, heads: int, tokens: int, arithmetic: str, modulated: bool, width: int, sm: int
) -> dict:
    """Compile as a launch would, with the bias and the modulation in float32; one row of the
    report.
    """
    dtype, pointer = ARITHMETIC[arithmetic]
    torch.backends.cuda.matmul.fp32_precision = "tf32" if arithmetic == "tf32" else "ieee"
    meta = constants(kernel, (1, tokens, 3, heads, width), dtype)
    options = {name: meta.pop(name) for name in list(meta) if name.islower()}
    fixed = meta if modulated else {**meta, "modulation": None}
    types = dict.fromkeys(KERNELS[kernel].arg_names, "*fp32") | dict.fromkeys(
        ("images", "chunk"), "i32"
    )
    types |= dict.fromkeys(("qkv", "out", "grad_out", "grad_qkv"), pointer) | dict.fromkeys(
        fixed, "constexpr"
    )
    signature = {name: types[name] for name in KERNELS[kernel].arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    compiled = triton.compile(
        ASTSource(KERNELS[kernel], signature, fixed, aligned), GPUTarget("cuda", sm, 32), options
    )
    return {
        "kernel": kernel,
        "arithmetic": arithmetic,
        "heads": heads,
        "tokens": tokens,
        "modulated": modulated,
        "queries": meta["QUERIES"],
        "keys": meta["KEYS"],
        "warps": options["num_warps"],
        "stages": options["num_stages"],
        **disassemble(compiled.asm["cubin"]),
        "shared_bytes": compiled.metadata.shared,
    }


def disassemble(cubin: bytes) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", text)[1]),
        "spills": len(re.findall(r"\bSTL\b", text)),
        "wgmma": "HGMMA" in text,
    }


def markdown(rows: list[dict]) -> str:
    lines = [
        "| arithmetic | heads x tokens | kernel | modulated | queries x keys, warps, stages | registers | spills | "
        "shared KiB | wgmma |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        tile = f"{row['queries']} x {row['keys']}, {row['warps']}, {row['stages']}"
        lines.append(
            f"| {row['arithmetic']} | {row['heads']} x {row['tokens']} | {row['kernel']} | "
            f"{'yes' if row['modulated'] else 'no'} | {tile} | {row['registers']} | {row['spills']} | "
            f"{row['shared_bytes'] / 1024:.1f} | {'yes' if row['wgmma'] else 'no'} |"
        )
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--image-sizes", nargs="+", type=int, choices=HEADS, default=list(HEADS), help="pixels"
    )
    p.add_argument("--tokens", nargs="+", type=int, default=[16, 64, 256, 1024])
    p.add_argument("--arithmetic", nargs="+", choices=ARITHMETIC, default=list(ARITHMETIC))
    p.add_argument("--head-width", type=int, default=52, help="72 is DiT-XL's")
    p.add_argument(
        "--sm",
        type=int,
        choices=SHARED_KIB,
        default=90,
        help="compute capability of the GPU, times ten",
    )
    p.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = p.parse_args()
    stages = [
        (heads, n)
        for size in args.image_sizes
        for n, heads in HEADS[size].items()
        if n in args.tokens
    ]
    cases = itertools.product(args.arithmetic, stages, KERNELS, (False, True))
    rows = [
        compile_kernel(kernel, *stage, arithmetic, modulated, args.head_width, args.sm)
        for arithmetic, stage, kernel, modulated in cases
    ]
    about = {
        "triton": triton.__version__,
        "python": platform.python_version(),
        "target": f"sm_{args.sm}",
        "shared_kib": SHARED_KIB[args.sm],
        "head_width": args.head_width,
    }
    if args.json:
        print(json.dumps({**about, "rows": rows}))
    else:
        print(
            ", ".join(f"{name} {value}" for name, value in about.items()),
            markdown(rows),
            sep="\n\n",
        )


if __name__ == "__main__":
    main()

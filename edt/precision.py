"""Arithmetic precision of matrix products."""

import torch

PRECISIONS = ("fp32", "tf32", "bf16")


def allow_tf32(precision: str) -> None:
    """Let float32 matrix products on a GPU run in TF32 (the release's way) if ``precision`` says so."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"

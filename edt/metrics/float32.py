"""Full-precision arithmetic, independent of what the surrounding training has switched on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# torch's type stubs do not know the settings of single operations.
OPERATIONS = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,  # type: ignore[attr-defined]
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    torch.backends.mkldnn.conv,  # type: ignore[attr-defined]
)


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 matrix products and convolutions without TF32 or bf16.

    Autocast and gradients are off inside. The settings are restored at the end.
    """
    precisions = [operation.fp32_precision for operation in OPERATIONS]
    for operation in OPERATIONS:
        operation.fp32_precision = "ieee"
    try:
        with (
            torch.inference_mode(),
            torch.autocast("cuda", enabled=False),
            torch.autocast("cpu", enabled=False),
        ):
            yield
    finally:
        for operation, precision in zip(OPERATIONS, precisions, strict=True):
            operation.fp32_precision = precision

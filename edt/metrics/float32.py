"""Full-precision arithmetic, whatever the training around the evaluation has switched on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

BACKENDS = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,
    torch.backends.mkldnn.matmul,
    torch.backends.mkldnn.conv,
)


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 or bf16 inside float32 matrix products and convolutions, no autocast, no
    gradients.
    """
    before = [backend.fp32_precision for backend in BACKENDS]
    for backend in BACKENDS:
        backend.fp32_precision = "ieee"
    try:
        with (
            torch.inference_mode(),
            torch.autocast("cuda", enabled=False),
            torch.autocast("cpu", enabled=False),
        ):
            yield
    finally:
        for backend, precision in zip(BACKENDS, before, strict=True):
            backend.fp32_precision = precision

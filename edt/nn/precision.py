"""Arithmetic precision of matrix products."""

import contextlib

import torch
from torch import nn

PRECISIONS = ("fp32", "tf32", "bf16")


def allow_tf32(precision: str) -> None:
    """Let float32 matrix products and convolutions on a GPU run in TF32 (the release's way) if
    ``precision`` says so.
    """
    # Not by fp32_precision: parts of torch still read these older flags, and raise if only the
    # newer are set.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A region whose operations run in the types they are given."""
    if (
        device.type == "meta"
    ):  # has none; torch.amp.is_autocast_available would say so, but torch 2.11 cannot compile it
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def round_weights(model: nn.Module) -> None:
    """Store the weights of an EDT's matrix products in bfloat16, in place: what autocast does to
    them at every use, once.

    For sampling with precision "bf16"; the results stay the same. The final layer is not autocast,
    and stays too."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith("final_layer"):
            module.to(torch.bfloat16)

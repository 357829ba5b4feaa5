"""Arithmetic precision of matrix products."""

import contextlib
from typing import Literal

import torch
from torch import nn

from edt.utils.choices import unknown_choice

Precision = Literal["fp32", "tf32", "bf16"]
PRECISIONS: dict[Precision, str] = {
    "fp32": "float32",
    "tf32": "float32, with matrix products in TF32 on a GPU (the release's way)",
    "bf16": "autocast to bfloat16; trained weights, normalisation and softmax sums stay float32",
}


def set_matmul_precision(precision: Precision) -> None:
    """Allow or forbid TF32 in float32 matrix products and convolutions on a GPU, process-wide.

    Args:
        precision: "tf32" allows it, the others forbid it.
    """
    if precision not in PRECISIONS:
        raise unknown_choice("precision", precision, Precision)
    allowed = precision == "tf32"
    # torch.backends.*.fp32_precision is newer, but parts of torch still read these older flags and
    # raise an error if only the newer ones are set.
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager:
    """The context in which a network runs: bfloat16 autocast for "bf16", else no autocast.

    Training and sampling wrap their calls of the network in it.
    """
    if precision not in PRECISIONS:
        raise unknown_choice("precision", precision, Precision)
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def round_weights(model: nn.Module) -> None:
    """Store the weights of linear layers in bfloat16, in place.

    Autocast rounds a float32 weight at every use. Rounding it once gives the same results and saves
    the repeated conversion, so sampling with precision "bf16" does it. A module with the attribute
    ``full_precision`` runs outside autocast and keeps float32 weights.
    """
    if getattr(model, "full_precision", False):
        return
    if isinstance(model, nn.Linear):
        model.to(torch.bfloat16)
    for child in model.children():
        round_weights(child)

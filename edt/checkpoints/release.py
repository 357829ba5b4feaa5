"""The release's .pt files, read without unpickling code."""

import argparse
import pickle
from pathlib import Path
from typing import Any

import torch

from edt.utils.errors import UserError


def read_release(path: Path) -> dict[str, Any]:
    """The content of a .pt file: {model, ema, opt, args}, or a bare state dict.

    ``args`` of the release is an ``argparse.Namespace``, the only class that is allowed in
    addition to tensors.

    Raises:
        UserError: the file cannot be read, or it holds other classes.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than tensors and is not loaded; export its weights alone"
        ) from None
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise UserError(
            f"cannot read {path} ({type(error).__name__}); give a checkpoint folder or a .pt file"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a checkpoint: it holds a {type(content).__name__}")
    return content


def read_release_weights(path: Path, weights: str) -> dict[str, torch.Tensor]:
    """The named tensors of a .pt file.

    Args:
        path: the file.
        weights: "ema" or "model", the entry to take; a bare state dict has neither.

    Raises:
        UserError: the file cannot be read, or the entry holds no tensors.
    """
    content = read_release(path)
    tensors = content.get(weights, content)
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        remedy = "export the weights alone"
        if "model" in content:
            remedy = f"give --weights model, or {remedy}"
        raise UserError(f"{path} holds no named tensors as {weights}; {remedy}")
    return strip_prefixes(tensors)


def strip_prefixes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove the prefixes that DistributedDataParallel and torch.compile put before names."""
    return {
        name.removeprefix("module.").removeprefix("_orig_mod."): value
        for name, value in tensors.items()
    }

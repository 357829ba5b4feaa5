"""Starting a model from the weights of another one, for fine-tuning."""

import math
from typing import NamedTuple

import torch

from edt.nn.transformer import DiffusionTransformer

BIAS_TABLE = "relative_position_bias_table"


class InitReport(NamedTuple):
    """Names of parameters by what happened to them."""

    kept: list[str]
    resized: list[str]
    new: list[str]


@torch.no_grad()
def init_from(model: DiffusionTransformer, weights: dict[str, torch.Tensor]) -> InitReport:
    """Copy the weights that fit into a model, for other classes or another resolution.

    Position biases of another grid are resized. If the number of classes differs, only the null
    class of the label table is copied. Parameters of other shapes stay as they were initialised.

    Args:
        model: changed in place.
        weights: named tensors of another model.
    """
    report = InitReport([], [], [])
    for name, parameter in model.named_parameters():
        source = weights.get(name)
        if source is None or not source.numel() or source.shape[1:] != parameter.shape[1:]:
            report.new.append(name)
        elif source.shape == parameter.shape:
            parameter.copy_(source)
            report.kept.append(name)
        elif name.endswith(BIAS_TABLE) and _other_rows(source) == _other_rows(parameter):
            parameter.copy_(_resize_bias_table(source, len(parameter)))
            report.resized.append(name)
        elif name == "y_embedder.embedding_table.weight":
            parameter[-1] = source[-1]
            report.resized.append(name)
        else:
            report.new.append(name)
    return report


def _other_rows(table: torch.Tensor) -> int:
    """How many rows of a table of position biases follow the square of offsets."""
    return len(table) - math.isqrt(len(table)) ** 2


def _resize_bias_table(table: torch.Tensor, length: int) -> torch.Tensor:
    """Bicubic interpolation over the offsets, (old length, num_heads) -> (length, num_heads).

    MDTv2's three rows after the offsets are copied.
    """
    old_side, new_side = math.isqrt(len(table)), math.isqrt(length)
    others = table[old_side**2 :]
    offsets = table[: old_side**2].T.reshape(1, -1, old_side, old_side)
    resized = torch.nn.functional.interpolate(
        offsets, size=(new_side, new_side), mode="bicubic", align_corners=True
    )
    return torch.cat([resized.flatten(2)[0].T, others])

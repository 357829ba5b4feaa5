"""Attention Modulation Matrix (AMM): the paper's training-free switch that makes attention local.

A modulated block computes ``(softmax(q k^T / sqrt(d) + bias) * M) v``: ``M`` multiplies the
attention *after* the softmax, with no renormalisation, and only at inference. ``M`` falls with the
Euclidean distance between two tokens and is zero beyond a radius. This module knows grids and
distances only; :meth:`edt.models.EDT.set_amm` hands the matrices to the blocks."""

import math
from typing import NamedTuple

import torch

from edt.utils.errors import UserError

FORMS = ("256", "512")


class Placement(NamedTuple):
    """Which blocks (0-based) "auto" modulates. Data of a model preset; the paper tunes it per
    model.
    """

    low_cfg: tuple[int, ...]  # guidance scale below 2
    high_cfg: tuple[int, ...]  # guidance scale 2 and above
    at_512: tuple[int, ...] | None = None  # 512-pixel models, any scale; None: as at 256 pixels


class Modulation(NamedTuple):
    """What acts on one block, nothing left to a default."""

    block: int  # 0-based
    form: str
    radius: float  # tokens of the block's grid


def paper_radius(grid: int) -> float:
    """The paper's best radius on ``grid`` x ``grid`` tokens, in tokens."""
    return math.sqrt((grid - 1) ** 2 + 4)


def modulation_matrix(grid: int, form: str = "256", radius: float | None = None) -> torch.Tensor:
    """Modulation of every pair of tokens on a ``grid`` x ``grid`` map.

    With d the distance of two tokens, T = 4 (grid - 1) sqrt(2) and R the radius: form "256" is 0.5
    exp(cos(2 pi d / T)), form "512" is 1.3 cos(2 pi d / T); both are 0 where d > R.

    Args:
        grid: tokens per side. A single token gives a matrix of ones.
        form: "256" (the paper's) or "512" (the release's, for 512-pixel images).
        radius: R in tokens; None is :func:`paper_radius`.

    Returns:
        (grid^2, grid^2) float32, symmetric.

    Raises:
        UserError: unknown form, or a radius below 0 or not finite.
    """
    if form not in FORMS:
        raise UserError(f"unknown AMM form {form!r}; choose one of {', '.join(FORMS)}")
    radius = paper_radius(grid) if radius is None else radius
    if not 0 <= radius < math.inf:
        raise UserError(f"AMM radius must be a number of tokens, 0 or more, got {radius}")
    if grid == 1:
        return torch.ones(1, 1)
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    row, column = row.flatten(), column.flatten()
    squared = (row[:, None] - row).square() + (column[:, None] - column).square()
    # Compared as integers: distances that equal the radius exist, and are inside.
    limit = math.floor(radius * radius + 1e-6)
    phase = 2 * math.pi * squared.double().sqrt() / (4 * (grid - 1) * math.sqrt(2))
    gain = 0.5 * phase.cos().exp() if form == "256" else 1.3 * phase.cos()
    return gain.masked_fill(squared > limit, 0.0).float()

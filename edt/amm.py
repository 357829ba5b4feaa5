"""Attention Modulation Matrix (AMM): a training-free switch that makes attention local.

It is the paper's second idea (section 3.2). A modulated block computes
``(softmax(q k^T / sqrt(d) + bias) * M) v``. The matrix ``M`` multiplies the attention weights
*after* the softmax, without renormalisation, and only at inference. ``M`` falls with the Euclidean
distance between two tokens and is zero beyond a radius.

This file has three parts: the matrix, the choice of blocks for a guidance scale and resolution, and
the function that hands matrices to attention modules. The placements that the paper found stand
with the model sizes in edt.models.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from edt.nn.layers import Attention
from edt.utils.choices import check_choice
from edt.utils.errors import UserError

AMMForm = Literal["256", "512"]
AMM_FORMS: dict[AMMForm, str] = {
    "256": "0.5 exp(cos(2 pi d / P)), the paper's",
    "512": "1.3 cos(2 pi d / P), the release's for images of 512 pixels and more",
}

# ---------------------------------------------------------------------------------------------
# The matrix


def paper_radius(grid_size: int) -> float:
    """The best radius of the paper's Table 10, in tokens: sqrt((G - 1)^2 + 4) on G x G tokens."""
    return math.sqrt((grid_size - 1) ** 2 + 4)


def modulation_matrix(
    grid_size: int, form: AMMForm = "256", radius: float | None = None
) -> torch.Tensor:
    """The AMM factor of every pair of tokens on a square grid.

    Let G be the grid size, N = G^2, d the distance of two tokens and R the radius. The period
    P = 4 (G - 1) sqrt(2) is four times the largest distance, so the cosine falls from 1 to 0 across
    the grid. Form "256" is 0.5 exp(cos(2 pi d / P)). Form "512" is 1.3 cos(2 pi d / P). Both are 0
    where d > R.

    Args:
        grid_size: tokens per side, G. A single token has a matrix of ones.
        form: see :data:`AMM_FORMS`.
        radius: R in tokens; None takes :func:`paper_radius`.

    Returns:
        (N, N) float32, symmetric.

    Raises:
        UserError: unknown form, or a radius that is negative or not finite.
    """
    check_choice("AMM form", form, AMMForm)
    radius = paper_radius(grid_size) if radius is None else radius
    if not 0 <= radius < math.inf:
        raise UserError(f"AMM radius must be a number of tokens, 0 or more, got {radius}")
    if grid_size == 1:  # the period would be 0
        return torch.ones(1, 1)
    token = torch.arange(grid_size)
    row, column = torch.meshgrid(token, token, indexing="ij")
    row, column = row.flatten(), column.flatten()
    squared = (row[:, None] - row).square() + (column[:, None] - column).square()
    # Tokens G - 1 rows and 2 columns apart lie exactly at the paper's radius and count as inside.
    # Integers compare exactly; 1e-6 undoes the rounding of squaring a square root.
    squared_limit = math.floor(radius * radius + 1e-6)
    phase = 2 * math.pi * squared.double().sqrt() / (4 * (grid_size - 1) * math.sqrt(2))
    gain = 0.5 * phase.cos().exp() if form == "256" else 1.3 * phase.cos()
    return gain.masked_fill(squared > squared_limit, 0.0).float()


# ---------------------------------------------------------------------------------------------
# The choice of blocks


class Placement(NamedTuple):
    """The blocks (0-based) that ``set_amm("auto")`` modulates. They are tuned for each model."""

    low_cfg: tuple[int, ...]  # guidance scale below 2
    high_cfg: tuple[int, ...]  # guidance scale 2 and above
    at_512: tuple[int, ...] | None = None  # 512-pixel models at any scale; None: as at 256 pixels


def check_auto(blocks: str) -> None:
    """Check a text that a user gave as AMM blocks: "auto" is the only one.

    Raises:
        UserError: it is another text.
    """
    if blocks != "auto":
        raise UserError(f"AMM blocks are None, 'auto' or block numbers, got {blocks!r}")


def default_form(uses_512_amm: bool) -> AMMForm:
    """The form of a model for images of 512 pixels and more, or of fewer."""
    return "512" if uses_512_amm else "256"


def auto_blocks(
    placement: Placement | None, cfg_scale: float, uses_512_amm: bool
) -> tuple[int, ...]:
    """The blocks of a placement for a guidance scale and a resolution.

    Raises:
        UserError: no placement is known.
    """
    if placement is None:
        raise UserError(
            "no AMM placement is known for this layout; name blocks with --amm-blocks, e.g. 7,10"
        )
    if uses_512_amm and placement.at_512 is not None:
        return placement.at_512
    return placement.low_cfg if cfg_scale < 2 else placement.high_cfg


# ---------------------------------------------------------------------------------------------
# The matrices of a network


class Modulation(NamedTuple):
    """The modulation of one block, with every default resolved."""

    block: int  # 0-based
    form: AMMForm
    radius: float  # tokens of the block's grid


def set_amm_matrices(
    attention_blocks: Sequence[Attention],
    blocks: Sequence[int],
    form: AMMForm,
    radius: float | None = None,
) -> tuple[Modulation, ...]:
    """Set the AMM matrix of the chosen attention modules, and clear it on all others.

    Args:
        attention_blocks: the attention modules of a network, by block number.
        blocks: the blocks to modulate, 0-based; empty switches AMM off.
        form: see :data:`AMM_FORMS`.
        radius: in tokens; None takes the paper's radius of each block's grid.

    Returns:
        the resolved settings of each block in ``blocks``, in that order.

    Raises:
        UserError: a block does not exist, or form or radius is invalid. Nothing is changed then.
    """
    check_choice("AMM form", form, AMMForm)
    last = len(attention_blocks) - 1
    for block in blocks:
        if not 0 <= block <= last:
            raise UserError(f"AMM block {block} does not exist; the model has blocks 0 to {last}")
    modulations, matrices = [], {}
    for block in blocks:
        grid_size = attention_blocks[block].grid_size
        block_radius = paper_radius(grid_size) if radius is None else radius
        matrices[block] = modulation_matrix(grid_size, form, block_radius)
        modulations.append(Modulation(block, form, block_radius))
    for block, attention in enumerate(attention_blocks):
        matrix = matrices.get(block)
        device = attention.proj.weight.device
        attention.amm_matrix = None if matrix is None else matrix.to(device)
    return tuple(modulations)

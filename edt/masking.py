"""EDT's masking strategy: tokens are hidden only inside the down-sampling modules (paper, section
3.3).

The network sees masks as inputs; they are drawn here, from a generator the caller owns. True means
kept."""

from typing import NamedTuple

import torch

Ratio = tuple[
    float, float
]  # the probability of masking a token is uniform in this range, one draw a step

EDT_RATIOS: tuple[Ratio, Ratio] = ((0.4, 0.5), (0.1, 0.2))  # best of the paper's Tables 11 and 12
MID_RATIO: Ratio = (0.15, 0.25)  # the release's extra mask inside stage 1 of EDT-XL


class TokenMasks(NamedTuple):
    """Keep-masks of one masked pass, raster order, bool. T is the number of tokens of stage 1."""

    down0: torch.Tensor | None  # (B, T), tokens entering the first down-sampling
    down1: torch.Tensor | None  # (B, T / 4), tokens entering the second
    mid: torch.Tensor | None = None  # (B, T), tokens entering EDTConfig.mid_mask_block

    def rows(self, rows: slice) -> "TokenMasks":
        """The masks of some images of the batch."""
        return TokenMasks(*(None if mask is None else mask[rows] for mask in self))

    def after_full_pass(self) -> "TokenMasks":
        """Masks (2 B) of a full and a masked pass that go through the network as one batch, the
        full one first.
        """
        return TokenMasks(
            *(None if mask is None else torch.cat([torch.ones_like(mask), mask]) for mask in self)
        )

    def fork(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Repeat tensors (B, ...) to as many rows as there are masks."""
        copies = 1 if self.down0 is None else len(self.down0) // len(tensors[0])
        return tensors if copies == 1 else tuple(torch.cat([tensor] * copies) for tensor in tensors)


def draw_masks(
    batch: int,
    grid: int,
    generator: torch.Generator,
    ratios: tuple[Ratio, Ratio] = EDT_RATIOS,
    mid: Ratio | None = None,
) -> TokenMasks:
    """Draw keep-masks on the generator's device: one masking probability a module, then one coin a
    token.

    Args:
        batch: images, B.
        grid: tokens per side of stage 1.
        generator: source of every draw.
        ratios: range of the masking probability for the first and the second down-sampling.
        mid: the same for the mask inside stage 1; None draws none.
    """

    def keep(tokens: int, ratio: Ratio) -> torch.Tensor:
        low, high = ratio
        uniform = torch.rand(1 + batch * tokens, generator=generator, device=generator.device)
        probability = low + (high - low) * uniform[0]  # stays on the device
        return uniform[1:].view(batch, tokens) >= probability

    tokens = grid * grid
    return TokenMasks(
        keep(tokens, ratios[0]),
        keep(tokens // 4, ratios[1]),
        None if mid is None else keep(tokens, mid),
    )

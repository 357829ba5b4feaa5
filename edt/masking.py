"""EDT's masking strategy: down-sampling modules hide tokens in training (paper, section 3.3).

The released EDT-XL also hides tokens inside stage 1. Masks are inputs of the network. They are
drawn here, from a generator that the caller owns. True means that a token is kept.
"""

from typing import Literal, NamedTuple

import torch

Masking = Literal["edt", "mdt", "none"]
MASKINGS: dict[Masking, str] = {
    "edt": "a full and a masked pass in every step, for EDT",
    "mdt": "a full pass, and one whose encoder sees some tokens only, for MDTv2",
    "none": "the full pass alone (the paper's starred models)",
}

Ratio = tuple[float, float]
"""(low, high) of the masking probability. Each mask draws one probability uniformly from it."""

EDT_RATIOS: tuple[Ratio, Ratio] = ((0.4, 0.5), (0.1, 0.2))  # best of the paper's Tables 11 and 12
MID_RATIO: Ratio = (0.15, 0.25)  # the release's extra mask inside stage 1 of EDT-XL


class TokenMasks(NamedTuple):
    """Keep-masks of a pass, bool, in raster order; None hides nothing. T counts stage-1 tokens."""

    down0: torch.Tensor | None  # (B, T), tokens that enter the first down-sampling
    down1: torch.Tensor | None  # (B, T / 4), tokens that enter the second
    mid: torch.Tensor | None = None  # (B, T), tokens before EDTConfig.mid_mask_block, in stage 1

    def select(self, rows: slice) -> "TokenMasks":
        """The masks of some images of the batch."""
        return TokenMasks(*(None if mask is None else mask[rows] for mask in self))

    def prepend_full_pass(self) -> "TokenMasks":
        """Masks of 2B rows for both passes in one batch: B rows that keep everything, then self."""
        both = (None if mask is None else torch.cat([torch.ones_like(mask), mask]) for mask in self)
        return TokenMasks(*both)

    def repeat_rows(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Repeat tensors (B, ...) to the k B rows of the masks: one copy for each pass."""
        copies = 1 if self.down0 is None else len(self.down0) // len(tensors[0])
        if copies == 1:
            return tensors
        return tuple(torch.cat([tensor] * copies) for tensor in tensors)


def draw_masks(
    batch_size: int,
    grid_size: int,
    generator: torch.Generator,
    ratios: tuple[Ratio, Ratio] = EDT_RATIOS,
    mid_ratio: Ratio | None = None,
) -> TokenMasks:
    """Draw keep-masks on the generator's device.

    Each mask draws one probability for the whole batch, then one Bernoulli variable per token.

    Args:
        batch_size: images, B.
        grid_size: tokens per side of stage 1.
        generator: source of every draw.
        ratios: ranges of the masking probability for the first and the second down-sampling.
        mid_ratio: the range for the mask inside stage 1; None draws no such mask.
    """
    tokens = grid_size * grid_size
    down0 = _draw_mask(batch_size, tokens, generator, ratios[0])
    down1 = _draw_mask(batch_size, tokens // 4, generator, ratios[1])
    mid = None if mid_ratio is None else _draw_mask(batch_size, tokens, generator, mid_ratio)
    return TokenMasks(down0, down1, mid)


def _draw_mask(
    batch_size: int, tokens: int, generator: torch.Generator, ratio: Ratio
) -> torch.Tensor:
    """A keep-mask (batch_size, tokens), bool."""
    low, high = ratio
    uniform = torch.rand(1 + batch_size * tokens, generator=generator, device=generator.device)
    # The probability stays a tensor: asking for its value would make the host wait for the device.
    probability = low + (high - low) * uniform[0]
    return uniform[1:].view(batch_size, tokens) >= probability

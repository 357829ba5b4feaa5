"""Everything a training step draws, for the whole global batch, from (seed, step)."""

from typing import NamedTuple

import torch

from edt.diffusion import LossSecondMomentSampler, UniformSampler
from edt.masking import EDT_RATIOS, MID_RATIO, TokenMasks, draw_masks
from edt.models import EDTConfig
from edt.utils.randomness import generator


class PassDraws(NamedTuple):
    """Draws of one forward pass over B images."""

    noise: torch.Tensor  # (B, C, S, S)
    drop: torch.Tensor  # (B,) bool, True where the label becomes the null class
    masks: TokenMasks | None = None

    def rows(self, rows: slice) -> "PassDraws":
        return PassDraws(self.noise[rows], self.drop[rows], self.masks and self.masks.rows(rows))


class StepDraws(NamedTuple):
    """Draws of one training step over B images: one timestep for both passes (paper, Eq. 3)."""

    t: torch.Tensor  # (B,) int64
    weight: torch.Tensor  # (B,) float32, importance weights of t
    passes: tuple[PassDraws, ...]  # the full pass, then the masked one if there is one

    def rows(self, rows: slice) -> "StepDraws":
        return StepDraws(
            self.t[rows], self.weight[rows], tuple(one.rows(rows) for one in self.passes)
        )


def draw_step(
    seed: int,
    step: int,
    batch: int,
    model: EDTConfig,
    timestep_sampler: UniformSampler | LossSecondMomentSampler,
    device: torch.device | str,
    *,
    masking: str = "edt",
    noise: str = "independent",
    label_dropout: float = 0.1,
) -> StepDraws:
    """Draw step ``step`` (from 0).

    Args:
        batch: global batch, B.
        timestep_sampler: lives on ``device``.
        masking: "edt" for a full and a masked pass, "none" for the full one alone.
        noise: "independent" draws noise and label dropout for each pass, as the release does;
            "shared" draws them once, as the paper's Eq. 3 has it.
        label_dropout: share of labels replaced by the null class.
    """

    def stream(name: str) -> torch.Generator:
        return generator(seed, name, step, device)

    def noise_and_drop(name: str) -> PassDraws:
        shape = (batch, model.in_channels, model.input_size, model.input_size)
        drop = torch.rand(batch, generator=stream(f"drop/{name}"), device=device) < label_dropout
        return PassDraws(torch.randn(shape, generator=stream(f"noise/{name}"), device=device), drop)

    t, weight = timestep_sampler.sample(batch, stream("timesteps"))
    full = noise_and_drop("full")
    if masking == "none":
        return StepDraws(t, weight, (full,))
    masked = full if noise == "shared" else noise_and_drop("masked")
    mid = MID_RATIO if model.mid_mask_block is not None else None
    masks = draw_masks(batch, model.grid, stream("masks"), EDT_RATIOS, mid)
    return StepDraws(t, weight, (full, masked._replace(masks=masks)))

"""The inputs of a training step: everything random in it, drawn from (seed, step).

Every process draws the inputs of the global batch and keeps its rows. So the inputs do not depend
on the number of processes, and a resumed run needs no generator state.
"""

from typing import Any, NamedTuple

import torch

from edt.baselines.mdtv2 import MASK_RATIO_SPAN, InputMasks, masks_from_noise
from edt.diffusion.timesteps import TimestepSampler
from edt.masking import EDT_RATIOS, MID_RATIO, TokenMasks, draw_masks
from edt.nn.config import ModelConfig
from edt.training.config import TrainConfig
from edt.utils.randomness import generator


class PassInputs(NamedTuple):
    """Inputs of one forward pass over B images."""

    noise: torch.Tensor  # (B, C, S, S)
    drop: torch.Tensor  # (B,) bool, True where the label becomes the null class
    masks: TokenMasks | InputMasks | None = None  # None in the full pass

    def select(self, rows: slice) -> "PassInputs":
        """The inputs of some images."""
        masks = None if self.masks is None else self.masks.select(rows)
        return PassInputs(self.noise[rows], self.drop[rows], masks)


class StepInputs(NamedTuple):
    """Inputs of one training step over B images; both passes share the timesteps (paper, Eq. 3)."""

    t: torch.Tensor  # (B,) int64
    weight: torch.Tensor  # (B,) float32, importance weights of t
    passes: tuple[PassInputs, ...]  # the full pass, then the masked pass if there is one

    def select(self, rows: slice) -> "StepInputs":
        """The inputs of some images."""
        passes = tuple(inputs.select(rows) for inputs in self.passes)
        return StepInputs(self.t[rows], self.weight[rows], passes)


def draw_step_inputs(
    config: TrainConfig,
    step: int,
    model: ModelConfig,
    timestep_sampler: TimestepSampler,
    device: torch.device,
) -> StepInputs:
    """Draw the inputs of a step for the global batch.

    Args:
        config: gives seed, global batch size, masking, noise and label dropout.
        step: number of the step, from 0.
        model: gives the shape of the latents and the masks that the network has.
        timestep_sampler: lives on ``device``.
        device: of the generators and of the inputs.
    """
    batch_size = config.global_batch_size
    timestep_generator = generator(config.seed, "timesteps", step, device)
    t, weight = timestep_sampler.sample(batch_size, timestep_generator)
    full = _draw_pass(config, step, model, "full", device)
    if config.masking == "none":
        return StepInputs(t, weight, (full,))
    masked = full
    if config.noise == "independent":
        masked = _draw_pass(config, step, model, "masked", device)
    masks = _draw_masks(config, step, model, device)
    return StepInputs(t, weight, (full, masked._replace(masks=masks)))


def _draw_masks(
    config: TrainConfig, step: int, model: Any, device: torch.device
) -> TokenMasks | InputMasks:
    """Masks of the masked pass, of the kind that ``config.masking`` names."""
    batch_size = config.global_batch_size
    mask_generator = generator(config.seed, "masks", step, device)
    if config.masking == "edt":
        mid_ratio = None if model.mid_mask_block is None else MID_RATIO
        return draw_masks(batch_size, model.grid_size, mask_generator, EDT_RATIOS, mid_ratio)
    # The ratio decides a tensor's shape. It is drawn on the host, which then never asks a GPU.
    ratio_generator = generator(config.seed, "mask-ratio", step, torch.device("cpu"))
    uniform = torch.rand((), generator=ratio_generator).item()
    shape = (batch_size, model.grid_size**2)
    noise = torch.rand(shape, generator=mask_generator, device=device)
    return masks_from_noise(noise, model.mask_ratio + MASK_RATIO_SPAN * uniform)


def draw_posterior_noise(
    config: TrainConfig, step: int, model: ModelConfig, device: torch.device
) -> torch.Tensor:
    """Noise for sampling the VAE's posterior, (B, C, S, S) for the global batch."""
    posterior_generator = generator(config.seed, "posterior", step, device)
    shape = (config.global_batch_size, model.in_channels, model.input_size, model.input_size)
    return torch.randn(shape, generator=posterior_generator, device=device)


def _draw_pass(
    config: TrainConfig, step: int, model: ModelConfig, stream: str, device: torch.device
) -> PassInputs:
    """Noise and label dropout of one pass, from the streams of its name."""
    batch_size = config.global_batch_size
    drop_generator = generator(config.seed, f"drop/{stream}", step, device)
    uniform = torch.rand(batch_size, generator=drop_generator, device=device)
    noise_generator = generator(config.seed, f"noise/{stream}", step, device)
    shape = (batch_size, model.in_channels, model.input_size, model.input_size)
    noise = torch.randn(shape, generator=noise_generator, device=device)
    return PassInputs(noise, uniform < config.label_dropout)

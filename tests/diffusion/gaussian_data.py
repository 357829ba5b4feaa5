"""Gaussian data, for which the best noise prediction and the exact flow are known in closed form.

The data of class y is N(CLASS_MEANS[y], STD^2) in every number of a latent.
"""

import math
from typing import Any

import torch

from edt.diffusion import create_diffusion
from edt.masking import TokenMasks
from edt.models import EDT
from edt.nn.transformer import DiffusionTransformer
from edt.sampling.config import SamplingConfig
from edt.sampling.generate import sample_latents
from edt.utils.randomness import normal

ALPHA_BAR = create_diffusion().tables["alphas_cumprod"]
STD = 0.5
CLASS_MEANS = (0.7, -0.4, 0.1)  # the last is the null class's


def best_noise(x: torch.Tensor, timestep: int, mean: torch.Tensor | float) -> torch.Tensor:
    """The best prediction of the noise in x, for data N(mean, STD^2)."""
    alpha_bar = ALPHA_BAR[timestep]
    deviation = x - math.sqrt(alpha_bar) * mean
    return deviation * math.sqrt(1 - alpha_bar) / (alpha_bar * STD**2 + 1 - alpha_bar)


def flow(x: torch.Tensor, start: int, end: int | None, mean: torch.Tensor | float) -> torch.Tensor:
    """The solution of the probability-flow ODE for data N(mean, STD^2).

    Args:
        x: where the solution is at timestep ``start``.
        start: a timestep of the 1000-step process.
        end: another timestep, or None for clean data.
        mean: of the data.
    """
    a, b = ALPHA_BAR[start], 1.0 if end is None else ALPHA_BAR[end]
    deviation = (x - math.sqrt(a) * mean) / math.sqrt(a * STD**2 + 1 - a)
    return math.sqrt(b) * mean + math.sqrt(b * STD**2 + 1 - b) * deviation


def guided_mean(scale: float) -> float:
    """The mean of class 1 under guidance.

    The best noise prediction is linear in the mean, so guidance extrapolates the means.
    """
    return CLASS_MEANS[2] + scale * (CLASS_MEANS[1] - CLASS_MEANS[2])


class GaussianEDT(EDT):
    """An EDT that has learned the Gaussian data perfectly.

    Attributes:
        batch_sizes: rows of every forward pass so far.
        timesteps: timestep of every forward pass so far.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.batch_sizes: list[int] = []
        self.timesteps: list[int] = []

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor | None = None,
        masks: TokenMasks | None = None,
    ) -> torch.Tensor:
        self.batch_sizes.append(len(x))
        self.timesteps.append(int(t[0]))
        mean = torch.tensor(CLASS_MEANS)[y].view(-1, 1, 1, 1)
        return torch.cat([best_noise(x, int(t[0]), mean), -torch.ones_like(x)], dim=1)


def sample_class_1(
    model: DiffusionTransformer, count: int = 3, **config: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The noise that the first images begin from, and their latents; all of class 1."""
    sampling_config, indices = SamplingConfig(**config), torch.arange(count)
    latents = sample_latents(model, sampling_config, indices, torch.ones(count, dtype=torch.int64))
    noise = normal(sampling_config.seed, "noise", 0, indices, tuple(latents.shape[1:]), "cpu")
    return noise, latents

"""Samplers: the loop from noise to a clean latent, and the update rules of DDPM and DDIM."""

from collections.abc import Callable
from typing import Any

import torch
from tqdm.auto import tqdm

from edt.diffusion.gaussian import create_diffusion

Model = Callable[..., torch.Tensor]
"""A network, called as model(x, t, **model_kwargs) with t of the full 1000-step process."""

NoiseAt = Callable[[int], torch.Tensor]
"""Gives the noise of loop step i = 1, 2, ..., shaped like x. The loop starts from noise 0."""


class Sampler:
    """Goes from noise to a clean latent by calling a network at falling timesteps.

    A subclass sets ``timesteps`` and implements :meth:`update`.

    Attributes:
        timesteps: timesteps of the 1000-step process, in the order of the visits.
    """

    timesteps: list[int]

    @torch.no_grad()
    def sample(
        self,
        model: Model,
        x: torch.Tensor,
        model_kwargs: dict[str, Any] | None = None,
        *,
        guidance_scale: Callable[[int], float] | None = None,
        noise_at: NoiseAt | None = None,
        bar: tqdm | None = None,
    ) -> torch.Tensor:
        """Sample clean latents, (B, C, ...).

        Args:
            model: called as model(x, t, **model_kwargs).
            x: standard normal noise, (B, C, ...).
            model_kwargs: handed to every call, e.g. {"y": labels}.
            guidance_scale: the scale at a timestep, e.g. a GuidanceSchedule. If given, every call
                of the model receives it as ``cfg_scale``.
            noise_at: noise of each loop step; None draws from torch's global generator.
            bar: a progress bar that counts latents. Each step advances it by its part of them.
        """
        self.reset()
        kwargs = dict(model_kwargs or {})
        for i, timestep in enumerate(self.timesteps, start=1):
            if guidance_scale is not None:
                kwargs["cfg_scale"] = guidance_scale(timestep)
            t = torch.full((len(x),), timestep, dtype=torch.long, device=x.device)
            output = model(x, t, **kwargs)
            x = self.update(output, x, i, noise_at)
            if bar is not None:
                bar.update(len(x) / len(self.timesteps))
        return x

    def reset(self) -> None:
        """Forget the history of an earlier run; a sampler without history does nothing."""

    def update(
        self, output: torch.Tensor, x: torch.Tensor, i: int, noise_at: NoiseAt | None
    ) -> torch.Tensor:
        """The next x, (B, C, ...).

        Args:
            output: the network's output at x, (B, 2C, ...).
            x: the current latents, (B, C, ...).
            i: number of the loop step, from 1.
            noise_at: gives the noise of a loop step; None draws it from torch's global generator.
        """
        raise NotImplementedError


class _RespacedSampler(Sampler):
    """A sampler over a respaced process.

    Args:
        steps: see :func:`edt.diffusion.schedule.respaced_timesteps`.
    """

    def __init__(self, steps: str | int) -> None:
        self.diffusion = create_diffusion(steps)
        self.timesteps = self.diffusion.timestep_map[::-1].tolist()

    def _index(self, i: int, x: torch.Tensor) -> torch.Tensor:
        """Timestep of the respaced process at loop step i, (B,) int64."""
        index = self.diffusion.num_timesteps - i
        return torch.full((len(x),), index, dtype=torch.long, device=x.device)


class DDPMSampler(_RespacedSampler):
    """Ancestral sampling with the learned variance (DDPM, algorithm 2), the release's sampler."""

    def update(
        self, output: torch.Tensor, x: torch.Tensor, i: int, noise_at: NoiseAt | None
    ) -> torch.Tensor:
        p = self.diffusion.p_mean_variance(output, x, self._index(i, x))
        if i == len(self.timesteps):  # the last step adds no noise
            return p.mean
        return p.mean + (0.5 * p.log_variance).exp() * _noise(noise_at, i, x)


class DDIMSampler(_RespacedSampler):
    """DDIM (Song et al., 2021, Eq. 12).

    Args:
        steps: see :func:`edt.diffusion.schedule.respaced_timesteps`.
        eta: 0 is deterministic; 1 adds as much noise as DDPM with the posterior variance.
    """

    def __init__(self, steps: str | int, eta: float = 0.0) -> None:
        super().__init__(steps)
        self.eta = eta

    def update(
        self, output: torch.Tensor, x: torch.Tensor, i: int, noise_at: NoiseAt | None
    ) -> torch.Tensor:
        t = self._index(i, x)
        alpha_bar = self.diffusion.at("alphas_cumprod", t, x)
        previous = self.diffusion.at("alphas_cumprod_prev", t, x)
        eps = output.chunk(2, dim=1)[0]
        pred_xstart = (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
        variance_ratio = (1 - previous) / (1 - alpha_bar)
        sigma = self.eta * variance_ratio.sqrt() * (1 - alpha_bar / previous).sqrt()
        x = previous.sqrt() * pred_xstart + (1 - previous - sigma.square()).sqrt() * eps
        if self.eta == 0 or i == len(self.timesteps):
            return x
        return x + sigma * _noise(noise_at, i, x)


def _noise(noise_at: NoiseAt | None, i: int, like: torch.Tensor) -> torch.Tensor:
    return torch.randn_like(like) if noise_at is None else noise_at(i)

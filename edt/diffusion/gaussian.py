"""Gaussian diffusion with noise prediction and learned variance range.

Sources: DDPM (Ho et al., 2020) and Improved DDPM (Nichol & Dhariwal, 2021).

Shapes: x is (B, C, ...). The output of a network is (B, 2C, ...): predicted noise, then the
variance range v. Timesteps ``t`` are (B,) int64 indices of the respaced process, 0 the cleanest. A
network sees the timesteps of the full 1000-step process, which
:meth:`GaussianDiffusion.full_timesteps` gives.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from edt.diffusion.schedule import linear_betas, respaced_timesteps

MIN_SNR_GAMMA = 5.0  # the release's loss weight min(SNR, gamma) / SNR (Hang et al., 2023)


class Losses(NamedTuple):
    """Losses of one pass, each (B,)."""

    loss: torch.Tensor  # mse + vb
    mse: torch.Tensor  # error of the predicted noise, weighted by min-SNR
    vb: torch.Tensor  # variational bound in bits per dimension; it trains the variance only


class Posterior(NamedTuple):
    """The predicted p(x_{t-1} | x_t) and the predicted x_0, each (B, C, ...)."""

    mean: torch.Tensor
    variance: torch.Tensor
    log_variance: torch.Tensor
    pred_xstart: torch.Tensor  # the predicted clean x_0, not clipped


class GaussianDiffusion:
    """A diffusion process over chosen timesteps of a schedule; see :func:`create_diffusion`.

    Args:
        betas: the full process, (T,) float64.
        timesteps: the timesteps of the full process to keep, ascending.
        min_snr_gamma: gamma of the loss weight.

    Attributes:
        timestep_map: timesteps of the full process, (num_timesteps,) int64.
        betas: the respaced betas, (num_timesteps,) float64.
        tables: everything derived from them, by name, each (num_timesteps,) float64.
    """

    def __init__(
        self,
        betas: np.ndarray,
        timesteps: Sequence[int],
        min_snr_gamma: float = MIN_SNR_GAMMA,
    ) -> None:
        self.timestep_map = np.asarray(timesteps, dtype=np.int64)
        alpha_bar = np.cumprod(1 - betas)[self.timestep_map]
        self.betas = 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])
        self.tables = _tables(self.betas, min_snr_gamma)
        self._device_tables: dict[torch.device, dict[str, torch.Tensor]] = {}

    @property
    def num_timesteps(self) -> int:
        """Length of the respaced process."""
        return len(self.betas)

    def full_timesteps(self, t: torch.Tensor) -> torch.Tensor:
        """Timesteps of the full 1000-step process, (B,), which a network is called with."""
        return self._table("timestep_map", t.device)[t]

    def q_sample(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise (DDPM, Eq. 4)."""
        signal = self.at("sqrt_alphas_cumprod", t, x_start)
        sigma = self.at("sqrt_one_minus_alphas_cumprod", t, x_start)
        return signal * x_start + sigma * noise

    def q_posterior_mean(
        self, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """Mean of q(x_{t-1} | x_t, x_0) (DDPM, Eq. 7)."""
        coefficient1 = self.at("posterior_mean_coef1", t, x_t)
        coefficient2 = self.at("posterior_mean_coef2", t, x_t)
        return coefficient1 * x_start + coefficient2 * x_t

    def p_mean_variance(
        self, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> Posterior:
        """Read p(x_{t-1} | x_t) off a network's output. x_0 is not clipped: latents have no range.

        Args:
            output: predicted noise and variance range, (B, 2C, ...).
            x_t: the network's input, (B, C, ...).
            t: timesteps of this process, (B,).
        """
        eps, v = output.chunk(2, dim=1)
        # v in [-1, 1] interpolates the logarithms of the two bounds of the variance
        # (Improved DDPM, Eq. 15).
        fraction = (v + 1) / 2
        upper = self.at("log_betas", t, x_t)
        lower = self.at("posterior_log_variance_clipped", t, x_t)
        log_variance = fraction * upper + (1 - fraction) * lower
        scale_x = self.at("sqrt_recip_alphas_cumprod", t, x_t)
        scale_eps = self.at("sqrt_recipm1_alphas_cumprod", t, x_t)
        pred_xstart = scale_x * x_t - scale_eps * eps
        mean = self.q_posterior_mean(pred_xstart, x_t, t)
        return Posterior(mean, log_variance.exp(), log_variance, pred_xstart)

    def losses(
        self,
        output: torch.Tensor,
        x_start: torch.Tensor,
        x_t: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor,
    ) -> Losses:
        """Losses of one pass (paper, Eq. 3: once for the full, once for the masked pass).

        Args:
            output: the network's output at x_t, (B, 2C, ...).
            x_start: clean latents x_0, (B, C, ...).
            x_t: the noised latents, ``q_sample(x_start, t, noise)``.
            t: timesteps of this process, (B,).
            noise: the noise that the network should predict, (B, C, ...).
        """
        eps, v = output.chunk(2, dim=1)
        mse = self.at("min_snr_weight", t, t) * mean_flat((noise - eps).square())
        # The bound trains the variance only, so the predicted noise is detached in it.
        vb = self._variational_bound(torch.cat([eps.detach(), v], dim=1), x_start, x_t, t)
        # Improved DDPM weights the bound, a sum over T = 1000 steps, by 0.001. vb is one term of
        # that sum at a random t, so its weight is 0.001 T = 1.
        return Losses(mse + vb, mse, vb)

    def at(self, name: str, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Entries of a table at timesteps t, shaped to broadcast over ``like``; float32."""
        return self._table(name, like.device)[t].view(-1, *[1] * (like.ndim - 1))

    def _table(self, name: str, device: torch.device) -> torch.Tensor:
        # Tables are copied to a device once: a copy in every step would make the host wait for it.
        if device not in self._device_tables:
            tables = {
                key: torch.from_numpy(table).float().to(device)
                for key, table in self.tables.items()
            }
            tables["timestep_map"] = torch.from_numpy(self.timestep_map).to(device)
            self._device_tables[device] = tables
        return self._device_tables[device][name]

    def _variational_bound(
        self, output: torch.Tensor, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """Bits per dimension, (B,): KL(q || p), and at t = 0 the negative log-likelihood of x_0."""
        p = self.p_mean_variance(output, x_t, t)
        q_mean = self.q_posterior_mean(x_start, x_t, t)
        q_log_variance = self.at("posterior_log_variance_clipped", t, x_t)
        kl = 0.5 * (
            p.log_variance
            - q_log_variance
            - 1
            + (q_log_variance - p.log_variance).exp()
            + (q_mean - p.mean).square() * (-p.log_variance).exp()
        )
        nll = -discretized_gaussian_log_likelihood(x_start, p.mean, 0.5 * p.log_variance)
        return torch.where(t == 0, mean_flat(nll), mean_flat(kl)) / math.log(2.0)


def create_diffusion(
    timestep_respacing: str | int = "", min_snr_gamma: float = MIN_SNR_GAMMA
) -> GaussianDiffusion:
    """The process of every EDT model: 1000 linear betas, noise prediction, learned variance range.

    Args:
        timestep_respacing: "" keeps all 1000 steps, as training does. "250", "ddim50" and
            "10,15,25" are explained in :func:`edt.diffusion.schedule.respaced_timesteps`.
        min_snr_gamma: gamma of the training loss's weight.

    Raises:
        UserError: the respacing cannot be read or asks for too many steps.
    """
    return GaussianDiffusion(linear_betas(), respaced_timesteps(timestep_respacing), min_snr_gamma)


def mean_flat(x: torch.Tensor) -> torch.Tensor:
    """Mean over all but the batch dimension, (B, ...) -> (B,)."""
    return x.flatten(1).mean(1)


def discretized_gaussian_log_likelihood(
    x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor
) -> torch.Tensor:
    """Log-probability in nats of the bin of width 2/255 around x, under a Gaussian; shaped like x.

    The bins are those of 8-bit pixels. Latents have none, but DiT and EDT keep the bins. The
    outermost bins (beyond +-0.999) reach to infinity. The normal distribution function is
    approximated with tanh, as in ADM (Dhariwal & Nichol, 2021).
    """
    centered, inverse_scale = x - mean, (-log_scale).exp()
    upper = _approximate_normal_cdf(inverse_scale * (centered + 1 / 255))
    lower = _approximate_normal_cdf(inverse_scale * (centered - 1 / 255))
    inner = torch.where(x > 0.999, _safe_log(1 - lower), _safe_log(upper - lower))
    return torch.where(x < -0.999, _safe_log(upper), inner)


def _approximate_normal_cdf(z: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z.pow(3))))


def _safe_log(probability: torch.Tensor) -> torch.Tensor:
    return probability.clamp(min=1e-12).log()


def _tables(betas: np.ndarray, min_snr_gamma: float) -> dict[str, np.ndarray]:
    """Everything a step needs, per timestep, from the betas of the respaced process; float64."""
    alpha_bar = np.cumprod(1 - betas)
    previous = np.append(1.0, alpha_bar[:-1])
    posterior_variance = betas * (1 - previous) / (1 - alpha_bar)
    snr = alpha_bar / (1 - alpha_bar)
    # The posterior variance is 0 at t = 0, so its logarithm would be -inf. Entry 0 takes the value
    # of entry 1. A process of one step has no entry 1 and takes its beta.
    clipped = np.append(posterior_variance[1:2], posterior_variance[1:])
    clipped = clipped if len(betas) > 1 else betas
    return {
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": np.sqrt(alpha_bar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alpha_bar),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / alpha_bar),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / alpha_bar - 1),
        "posterior_variance": posterior_variance,
        "posterior_log_variance_clipped": np.log(clipped),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1 - alpha_bar),
        "posterior_mean_coef2": (1 - previous) * np.sqrt(1 - betas) / (1 - alpha_bar),
        "log_betas": np.log(betas),
        "min_snr_weight": np.minimum(snr, min_snr_gamma) / snr,
    }

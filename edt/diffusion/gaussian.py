"""Gaussian diffusion with noise prediction and learned range variance (DDPM; Nichol & Dhariwal,
2021).

Shapes: x is (B, C, ...), a model's output (B, 2C, ...): predicted noise, then the variance range v.
Timesteps ``t`` of this process are (B,) int64, 0 the cleanest; the model always sees the timestep
of the full 1000-step process."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from tqdm.auto import tqdm

Model = Callable[..., torch.Tensor]  # model(x, t, **model_kwargs)
NoiseAt = Callable[
    [int], torch.Tensor
]  # the i-th noise of a sampling loop, i = 1, 2, ..., shaped like x

MIN_SNR_GAMMA = 5.0  # loss weight min(SNR, gamma) / SNR (Hang et al., 2023), as the release


def mean_flat(x: torch.Tensor) -> torch.Tensor:
    """Mean over all but the batch dimension."""
    return x.flatten(1).mean(1)


def _tables(betas: np.ndarray) -> dict[str, np.ndarray]:
    """Everything a step needs, per timestep, from the betas of the (respaced) process. All
    float64.
    """
    alpha_bar = np.cumprod(1 - betas)
    previous = np.append(1.0, alpha_bar[:-1])
    posterior_variance = betas * (1 - previous) / (1 - alpha_bar)
    snr = alpha_bar / (1 - alpha_bar)
    return {
        "alphas_cumprod": alpha_bar,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": np.sqrt(alpha_bar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alpha_bar),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / alpha_bar),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / alpha_bar - 1),
        "posterior_variance": posterior_variance,
        # The variance is 0 at t = 0; its logarithm takes the next entry's.
        "posterior_log_variance_clipped": np.log(
            np.append(posterior_variance[1:2], posterior_variance[1:])
        )
        if len(betas) > 1
        else np.log(betas),
        "posterior_mean_coef1": betas * np.sqrt(previous) / (1 - alpha_bar),
        "posterior_mean_coef2": (1 - previous) * np.sqrt(1 - betas) / (1 - alpha_bar),
        "log_betas": np.log(betas),
        "min_snr_weight": np.minimum(snr, MIN_SNR_GAMMA) / snr,
    }


class GaussianDiffusion:
    """A diffusion process over the chosen timesteps of a schedule. Make one with
    ``edt.diffusion.create_diffusion``.

    Args:
        betas: the full process, (T,).
        timesteps: the timesteps of it to keep, ascending.

    Attributes:
        timestep_map: timesteps of the full process, (num_timesteps,) int64.
        betas: the respaced betas, (num_timesteps,) float64; the other tables (``alphas_cumprod``,
            ``posterior_variance``, ...) are in ``tables``.
    """

    def __init__(self, betas: np.ndarray, timesteps: Sequence[int]):
        self.timestep_map = np.asarray(timesteps, dtype=np.int64)
        alpha_bar = np.cumprod(1 - betas)[self.timestep_map]
        self.betas = 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])
        self.tables = _tables(self.betas)
        self._on_device: dict[torch.device, dict[str, torch.Tensor]] = {}

    @property
    def num_timesteps(self) -> int:
        return len(self.betas)

    def _table(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A table as a float32 tensor beside ``like``; copied to each device once, so that no step
        waits for it.
        """
        if like.device not in self._on_device:
            tensors = {
                key: torch.from_numpy(table).float().to(like.device)
                for key, table in self.tables.items()
            }
            tensors["timestep_map"] = torch.from_numpy(self.timestep_map).to(like.device)
            self._on_device[like.device] = tensors
        return self._on_device[like.device][name]

    def _at(self, name: str, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Entries of a table at t, shaped to broadcast over ``like``."""
        return self._table(name, like)[t].view(-1, *[1] * (like.ndim - 1))

    def _call(
        self, model: Model, x: torch.Tensor, t: torch.Tensor, model_kwargs: dict | None
    ) -> torch.Tensor:
        return model(x, self._table("timestep_map", x)[t], **(model_kwargs or {}))

    def q_sample(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise."""
        return (
            self._at("sqrt_alphas_cumprod", t, x_start) * x_start
            + self._at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise
        )

    def q_posterior_mean(
        self, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """Mean of q(x_{t-1} | x_t, x_0)."""
        return (
            self._at("posterior_mean_coef1", t, x_t) * x_start
            + self._at("posterior_mean_coef2", t, x_t) * x_t
        )

    def _predict(
        self, output: torch.Tensor, x: torch.Tensor, t: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """What a model output (B, 2C, ...) says of p(x_{t-1} | x_t)."""
        eps, v = output.chunk(2, dim=1)
        fraction = (v + 1) / 2  # v in [-1, 1] spans the two bounds of the variance, in logarithms
        log_variance = fraction * self._at("log_betas", t, x) + (1 - fraction) * self._at(
            "posterior_log_variance_clipped", t, x
        )
        pred_xstart = (
            self._at("sqrt_recip_alphas_cumprod", t, x) * x
            - self._at("sqrt_recipm1_alphas_cumprod", t, x) * eps
        )
        return {
            "mean": self.q_posterior_mean(pred_xstart, x, t),
            "variance": log_variance.exp(),
            "log_variance": log_variance,
            "pred_xstart": pred_xstart,
        }

    def p_mean_variance(
        self, model: Model, x: torch.Tensor, t: torch.Tensor, model_kwargs: dict | None = None
    ) -> dict[str, torch.Tensor]:
        """{"mean", "variance", "log_variance", "pred_xstart"} of p(x_{t-1} | x_t), each like x.
        Nothing is clipped.
        """
        return self._predict(self._call(model, x, t, model_kwargs), x, t)

    def training_losses(
        self,
        model: Model,
        x_start: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor,
        model_kwargs: dict | None = None,
    ) -> dict[str, torch.Tensor]:
        """Loss of one pass (paper, Eq. 3: once for the full, once for the masked pass).

        "mse" is the min-SNR-weighted error of the predicted noise; "vb" the variational bound in
        bits, which trains the variance only (the predicted noise is detached in it); "loss" their
        sum.

        Args:
            model: called as model(x_t, t of the full process, **model_kwargs).
            x_start: clean latents, (B, C, ...).
            t: timesteps, (B,).
            noise: like x_start.

        Returns:
            {"loss", "mse", "vb"}, each (B,).
        """
        x_t = self.q_sample(x_start, t, noise)
        output = self._call(model, x_t, t, model_kwargs)
        eps, v = output.chunk(2, dim=1)
        mse = self._at("min_snr_weight", t, t) * mean_flat((noise - eps).square())
        vb = self._variational_bound(torch.cat([eps.detach(), v], dim=1), x_start, x_t, t)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _variational_bound(
        self, output: torch.Tensor, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """(B,) bits a dimension: KL(q || p), or at t = 0 the negative log-likelihood of x_0."""
        p = self._predict(output, x_t, t)
        q_mean = self.q_posterior_mean(x_start, x_t, t)
        q_log_variance = self._at("posterior_log_variance_clipped", t, x_t)
        kl = 0.5 * (
            p["log_variance"]
            - q_log_variance
            - 1
            + (q_log_variance - p["log_variance"]).exp()
            + (q_mean - p["mean"]).square() * (-p["log_variance"]).exp()
        )
        nll = -discretized_gaussian_log_likelihood(x_start, p["mean"], 0.5 * p["log_variance"])
        return torch.where(t == 0, mean_flat(nll), mean_flat(kl)) / math.log(2.0)

    @torch.no_grad()
    def p_sample_loop(
        self,
        model: Model,
        x: torch.Tensor,
        model_kwargs: dict | None = None,
        noise_at: NoiseAt | None = None,
        progress: bool = False,
    ) -> torch.Tensor:
        """Ancestral sampling from noise x to a clean latent.

        Args:
            model: called as model(x, t of the full process, **model_kwargs).
            x: standard normal noise, (B, C, ...).
            noise_at: gives the noise of step i = 1, 2, ...; None draws from torch's global
                generator.
            progress: show a progress bar over the steps.
        """
        for i, step, t in self._countdown(x, progress):
            p = self.p_mean_variance(model, x, t, model_kwargs)
            x = p["mean"]
            if step > 0:  # the last step adds no noise
                x = x + (0.5 * p["log_variance"]).exp() * (
                    torch.randn_like(x) if noise_at is None else noise_at(i)
                )
        return x

    @torch.no_grad()
    def ddim_sample_loop(
        self,
        model: Model,
        x: torch.Tensor,
        model_kwargs: dict | None = None,
        noise_at: NoiseAt | None = None,
        eta: float = 0.0,
        progress: bool = False,
    ) -> torch.Tensor:
        """DDIM (Song et al., 2021, Eq. 12); ``eta`` 0 is deterministic, 1 is DDPM-like. Arguments
        as p_sample_loop.
        """
        for i, step, t in self._countdown(x, progress):
            alpha_bar, previous = (
                self._at("alphas_cumprod", t, x),
                self._at("alphas_cumprod_prev", t, x),
            )
            eps = self._call(model, x, t, model_kwargs).chunk(2, dim=1)[0]
            pred_xstart = (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
            sigma = (
                eta * ((1 - previous) / (1 - alpha_bar)).sqrt() * (1 - alpha_bar / previous).sqrt()
            )
            x = previous.sqrt() * pred_xstart + (1 - previous - sigma.square()).sqrt() * eps
            if step > 0 and eta > 0:
                x = x + sigma * (torch.randn_like(x) if noise_at is None else noise_at(i))
        return x

    def _countdown(self, x: torch.Tensor, progress: bool):
        """(i, step, t) with i = 1, 2, ..., step falling to 0 and t = step for every row of x."""
        steps = range(self.num_timesteps - 1, -1, -1)
        for i, step in enumerate(
            tqdm(steps, desc="denoising", leave=False, disable=not progress), start=1
        ):
            yield i, step, torch.full((len(x),), step, dtype=torch.long, device=x.device)


def discretized_gaussian_log_likelihood(
    x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor
) -> torch.Tensor:
    """Log-probability of the bin of width 2/255 around x under a Gaussian, in nats, like x.

    The outermost bins (beyond +-0.999) reach to infinity; the cumulative distribution is the tanh
    approximation."""

    def cdf(z: torch.Tensor) -> torch.Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z.pow(3))))

    def log(p: torch.Tensor) -> torch.Tensor:
        return p.clamp(min=1e-12).log()

    centered, inverse_scale = x - mean, (-log_scale).exp()
    upper = cdf(inverse_scale * (centered + 1 / 255))
    lower = cdf(inverse_scale * (centered - 1 / 255))
    return torch.where(
        x < -0.999, log(upper), torch.where(x > 0.999, log(1 - lower), log(upper - lower))
    )

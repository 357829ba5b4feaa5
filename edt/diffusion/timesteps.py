"""Timestep samplers for training: which t a batch trains on, and the importance weight that keeps
the loss unbiased.

Both live on the device and never wait for the host. In a run of many processes every process draws
for the whole global batch and updates with the losses of all, in global order, so that all hold the
same history."""

import torch
from torch import nn

from edt.utils.errors import UserError


class UniformSampler(nn.Module):
    """Every timestep with equal probability and weight 1."""

    def __init__(self, num_timesteps: int = 1000):
        super().__init__()
        self.num_timesteps = num_timesteps

    def sample(self, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """n timesteps, (n,) int64, and their importance weights, (n,) float32, on the generator's
        device.
        """
        t = torch.randint(self.num_timesteps, (n,), generator=generator, device=generator.device)
        return t, torch.ones(n, device=t.device)

    def update(
        self, t: torch.Tensor, loss: torch.Tensor, apply: torch.Tensor | bool = True
    ) -> None:
        """Take note of unweighted losses, (n,) each; nothing to do here."""


class LossSecondMomentSampler(nn.Module):
    """Importance sampling by the root-mean-square of each timestep's last losses (Nichol &
    Dhariwal, 2021, section 3.3).

    Uniform until every timestep holds ``history`` losses.

    Args:
        num_timesteps: T.
        history: losses kept per timestep.
        uniform_share: u; the probability is (1 - u) rms / sum(rms) + u / T.
    """

    def __init__(self, num_timesteps: int = 1000, history: int = 10, uniform_share: float = 0.001):
        super().__init__()
        self.num_timesteps, self.history, self.uniform_share = num_timesteps, history, uniform_share
        # A ring per timestep. The extra last row takes what must be thrown away without a branch on
        # the host.
        self.register_buffer("losses", torch.zeros(num_timesteps + 1, history, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(num_timesteps, dtype=torch.int64))

    def probabilities(self) -> torch.Tensor:
        """Probability of each timestep, (T,) float64."""
        rms = self.losses[:-1].square().mean(dim=1).sqrt()
        weighted = (
            rms / rms.sum() * (1 - self.uniform_share) + self.uniform_share / self.num_timesteps
        )
        warm = (self.counts >= self.history).all()
        return torch.where(warm, weighted, torch.full_like(weighted, 1 / self.num_timesteps))

    def sample(self, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """n timesteps, (n,) int64, and their importance weights 1 / (T p), (n,) float32.

        The generator lives on the sampler's device.
        """
        p = self.probabilities()
        edges = p.cumsum(0)
        u = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)
        t = torch.searchsorted(edges, u * edges[-1], right=True).clamp_(max=self.num_timesteps - 1)
        return t, (1 / (self.num_timesteps * p[t])).float()

    def update(
        self, t: torch.Tensor, loss: torch.Tensor, apply: torch.Tensor | bool = True
    ) -> None:
        """Append unweighted losses to the histories; equal timesteps of one batch enter in the
        batch's order.

        Args:
            t: timesteps of the global batch, (n,).
            loss: their losses, (n,).
            apply: () bool; False leaves the histories as they are.
        """
        equal = t[:, None] == t
        earlier = equal.tril(diagonal=-1).sum(dim=1)  # equal timesteps before this one
        later = equal.triu(diagonal=1).sum(dim=1)
        slot = (self.counts[t] + earlier) % self.history
        kept = (later < self.history) & apply  # not older than the ring is long
        self.losses[torch.where(kept, t, self.num_timesteps), slot] = torch.where(
            kept, loss.detach().double(), 0
        )
        self.counts.index_add_(0, t, torch.ones_like(t) * apply)


def create_timestep_sampler(
    name: str, num_timesteps: int = 1000
) -> UniformSampler | LossSecondMomentSampler:
    """The sampler called "uniform" or "loss-second-moment"."""
    samplers = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentSampler}
    if name not in samplers:
        raise UserError(f"unknown timestep sampler {name!r}; choose one of {', '.join(samplers)}")
    return samplers[name](num_timesteps)

"""Timestep samplers: they draw each image's training timestep and its importance weight.

With these weights, the expected loss equals the loss under uniform timesteps. The state of a
sampler is on the device, and no method makes the host wait. In a run of many processes, every
process draws for the whole global batch. Every process also updates with the global batch's losses,
in the same order, so that all hold the same history.
"""

from typing import Literal, Protocol

import torch
from torch import nn

from edt.utils.choices import check_choice


class TimestepSampler(Protocol):
    """The interface that training needs. The implementations are torch modules."""

    def sample(self, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw n timesteps, (n,) int64, and their importance weights, (n,) float32."""

    def update(
        self, t: torch.Tensor, loss: torch.Tensor, found_inf: torch.Tensor | None = None
    ) -> None:
        """Take in the unweighted losses (n,) at timesteps t (n,), unless ``found_inf``."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The history, as named tensors."""

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> object:
        """Inverse of ``state_dict``."""


class UniformSampler(nn.Module):
    """Every timestep with equal probability and weight 1."""

    def __init__(self, num_timesteps: int = 1000) -> None:
        super().__init__()
        self.num_timesteps = num_timesteps

    def sample(self, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        t = torch.randint(self.num_timesteps, (n,), generator=generator, device=generator.device)
        return t, torch.ones(n, device=t.device)

    def update(
        self, t: torch.Tensor, loss: torch.Tensor, found_inf: torch.Tensor | None = None
    ) -> None:
        """Do nothing: there is no history."""


class LossSecondMomentSampler(nn.Module):
    """Importance sampling by the root-mean-square of each timestep's last losses.

    Source: Nichol & Dhariwal (2021), section 3.3. Sampling is uniform until every timestep holds
    ``history`` losses.

    Args:
        num_timesteps: T.
        history: losses kept per timestep.
        uniform_share: u; the probability is (1 - u) rms / sum(rms) + u / T.
    """

    losses: torch.Tensor  # (T + 1, history) float64
    counts: torch.Tensor  # (T,) int64, losses that each timestep has received

    def __init__(
        self, num_timesteps: int = 1000, history: int = 10, uniform_share: float = 0.001
    ) -> None:
        super().__init__()
        self.num_timesteps, self.history = num_timesteps, history
        self.uniform_share = uniform_share
        # Each row is the ring buffer of a timestep. The extra last row takes the losses that update
        # discards: a boolean index would skip them, but make the host wait for their number.
        losses = torch.zeros(num_timesteps + 1, history, dtype=torch.float64)
        self.register_buffer("losses", losses)
        self.register_buffer("counts", torch.zeros(num_timesteps, dtype=torch.int64))

    def probabilities(self) -> torch.Tensor:
        """Probability of each timestep, (T,) float64."""
        rms = self.losses[:-1].square().mean(dim=1).sqrt()
        weighted = rms / rms.sum() * (1 - self.uniform_share)
        weighted = weighted + self.uniform_share / self.num_timesteps
        is_warm = (self.counts >= self.history).all()
        return torch.where(is_warm, weighted, torch.full_like(weighted, 1 / self.num_timesteps))

    def sample(self, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw timesteps and their importance weights 1 / (T p).

        Args:
            n: how many.
            generator: lives on the sampler's device.

        Returns:
            timesteps (n,) int64 and weights (n,) float32.
        """
        p = self.probabilities()
        edges = p.cumsum(0)
        device = generator.device
        u = torch.rand(n, generator=generator, device=device, dtype=torch.float64)
        t = torch.searchsorted(edges, u * edges[-1], right=True)
        t = t.clamp_(max=self.num_timesteps - 1)  # rounding may put u beyond the last edge
        return t, (1 / (self.num_timesteps * p[t])).float()

    def update(
        self, t: torch.Tensor, loss: torch.Tensor, found_inf: torch.Tensor | None = None
    ) -> None:
        """Append unweighted losses to the histories of their timesteps, in the batch's order.

        Args:
            t: timesteps of the global batch, (n,).
            loss: their losses, (n,).
            found_inf: () bool; True leaves the histories as they are.
        """
        equal = t[:, None] == t
        earlier = equal.tril(diagonal=-1).sum(dim=1)  # equal timesteps before this one
        later = equal.triu(diagonal=1).sum(dim=1)
        slot = (self.counts[t] + earlier) % self.history
        # A batch may hold more losses of a timestep than its ring buffer. Only the newest are
        # stored, because the order of two writes to one slot is undefined on a GPU.
        is_stored = later < self.history
        increment = torch.ones_like(t)
        if found_inf is not None:
            is_stored = is_stored & ~found_inf
            increment = increment * ~found_inf
        row = torch.where(is_stored, t, self.num_timesteps)
        self.losses[row, slot] = torch.where(is_stored, loss.detach().double(), 0)
        self.counts.index_add_(0, t, increment)


TimestepSamplerName = Literal["uniform", "loss-second-moment"]

TIMESTEP_SAMPLERS: dict[TimestepSamplerName, type[UniformSampler | LossSecondMomentSampler]] = {
    "uniform": UniformSampler,
    "loss-second-moment": LossSecondMomentSampler,
}


def create_timestep_sampler(
    name: TimestepSamplerName, num_timesteps: int = 1000
) -> UniformSampler | LossSecondMomentSampler:
    """Create a timestep sampler by name, over ``num_timesteps`` timesteps.

    Raises:
        UserError: unknown name.
    """
    check_choice("timestep sampler", name, TimestepSamplerName)
    return TIMESTEP_SAMPLERS[name](num_timesteps)

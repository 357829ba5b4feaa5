"""Exponential moving average of the weights."""

from collections.abc import Iterable

import torch


@torch.no_grad()
def update_ema(
    averages: Iterable[torch.Tensor], parameters: Iterable[torch.Tensor], decay: float
) -> None:
    """average <- decay * average + (1 - decay) * parameter, in place.

    Call it after the optimizer's step. Buffers are constant tables and need no average.

    Args:
        averages: one tensor per parameter, in the same order.
        parameters: the trained weights.
        decay: per step.
    """
    averages = list(averages)
    torch._foreach_mul_(averages, decay)
    torch._foreach_add_(averages, list(parameters), alpha=1 - decay)

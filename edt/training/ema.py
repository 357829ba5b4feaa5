"""Exponential moving average of the weights."""

import torch
from torch import nn


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float = 0.9999) -> None:
    """ema <- decay * ema + (1 - decay) * model, for the parameters; buffers are constant tables and
    stay.

    Call it after the optimizer's step. ``model`` may be wrapped, as long as its parameters come in
    the same order."""
    averages = list(ema.parameters())
    torch._foreach_mul_(averages, decay)
    torch._foreach_add_(averages, list(model.parameters()), alpha=1 - decay)

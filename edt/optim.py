"""Optimizers and the learning rate (paper, section 4.1; the release's settings)."""

import logging
from collections.abc import Iterable

import timm.optim
import torch

from edt.errors import UserError

logger = logging.getLogger(__name__)

BETAS = (0.98, 0.92, 0.99)
FINAL_LR = 5e-5

OPTIMIZERS = {
    "adan": "Adan as its authors publish it (timm's implementation of the same update)",
    "adan-pytorch": "the adan-pytorch package: another update. Its first step moves nothing; after 60 steps on the "
    "reference trajectory its weights are off by 0.0066, where the official ones have moved by 0.012",
}


def create_optimizer(
    name: str, params: Iterable[torch.nn.Parameter], lr: float, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """Adan with the release's betas (0.98, 0.92, 0.99) and eps 1e-8.

    Args:
        name: a key of :data:`OPTIMIZERS`.
        weight_decay: proximal decay; the release uses none.
    """
    if name == "adan":
        return timm.optim.Adan(params, lr=lr, betas=BETAS, eps=1e-8, weight_decay=weight_decay)
    if name == "adan-pytorch":
        try:
            from adan_pytorch import Adan
        except ImportError:
            raise UserError("--optimizer adan-pytorch needs the package: pip install adan-pytorch") from None
        logger.warning("optimizer adan-pytorch: %s", OPTIMIZERS[name])
        # This package writes the moving averages with the complements of the betas.
        return Adan(params, lr=lr, betas=tuple(1 - beta for beta in BETAS), eps=1e-8, weight_decay=weight_decay)
    raise UserError(f"unknown optimizer {name!r}; choose one of {', '.join(OPTIMIZERS)}")


def learning_rate(step: int, initial: float, decay_steps: int) -> float:
    """Linear from ``initial`` to 5e-5 over ``decay_steps``, then constant; no warm-up.

    Args:
        step: optimizer steps taken so far; the first step uses ``initial``.
    """
    final = min(FINAL_LR, initial)
    return initial - (initial - final) * min(step / decay_steps, 1.0)

"""Optimizers and the learning rate (paper, section 4.1; the release's settings)."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch

from edt.training.ema import update_ema
from edt.utils.choices import check_choice
from edt.utils.errors import UserError

logger = logging.getLogger(__name__)

BETAS = (0.98, 0.92, 0.99)
EPS = 1e-8

OptimizerName = Literal["adan", "adan-pytorch"]
OPTIMIZERS: dict[OptimizerName, str] = {
    "adan": "Adan as its authors publish it",
    "adan-pytorch": "the adan-pytorch package, which computes a different update (its first step "
    "changes no weight; after 60 golden steps a weight is up to 0.0066 from official Adan's, which "
    "has moved by up to 0.012)",
}

STATE = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad")  # the release's names
CPU_CHUNK = 2**18  # elements; seven tensors of this size stay in a core's cache


class StepOptimizer(Protocol):
    """What the trainer asks of an optimizer."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """See torch.optim.Optimizer."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""

    def step(
        self,
        *,
        found_inf: torch.Tensor,
        ema_params: Sequence[torch.Tensor],
        ema_decay: float,
    ) -> None:
        """Update parameters and their moving averages, unless ``found_inf``.

        Args:
            found_inf: () bool on the parameters' device; True leaves every value unchanged.
            ema_params: one tensor per parameter, in the parameters' order.
            ema_decay: average <- decay * average + (1 - decay) * parameter.
        """

    def state_dict(self) -> dict[str, Any]:
        """See torch.optim.Optimizer."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See torch.optim.Optimizer."""


class _Factors(NamedTuple):
    """Scalar factors of one Adan step; each is a () float32 tensor on the device.

    In a skipped step the factors have the values that leave every tensor unchanged.
    """

    not_skipped: torch.Tensor  # 1, or 0 in a skipped step
    weight1: torch.Tensor  # 1 - beta1: update weight of exp_avg
    weight2: torch.Tensor  # 1 - beta2: update weight of exp_avg_diff; 0 in the first step
    weight3: torch.Tensor  # 1 - beta3: update weight of exp_avg_sq
    beta2: torch.Tensor  # factor of the gradient difference; 0 in the first step, which has none
    step1: torch.Tensor  # step size for exp_avg, with bias correction
    step2: torch.Tensor  # step size for exp_avg_diff, with bias correction
    eps: torch.Tensor
    decay: torch.Tensor | None  # None without weight decay
    ema_weight: torch.Tensor  # 1 - ema_decay: update weight of the EMA


def _adan(tensors: Sequence[torch.Tensor], factors: _Factors) -> None:
    """Algorithm 1 of Adan (Xie et al., 2022), in place, and the moving average of its result."""
    p, grad, exp_avg, exp_avg_diff, exp_avg_sq, neg_pre_grad, *ema_params = tensors
    f = factors
    grad = torch.where(f.not_skipped > 0, grad, 0)
    diff = neg_pre_grad.add_(grad)
    exp_avg.lerp_(grad, f.weight1)
    exp_avg_diff.lerp_(diff, f.weight2)
    nesterov = torch.addcmul(grad, diff, f.beta2)
    exp_avg_sq.lerp_(nesterov.square_(), f.weight3)
    denominator = torch.sqrt(exp_avg_sq, out=nesterov).add_(f.eps)
    # Two divisions, as in the official code. One division of the sum rounds differently, and is
    # 1.4e-6 from the official weights after 60 steps.
    p.addcdiv_(exp_avg * f.step1, denominator, value=-1)
    p.addcdiv_(exp_avg_diff * f.step2, denominator, value=-1)
    if f.decay is not None:
        p.mul_(f.decay)
    neg_pre_grad.mul_(1 - f.not_skipped).sub_(grad)  # -grad; in a skipped step the earlier value
    for average in ema_params:
        average.lerp_(p, f.ema_weight)


class Adan(torch.optim.Optimizer):
    """Adan (Xie et al., 2022) with proximal weight decay, as its authors' code computes it.

    A step reads each tensor from memory once (on a GPU only if compiled) and also updates the EMA
    of the weights. ``found_inf`` is a tensor on the device. So a step can be skipped while the host
    does not wait to learn whether the gradients were finite.

    Args:
        params: of one dtype and device.
        lr: learning rate.
        betas: of the gradient, of its difference, of its square.
        eps: added to the denominator.
        weight_decay: proximal decay.
        compiled: run the pass as one kernel per parameter, through torch.compile.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float,
        betas: tuple[float, float, float] = BETAS,
        eps: float = EPS,
        weight_decay: float = 0.0,
        compiled: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.compiled = compiled
        self._update = torch.compile(_adan, dynamic=True) if compiled else _adan

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: None = None,
        *,
        found_inf: torch.Tensor | None = None,
        ema_params: Sequence[torch.Tensor] = (),
        ema_decay: float = 0.0,
    ) -> None:
        """Update parameters and their moving averages; see :class:`StepOptimizer`."""
        remaining_ema = iter(ema_params)
        for group in self.param_groups:
            params = group["params"]
            device = params[0].device
            if found_inf is None:
                not_skipped = torch.ones((), device=device)
            else:
                not_skipped = (~found_inf).to(torch.float32)
            step = torch.as_tensor(group.get("step", 0.0), dtype=torch.float64, device=device)
            group["step"] = step + not_skipped
            factors = self._factors(group, not_skipped, ema_decay)
            for p in params:
                average = next(remaining_ema, None)
                if p.grad is None:
                    continue
                self.state[p] = self.state[p] or {name: torch.zeros_like(p) for name in STATE}
                tensors = [p, p.grad.contiguous(), *(self.state[p][name] for name in STATE)]
                tensors += [] if average is None else [average]
                for chunk in self._chunks(tensors):
                    self._update(chunk, factors)

    def _factors(
        self, group: dict[str, Any], not_skipped: torch.Tensor, ema_decay: float
    ) -> _Factors:
        """The factors of this step; computed in float64, from the float64 step counter."""
        (beta1, beta2, beta3), lr = group["betas"], group["lr"]
        step = group["step"].clamp(min=1)  # it is 0 only if every step was skipped
        has_previous = (step > 1).to(not_skipped)
        root = (1 - beta3**step).sqrt()  # bias correction of sqrt(exp_avg_sq)
        decay = None
        if group["weight_decay"]:
            decay = (1 / (1 + not_skipped * lr * group["weight_decay"])).float()
        return _Factors(
            not_skipped=not_skipped.float(),
            weight1=(not_skipped * (1 - beta1)).float(),
            weight2=(not_skipped * has_previous * (1 - beta2)).float(),
            weight3=(not_skipped * (1 - beta3)).float(),
            beta2=(has_previous * beta2).float(),
            step1=(not_skipped * lr * root / (1 - beta1**step)).float(),
            step2=(not_skipped * lr * beta2 * root / (1 - beta2**step)).float(),
            eps=(group["eps"] * root).float(),
            decay=decay,
            ema_weight=(not_skipped * (1 - ema_decay)).float(),
        )

    def _chunks(self, tensors: Sequence[torch.Tensor]) -> Iterable[tuple[torch.Tensor, ...]]:
        """Flat pieces of tensors of one shape.

        On an uncompiled CPU the chunks stay in the cache between operations. A compiled kernel
        reads each element once, and a GPU gains nothing from small chunks, so both get one chunk.
        """
        one_piece = self.compiled or tensors[0].device.type != "cpu"
        size = tensors[0].numel() if one_piece else CPU_CHUNK
        return zip(*(tensor.detach().view(-1).split(size) for tensor in tensors), strict=True)


class HostCheckedOptimizer:
    """Gives any torch optimizer the step of :class:`StepOptimizer`.

    Such an optimizer cannot skip a step on the device, so the host waits for ``found_inf``.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(
        self,
        *,
        found_inf: torch.Tensor,
        ema_params: Sequence[torch.Tensor],
        ema_decay: float,
    ) -> None:
        if found_inf:
            return
        self.optimizer.step()
        parameters = [p for group in self.param_groups for p in group["params"]]
        update_ema(ema_params, parameters, ema_decay)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)


def create_optimizer(
    name: OptimizerName,
    params: Iterable[torch.nn.Parameter],
    lr: float,
    weight_decay: float = 0.0,
    compiled: bool = False,
) -> StepOptimizer:
    """Adan with the release's betas and eps.

    Args:
        name: a key of :data:`OPTIMIZERS`.
        params: the parameters to train.
        lr: learning rate.
        weight_decay: proximal decay; the release uses none.
        compiled: as in :class:`Adan`; the package's optimizer ignores it.

    Raises:
        UserError: unknown name, or its package is not installed.
    """
    check_choice("optimizer", name, OptimizerName)
    if name == "adan":
        return Adan(params, lr, weight_decay=weight_decay, compiled=compiled)
    try:
        import adan_pytorch
    except ImportError:
        raise UserError(
            "--optimizer adan-pytorch needs the package: pip install adan-pytorch"
        ) from None
    logger.warning("optimizer adan-pytorch: %s", OPTIMIZERS[name])
    # This package writes the moving ema_params with the complements of the betas.
    betas = tuple(1 - beta for beta in BETAS)
    optimizer = adan_pytorch.Adan(params, lr=lr, betas=betas, eps=EPS, weight_decay=weight_decay)
    return HostCheckedOptimizer(optimizer)


def learning_rate(step: int, initial: float, final: float, decay_steps: int) -> float:
    """Linear from ``initial`` to ``final`` over ``decay_steps``, then constant; no warm-up.

    Args:
        step: steps taken so far; the first step uses ``initial``.
        initial: learning rate of the first step.
        final: learning rate at the end. If ``initial`` is below it, the rate stays ``initial``.
        decay_steps: length of the decay in steps.
    """
    final = min(final, initial)
    return initial - (initial - final) * min(step / decay_steps, 1.0)

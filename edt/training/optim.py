"""Optimizers and the learning rate (paper, section 4.1; the release's settings)."""

import logging
from collections.abc import Iterable, Sequence

import torch

from edt.utils.errors import UserError

logger = logging.getLogger(__name__)

BETAS = (0.98, 0.92, 0.99)
FINAL_LR = 5e-5

OPTIMIZERS = {
    "adan": "Adan as its authors publish it",
    "adan-pytorch": "the adan-pytorch package: another update. Its first step moves nothing; after 60 steps on the "
    "reference trajectory its weights are off by 0.0066, where the official ones have moved by 0.012",
}
STATE = (
    "exp_avg",
    "exp_avg_diff",
    "exp_avg_sq",
    "neg_pre_grad",
)  # Adan's, of each parameter, under the release's names
CPU_CHUNK = 2**18  # elements: what a pass reads and writes of seven tensors stays in the cache


def _adan(tensors: Sequence[torch.Tensor], scalars: Sequence[torch.Tensor | None]) -> None:
    """Algorithm 1 of Adan (Xie et al., 2022) in place, and the moving average of its result if
    there is one.
    """
    p, grad, exp_avg, exp_avg_diff, exp_avg_sq, neg_pre_grad, *average = tensors
    apply, weight1, weight2, weight3, beta2, step1, step2, small, decay, average_weight = scalars
    grad = torch.where(apply > 0, grad, 0)
    diff = neg_pre_grad.add_(grad)
    exp_avg.lerp_(grad, weight1)
    exp_avg_diff.lerp_(diff, weight2)
    nesterov = torch.addcmul(grad, diff, beta2)
    exp_avg_sq.lerp_(nesterov.square_(), weight3)
    denominator = torch.sqrt(exp_avg_sq, out=nesterov).add_(small)
    # Not one division of the sum, which rounds differently: 1.4e-6 from the official weights after
    # 60 steps.
    p.addcdiv_(exp_avg * step1, denominator, value=-1).addcdiv_(
        exp_avg_diff * step2, denominator, value=-1
    )
    if decay is not None:
        p.mul_(decay)
    neg_pre_grad.mul_(1 - apply).sub_(grad)  # -grad, or what it was
    for one in average:
        one.lerp_(p, average_weight)


class Adan(torch.optim.Optimizer):
    """Adan (Xie et al., 2022) with proximal weight decay, as its authors' code computes it.

    One pass over the memory (on a GPU if compiled), the moving average of the weights included; and
    a step can be called off by a tensor, so that the host need not wait to learn whether a gradient
    was finite.

    Args:
        compiled: run the pass as one kernel a parameter, through torch.compile.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float,
        betas: tuple[float, float, float] = BETAS,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        compiled: bool = False,
    ):
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.compiled, self._pass = (
            compiled,
            torch.compile(_adan, dynamic=True) if compiled else _adan,
        )

    @torch.no_grad()
    def step(
        self,
        closure: None = None,
        *,
        apply: torch.Tensor | None = None,
        averages: Sequence[torch.Tensor] | None = None,
        average_decay: float = 0.0,
    ) -> None:
        """Args: apply: () bool on the parameters' device; False leaves everything, the step counter
        included, as it is. averages: one tensor a parameter, in their order: average <- decay *
        average + (1 - decay) * parameter."""
        averages = iter(averages or ())
        for group in self.param_groups:
            params = group["params"]
            device = params[0].device
            applied = torch.ones((), device=device) if apply is None else apply.to(torch.float32)
            group["step"] = (
                torch.as_tensor(group.get("step", 0.0), dtype=torch.float64, device=device)
                + applied
            )
            scalars = self._scalars(group, applied, average_decay)
            for p in params:
                average = next(averages, None)
                if p.grad is not None:
                    self.state[p] = self.state[p] or {name: torch.zeros_like(p) for name in STATE}
                    tensors = [p, p.grad.contiguous(), *(self.state[p][name] for name in STATE)]
                    tensors += [] if average is None else [average]
                    for chunk in self._chunks(tensors):
                        self._pass(chunk, scalars)

    def _scalars(
        self, group: dict, applied: torch.Tensor, average_decay: float
    ) -> list[torch.Tensor | None]:
        """What a pass multiplies by, on the device; in a step called off all that changes something
        is 0.
        """
        (beta1, beta2, beta3), lr = group["betas"], group["lr"]
        step = group["step"].clamp(min=1)  # 0 only if called off
        later = (step > 1).to(applied)  # there is a gradient to differ from
        root = (
            1 - beta3**step
        ).sqrt()  # corrects sqrt(exp_avg_sq); multiplied into what it divides
        scalars = [
            applied,
            applied * (1 - beta1),
            applied * later * (1 - beta2),
            applied * (1 - beta3),
            later * beta2,
            applied * lr * root / (1 - beta1**step),
            applied * lr * beta2 * root / (1 - beta2**step),
            group["eps"] * root,
            1 / (1 + applied * lr * group["weight_decay"]) if group["weight_decay"] else None,
            applied * (1 - average_decay),
        ]
        return [None if scalar is None else scalar.float() for scalar in scalars]

    def _chunks(self, tensors: Sequence[torch.Tensor]) -> Iterable[tuple[torch.Tensor, ...]]:
        """Flat pieces of tensors of one shape; whole if one kernel does all, and on a GPU, whose
        passes no cache would hold.
        """
        whole = self.compiled or tensors[0].device.type != "cpu"
        size = tensors[0].numel() if whole else CPU_CHUNK
        return zip(*(tensor.detach().view(-1).split(size) for tensor in tensors), strict=True)


def create_optimizer(
    name: str,
    params: Iterable[torch.nn.Parameter],
    lr: float,
    weight_decay: float = 0.0,
    compiled: bool = False,
) -> torch.optim.Optimizer:
    """Adan with the release's betas (0.98, 0.92, 0.99) and eps 1e-8.

    Args:
        name: a key of :data:`OPTIMIZERS`.
        weight_decay: proximal decay; the release uses none.
        compiled: as in :class:`Adan`; the package's optimizer is what it is.
    """
    if name == "adan":
        return Adan(params, lr, weight_decay=weight_decay, compiled=compiled)
    if name == "adan-pytorch":
        try:
            import adan_pytorch
        except ImportError:
            raise UserError(
                "--optimizer adan-pytorch needs the package: pip install adan-pytorch"
            ) from None
        logger.warning("optimizer adan-pytorch: %s", OPTIMIZERS[name])
        # This package writes the moving averages with the complements of the betas.
        betas = tuple(1 - beta for beta in BETAS)
        return adan_pytorch.Adan(params, lr=lr, betas=betas, eps=1e-8, weight_decay=weight_decay)
    raise UserError(f"unknown optimizer {name!r}; choose one of {', '.join(OPTIMIZERS)}")


def learning_rate(step: int, initial: float, decay_steps: int) -> float:
    """Linear from ``initial`` to 5e-5 over ``decay_steps``, then constant; no warm-up.

    Args:
        step: optimizer steps taken so far; the first step uses ``initial``.
    """
    final = min(FINAL_LR, initial)
    return initial - (initial - final) * min(step / decay_steps, 1.0)

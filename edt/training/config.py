"""What a training run depends on, and how long it runs."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from edt.diffusion.gaussian import MIN_SNR_GAMMA
from edt.diffusion.timesteps import TimestepSamplerName
from edt.masking import Masking
from edt.nn.precision import Precision
from edt.training.optim import OptimizerName
from edt.utils.choices import check_fields
from edt.utils.errors import UserError

PassNoise = Literal["independent", "shared"]
PASS_NOISES: dict[PassNoise, str] = {
    "independent": "each pass draws its own noise and label dropout (release)",
    "shared": "one draw for both passes (paper, Eq. 3)",
}


def default_init_lr(model: str) -> float:
    """Initial learning rate of the release for a model name (paper, section 4.1)."""
    return 5e-4 if model.startswith("EDT-XL") else 1e-3


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The settings that the trained weights depend on. Defaults are the release's."""

    seed: int = 42
    """Fixes the initial weights, the order of the images and every draw."""
    global_batch_size: int = 256
    """Images per step, over all processes."""
    init_lr: float = 1e-3
    """Learning rate of the first step."""
    final_lr: float = 5e-5
    """Learning rate after ``lr_steps``. If ``init_lr`` is below it, the rate stays ``init_lr``."""
    lr_steps: int = 400_000
    """Steps over which the learning rate falls linearly."""
    optimizer: OptimizerName = "adan"
    """See edt.training.optim.OPTIMIZERS."""
    ema_decay: float = 0.9999
    """Decay of the moving average of the weights, per step."""
    label_dropout: float = 0.1
    """Probability that a label is replaced by the null class."""
    masking: Masking = "edt"
    """See edt.masking.MASKINGS. A model family has some of them."""
    noise: PassNoise = "independent"
    """See PASS_NOISES."""
    schedule_sampler: TimestepSamplerName = "loss-second-moment"
    """How timesteps are drawn; see edt.diffusion.timesteps."""
    min_snr_gamma: float = MIN_SNR_GAMMA
    """Gamma of the loss weight min(SNR, gamma) / SNR."""
    precision: Precision = "tf32"
    """See edt.nn.precision.PRECISIONS. Weights, optimizer, EMA and loss stay float32."""
    max_grad_norm: float | None = None
    """Gradients with a larger norm are scaled down to it; None never scales, as the release."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("global_batch_size", "init_lr", "final_lr", "lr_steps", "min_snr_gamma"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("ema_decay", "label_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise UserError(f"max_grad_norm must be above 0, got {self.max_grad_norm}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """Inverse of ``dataclasses.asdict``; reads the older key "clip" too.

        A field that is missing takes its default, which is what older versions had built in.

        Raises:
            UserError: a key is unknown.
        """
        values = {"max_grad_norm" if key == "clip" else key: values[key] for key in values}
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            names = ", ".join(sorted(unknown))
            raise UserError(f"unknown training configuration {names}; is it from a newer version?")
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long a run trains and what it writes. The weights at a given step do not depend on it."""

    max_steps: int = 400_000
    """Stop after this many steps, counted from the run's first start."""
    log_every: int = 100
    """Steps between lines of the log."""
    ckpt_every: int = 50_000
    """Steps between checkpoints."""
    sample_every: int = 0
    """Steps between grids of EMA samples; 0 draws none."""
    num_workers: int = 4
    """Processes that read features ahead; 0 reads them in the training process."""
    max_skipped_steps: int = 20
    """Stop after this many skipped steps in a row. On a GPU this is checked when logging only."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "log_every", "ckpt_every", "max_skipped_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("sample_every", "num_workers"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}")

"""The settings that an image depends on, apart from the weights and its index."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Literal

import torch

from edt.diffusion import GuidanceSchedule, Solver, create_sampler
from edt.nn.precision import Precision
from edt.utils.choices import check_fields
from edt.utils.errors import UserError
from edt.utils.randomness import integers

logger = logging.getLogger(__name__)

GuidanceChannels = Literal["3", "all"]
GUIDANCE_CHANNELS: dict[GuidanceChannels, str] = {
    "3": "the first 3 of 4, as in the release (every channel if there are not 4)",
    "all": "every channel",
}
LABEL_POLICIES = {
    "uniform": "at random (the paper's way)",
    "balanced": "image i has class i mod K, for K classes",
    "null": "the null class, which is unconditional sampling",
}


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How images are sampled. Defaults are those of the 50,000-image script."""

    seed: int = 42
    """Fixes noise and labels."""
    num_sampling_steps: str = "250"
    """Calls of the model per image; see edt.diffusion.solvers.create_sampler."""
    solver: Solver = "ddpm"
    """See edt.diffusion.solvers.SOLVERS."""
    cfg_scale: float = 1.0
    """Scale of classifier-free guidance; 1 is no guidance."""
    precision: Precision = "tf32"
    """See edt.nn.precision.PRECISIONS. The state of the sampler is always float32."""
    labels: str = "uniform"
    """See LABEL_POLICIES; or "207,360", classes in turn."""
    cfg_channels: GuidanceChannels = "3"
    """See GUIDANCE_CHANNELS."""
    cfg_interval: tuple[int, int] | None = None
    """Timesteps lo <= t <= hi at which the model is guided; None is all of them."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not str(self.num_sampling_steps).strip():  # create_sampler reads it as all 1000 steps
            raise UserError("--num-sampling-steps is empty; give a number such as 250")
        # The next two lines raise a UserError if the fields cannot be combined.
        _ = self.guidance
        timesteps = create_sampler(self.solver, self.num_sampling_steps).timesteps
        self._warn_of_guidance_without_effect(timesteps)

    def _warn_of_guidance_without_effect(self, timesteps: Sequence[int]) -> None:
        """Warn of guidance that was asked for and changes no image.

        Args:
            timesteps: those that the sampler visits.
        """
        guided = [timestep for timestep in timesteps if self.guidance(timestep) != 1]
        if self.labels == "null" and self.cfg_scale != 1:
            logger.warning(
                "--cfg-scale %g has no effect: the label is the null class", self.cfg_scale
            )
        elif self.cfg_interval is not None and self.cfg_scale == 1:
            logger.warning("--cfg-interval has no effect: --cfg-scale is 1, which is no guidance")
        elif self.cfg_interval is not None and not guided:
            low, high = self.cfg_interval
            below, above = ([t for t in timesteps if t < low], [t for t in timesteps if t > high])
            nearest = [*map(str, below[:1]), *map(str, above[-1:])]  # timesteps fall
            logger.warning(
                "--cfg-interval %d %d has no effect: it holds none of the %d timesteps that the "
                "sampler visits; nearest: %s",
                low,
                high,
                len(timesteps),
                " and ".join(nearest),
            )

    @property
    def guidance(self) -> GuidanceSchedule:
        """Guidance scale as a function of the timestep."""
        return GuidanceSchedule(self.cfg_scale, self.cfg_interval)

    def guided_channels(self, in_channels: int) -> int | None:
        """Value of ``channels`` for ``forward_with_cfg``; None applies the release's rule."""
        return in_channels if self.cfg_channels == "all" else None

    def labels_of(self, indices: torch.Tensor, num_classes: int) -> torch.Tensor:
        """Labels of images, (n,) int64.

        Args:
            indices: the images, (n,) int64.
            num_classes: of the model; 0 is unconditional.

        Raises:
            UserError: the labels cannot be read, or a class is outside the model's.
        """
        if self.labels == "null" or num_classes == 0:
            return torch.full_like(indices, num_classes)
        if self.labels == "uniform":
            return integers(self.seed, "labels", 0, indices, num_classes)
        if self.labels == "balanced":
            return indices % num_classes
        try:
            classes = torch.tensor([int(part) for part in self.labels.split(",")])
        except ValueError:
            raise UserError(
                f"cannot read labels {self.labels!r}; give uniform, balanced, null or e.g. 207,360"
            ) from None
        check_labels(classes, num_classes)
        return classes[indices % len(classes)]


def check_integers(name: str, values: torch.Tensor) -> None:
    """Raise a UserError if values are not (n,) integers."""
    dtype = values.dtype
    is_integer = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    if values.dim() != 1 or not is_integer:
        raise UserError(
            f"{name} are {dtype} of shape {tuple(values.shape)}; give an integer per image"
        )


def check_labels(labels: torch.Tensor, num_classes: int) -> None:
    """Raise a UserError if labels are not (n,) integers, or one is outside the model's classes."""
    check_integers("labels", labels)
    last = max(num_classes, 1) - 1
    for label in labels.tolist():
        if not 0 <= label <= last:
            raise UserError(f"class {label} is outside the model's classes, 0 to {last}")

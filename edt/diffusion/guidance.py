"""Guidance scale as a function of the timestep."""

import dataclasses
import math

from edt.utils.errors import UserError

LAST_TIMESTEP = 999  # of the 1000-step process


@dataclasses.dataclass(frozen=True)
class GuidanceSchedule:
    """A constant scale, everywhere or within an interval of timesteps.

    A sampler asks for the scale once per step, with the step's own timestep:
    ``schedule(timestep) -> scale``.
    """

    scale: float = 1.0
    """Scale s of classifier-free guidance; 1 is no guidance."""
    interval: tuple[int, int] | None = None
    """Guide only where lo <= t <= hi (Kynkäänniemi et al., 2024), in timesteps of the 1000-step
    process: 0 is clean, 999 is noise. None guides everywhere."""

    def __post_init__(self) -> None:
        if not self.scale >= 1 or not math.isfinite(self.scale):
            raise UserError(f"--cfg-scale must be 1 (no guidance) or more, got {self.scale}")
        low, high = self.interval or (0, LAST_TIMESTEP)
        if not 0 <= low <= high <= LAST_TIMESTEP:
            raise UserError(
                f"--cfg-interval {low} {high} is not an interval; give two timesteps LO <= HI from "
                f"0 (clean) to {LAST_TIMESTEP} (noise)"
            )

    def __call__(self, timestep: int) -> float:
        """The scale at a timestep of the 1000-step process."""
        low, high = self.interval or (0, LAST_TIMESTEP)
        return self.scale if low <= timestep <= high else 1.0

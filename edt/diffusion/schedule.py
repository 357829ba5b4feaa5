"""Noise schedule and respacing, in float64 NumPy; nothing here touches a device."""

import itertools

import numpy as np

from edt.utils.errors import UserError


def linear_betas(steps: int = 1000) -> np.ndarray:
    """Betas from 1e-4 to 0.02 (DDPM, section 4), (steps,) float64."""
    return np.linspace(1e-4, 0.02, steps, dtype=np.float64)


def respaced_timesteps(spec: str | int | None, steps: int = 1000) -> list[int]:
    """The timesteps that a sampler visits, ascending.

    Args:
        spec: "" or None keeps all timesteps. "N" takes N evenly spaced ones, the first and the last
            included. "ddimN" takes the smallest integer stride that gives exactly N. "a,b,c" splits
            the process into three equal sections with a, b and c evenly spaced timesteps.
        steps: length of the full process.

    Raises:
        UserError: the spec cannot be read, or it asks for more timesteps than the process has.
    """
    text = "" if spec is None else str(spec).strip()
    if not text:
        return list(range(steps))
    try:
        if text.startswith("ddim"):
            return _strided(int(text.removeprefix("ddim")), steps)
        counts = [int(part) for part in text.split(",")]
    except UserError:  # a subclass of ValueError, whose own message must survive
        raise
    except ValueError:
        raise UserError(
            f"cannot read sampling steps {text!r}; give e.g. 250, ddim50 or 10,15,25"
        ) from None
    size, longer_sections = divmod(steps, len(counts))
    timesteps: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < longer_sections)
        timesteps += [start + position for position in _evenly_spaced(count, length)]
        start += length
    return timesteps


def _strided(count: int, steps: int) -> list[int]:
    """Timesteps from 0 at the smallest integer stride that yields exactly ``count`` of them."""
    for stride in range(1, steps + 1):
        if len(range(0, steps, stride)) == count:
            return list(range(0, steps, stride))
    raise UserError(
        f"no integer stride through {steps} timesteps gives {count} of them; choose e.g. ddim50"
    )


def _evenly_spaced(count: int, length: int) -> list[int]:
    """``count`` evenly spaced integers from 0 to length - 1."""
    if not 1 <= count <= length:
        raise UserError(
            f"cannot take {count} sampling steps from {length} timesteps; give 1 to {length}"
        )
    stride = (length - 1) / (count - 1) if count > 1 else 1.0
    # The release adds the stride up. A product would round differently at half-way positions.
    positions = itertools.accumulate([stride] * (count - 1), initial=0.0)
    return [round(position) for position in positions]

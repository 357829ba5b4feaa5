"""Noise schedule and respacing, in float64 NumPy; nothing here touches a device."""

import itertools

import numpy as np

from edt.utils.errors import UserError


def linear_betas(steps: int = 1000) -> np.ndarray:
    """Betas from 1e-4 to 0.02 (Ho et al., 2020), (steps,) float64."""
    return np.linspace(1e-4, 0.02, steps, dtype=np.float64)


def respaced_timesteps(spec: str | int, steps: int = 1000) -> list[int]:
    """The timesteps a sampler visits, ascending.

    Args:
        spec: "" or None keeps all; "N" takes N evenly spaced ones, first and last included; "ddimN"
            the smallest integer stride that gives exactly N; "a,b,c" splits the process into equal
            sections with a, b and c evenly spaced timesteps.
        steps: length of the full process.

    Raises:
        UserError: the spec cannot be read, or asks for more timesteps than there are.
    """
    spec = "" if spec is None else str(spec).strip()
    if not spec:
        return list(range(steps))
    try:
        if spec.startswith("ddim"):
            wanted = int(spec.removeprefix("ddim"))
            strided = (range(0, steps, stride) for stride in range(1, steps + 1))
            chosen = next((list(r) for r in strided if len(r) == wanted), None)
            if chosen is None:
                raise UserError(
                    f"no integer stride through {steps} timesteps gives {wanted} of them; choose e.g. ddim50"
                )
            return chosen
        counts = [int(part) for part in spec.split(",")]
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"cannot read sampling steps {spec!r}; give e.g. 250, ddim50 or 10,15,25"
        ) from None

    size, larger = divmod(steps, len(counts))
    chosen, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < larger)
        if not 1 <= count <= length:
            raise UserError(
                f"cannot take {count} sampling steps from {length} timesteps; give 1 to {length}"
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1
        # Summed up, not multiplied: the two differ where a position falls half-way, and the release
        # sums.
        positions = itertools.accumulate([stride] * (count - 1), initial=0.0)
        chosen += [start + round(position) for position in positions]
        start += length
    return chosen

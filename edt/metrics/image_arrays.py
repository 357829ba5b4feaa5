"""Refuses arrays that are not RGB images in uint8, and says how to convert them.

The advice is an expression of numpy in which x is the array. It follows from the dtype, the range
and the shape that were found. A range does not prove what black and white are, so the advice names
the values that it takes for them.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from edt.utils.errors import UserError

UINT8 = "np.clip({}, 0, 255).astype(np.uint8)"  # the cast truncates
FROM_ZERO_TO_ONE = UINT8.format("255 * x + 0.5")
FROM_MINUS_ONE_TO_ONE = UINT8.format("127.5 * x + 128")  # as in ADM
SCALE = "scale the images so that 0 is black and 255 is white, and round them to uint8"


class Range(NamedTuple):
    """A usual range of images that are not uint8."""

    black: int
    white: int
    highest_minimum: float  # images without darker pixels have another range
    lowest_maximum: float  # images without brighter pixels have another range
    conversion: str


# The first that fits is meant. The last two are those of integers too.
RANGES = (
    Range(0, 1, 1, 0.25, FROM_ZERO_TO_ONE),
    Range(-1, 1, -0.6, -0.5, FROM_MINUS_ONE_TO_ONE),
    Range(0, 255, 255, 64, UINT8.format("x + 0.5")),
    Range(0, 65535, 65535, 16384, UINT8.format("x / 257 + 0.5")),
)
OVERSHOOT = 0.2  # of a range; decoders and resizing leave it by so much


def check_array(
    name: str, shape: tuple[int, ...], dtype: np.dtype, parts: Iterable[np.ndarray]
) -> None:
    """Check that an array holds RGB images in uint8, as far as its dtype and shape say.

    Args:
        name: what the message calls the array.
        shape: of the whole array.
        dtype: of the array.
        parts: all values of the array in pieces of any shape. Only those of real numbers other
            than uint8 are read, to find their range.

    Raises:
        UserError: it holds something else; the message says how to convert it.
    """
    if dtype != np.uint8:
        raise UserError(f"{name} holds {_describe_values(dtype, parts)}")
    if len(shape) != 4 or shape[3] != 3:
        raise UserError(
            f"{name} has shape {tuple(shape)}, not (count, height, width, 3); "
            f"{_advise_shape(shape)}"
        )


def check_values(name: str, images: np.ndarray) -> None:
    """Refuse uint8 images whose only values are 0 and 1, or 0, 1 and 255.

    Floats in [0, 1] or [-1, 1] become such images when they are cast to integers without scaling.
    """
    values = np.flatnonzero(np.bincount(images.ravel(), minlength=256)).tolist()
    if 1 in values and set(values) <= {0, 1, 255}:
        raise UserError(f"{name} holds only the values {values}: {_advise_cast(255 in values)}")


def _describe_values(dtype: np.dtype, parts: Iterable[np.ndarray]) -> str:
    """What an array of another dtype than uint8 holds, and how to convert it."""
    if dtype.kind == "O":
        return (
            "Python objects, not uint8; give one array of shape (count, height, width, 3), "
            "with all images cropped to one size"
        )
    if dtype.kind == "b":
        return "bool, not uint8; if True is white, convert with x.astype(np.uint8) * 255"
    if dtype.kind not in "fiu":
        return f"{dtype.name}, not uint8; give real numbers; {SCALE}"
    low, high = _find_range(parts)
    if not np.isfinite([low, high]).all():
        value = "NaN" if np.isnan(low) else "infinity"
        return f"{value}; the sampler diverged, sample the images again"
    found = f"{dtype.name} in [{low:.6g}, {high:.6g}]"
    if dtype.kind in "iu" and max(-low, high) == 1:
        return f"{found}: {_advise_cast(low < 0)}"
    return f"{found}, not uint8; {_advise_range(low, high, dtype)}"


def _find_range(parts: Iterable[np.ndarray]) -> tuple[float, float]:
    """Minimum and maximum; both are NaN if a value is, and zero if there are no values."""
    ranges = [(part.min(), part.max()) for part in parts if part.size] or [(0, 0)]
    return float(np.min(ranges)), float(np.max(ranges))


def _advise_range(low: float, high: float, dtype: np.dtype) -> str:
    """How to convert real numbers with this minimum and maximum."""
    if dtype == np.int8 and low < 0:
        return f"if they were uint8 before, x.astype(np.uint8) restores them; otherwise {SCALE}"
    for black, white, highest_minimum, lowest_maximum, conversion in RANGES:
        margin = OVERSHOOT * min(white - black, high - low)
        inside = black - margin <= low and high <= white + margin
        if inside and low <= highest_minimum and high >= lowest_maximum:
            if white == 255 and dtype.kind in "iu":
                conversion = UINT8.format("x")  # there is nothing to round
            return f"if {black} is black and {white} is white, convert with {conversion}"
    return SCALE


def _advise_cast(signed: bool) -> str:
    """How to make images again that were cast from floats in [0, 1], or in [-1, 1] if signed."""
    floats = "[-1, 1]" if signed else "[0, 1]"
    conversion = FROM_MINUS_ONE_TO_ONE if signed else FROM_ZERO_TO_ONE
    return (
        "floats were cast without scaling; "
        f"if they were in {floats}, convert them before the cast with {conversion}"
    )


def _advise_shape(shape: tuple[int, ...]) -> str:
    """How to get from this shape to (count, height, width, 3)."""
    match shape:
        case (_, 3, _, _):
            return "put the channels last with x.transpose(0, 2, 3, 1)"
        case (_, _, _, 1):
            return "repeat the grey channel with np.repeat(x, 3, axis=3)"
        case (_, _, _, 4):
            return "if the fourth channel is alpha, drop it with x[..., :3]"
        case (_, 1, _, _):
            return "repeat the grey channel with np.repeat(x.transpose(0, 2, 3, 1), 3, axis=3)"
        case (_, 4, _, _):
            return "if the fourth channel is alpha, use x[:, :3].transpose(0, 2, 3, 1)"
        case (_, _, 3):
            return "this is one image; give several with np.stack"
        case (_, _, _):
            return "if the images are grey, use np.repeat(x[..., None], 3, axis=3)"
    return "give RGB images of one size"

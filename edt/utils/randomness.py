"""Randomness derived, not stored: every draw is a function of (seed, stream, step) and of what it
is for.

Training draws a whole global batch from one generator per stream and step (:func:`generator`), on
every process, and each process keeps its rows: one process and many see the same draws, and
resuming needs no generator state. What belongs to one image - its first noise, its label, its flip
- is a function of the image's index besides (:func:`normal`, :func:`integers`): batch size and
number of processes do not matter."""

import functools
import hashlib
import math

import torch

_WEYL = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, as a signed 64-bit integer
_MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def _key(seed: int, stream: str, step: int) -> int:
    """A signed 64-bit hash."""
    return int.from_bytes(
        hashlib.blake2b(f"{seed}/{stream}/{step}".encode(), digest_size=8).digest(), signed=True
    )


def generator(
    seed: int, stream: str, step: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """The generator of one stream at one step."""
    return torch.Generator(device).manual_seed(_key(seed, stream, step))


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> torch.Tensor:
    """The order in which an epoch visits ``count`` images, (count,) int64."""
    return torch.randperm(count, generator=generator(seed, "order", epoch))


def _mix(z: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 (Steele et al., 2014); int64 wraps around, and >> must not copy
    the sign.
    """
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * _MIX[0]
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * _MIX[1]
    return z ^ (z >> 31 & (1 << 33) - 1)


def _bits(seed: int, stream: str, step: int, indices: torch.Tensor, count: int) -> torch.Tensor:
    """64 random bits for each of ``count`` counters of each index, (len(indices), count) int64, the
    same everywhere.
    """
    start = _mix(_mix(indices.long() * _WEYL) ^ _key(seed, stream, step))
    return _mix(start[:, None] + torch.arange(1, count + 1, device=indices.device) * _WEYL)


def normal(
    seed: int,
    stream: str,
    step: int,
    indices: torch.Tensor,
    shape: tuple[int, ...],
    device: torch.device | str,
) -> torch.Tensor:
    """Standard normal noise of some images.

    Args:
        seed, stream, step: what it is for.
        indices: the images, (n,) int64.
        shape: shape of one image's noise.

    Returns:
        (n, *shape) float32 on ``device``. Row i depends on indices[i] and not on the others.
    """
    numbers = math.prod(shape)
    bits = _bits(seed, stream, step, indices.to(device), (numbers + 1) // 2)
    # Box-Muller on the two halves of the bits; + 1 keeps the logarithm finite.
    radius = (-2 * (((bits >> 32 & 0xFFFFFFFF) + 1).double() / 2**32).log()).sqrt()
    angle = 2 * math.pi * (bits & 0xFFFFFFFF).double() / 2**32
    pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return pairs[:, :numbers].float().view(-1, *shape)


def integers(seed: int, stream: str, step: int, indices: torch.Tensor, high: int) -> torch.Tensor:
    """Uniform integers in [0, high), one an index, (n,) int64 on the device of ``indices``."""
    return (_bits(seed, stream, step, indices, 1)[:, 0] & (1 << 63) - 1) % high

"""Randomness that is derived and not stored.

Every draw is a function of (seed, stream, step). The stream is the name of the draw's purpose, e.g.
"noise" or "labels".

Training draws a whole global batch from one generator per stream and step (:func:`generator`), on
every process, and each process keeps its rows. So the draws do not depend on the number of
processes, and a resumed run needs no generator state.

What belongs to one image (its noise, its label, its flip) is also a function of the image's index
(:func:`normal`, :func:`integers`). So batch size and number of processes do not matter.
"""

import hashlib
import math

import torch

_WEYL = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, as a signed 64-bit integer
_MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def _key(seed: int, stream: str, step: int) -> int:
    """A signed 64-bit hash."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, signed=True)


def generator(
    seed: int, stream: str, step: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """The generator of one stream at one step."""
    return torch.Generator(device).manual_seed(_key(seed, stream, step))


def _mix(z: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 (Steele et al., 2014).

    int64 wraps around as the unsigned type does. The masks remove the copies of the sign bit that
    >> shifts in.
    """
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * _MIX[0]
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * _MIX[1]
    return z ^ (z >> 31 & (1 << 33) - 1)


def _bits(seed: int, stream: str, step: int, indices: torch.Tensor, count: int) -> torch.Tensor:
    """64 random bits for each of ``count`` counters of each index, (len(indices), count) int64.

    They are the same on every device.
    """
    # The inner mix scatters the starts. Without it the counters of adjacent indices would overlap.
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
        seed: of the run.
        stream: name of the purpose.
        step: number of the draw.
        indices: the images, (n,) int64.
        shape: shape of one image's noise.
        device: of the result.

    Returns:
        (n, *shape) float32. Row i depends on indices[i] and not on the others.
    """
    numbers = math.prod(shape)
    bits = _bits(seed, stream, step, indices.to(device), (numbers + 1) // 2)
    # Box-Muller on the two halves of the bits. The + 1 keeps the logarithm finite.
    radius = (-2 * (((bits >> 32 & 0xFFFFFFFF) + 1).double() / 2**32).log()).sqrt()
    angle = 2 * math.pi * (bits & 0xFFFFFFFF).double() / 2**32
    pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return pairs[:, :numbers].float().view(-1, *shape)


class ImageNoise:
    """The noise of some images at each step of a sampling loop: ``noise(step)``.

    Args:
        seed: of the samples.
        indices: the images, (n,) int64.
        shape: shape of one image's latent.
        device: of the noise.
    """

    def __init__(
        self, seed: int, indices: torch.Tensor, shape: tuple[int, ...], device: torch.device
    ) -> None:
        self.seed, self.indices = seed, indices.to(device)
        self.shape, self.device = shape, device

    def __call__(self, step: int) -> torch.Tensor:
        """Noise (n, *shape) of a loop step; step 0 is the noise that the loop starts from."""
        return normal(self.seed, "noise", step, self.indices, self.shape, self.device)


def integers(seed: int, stream: str, step: int, indices: torch.Tensor, high: int) -> torch.Tensor:
    """Uniform integers in [0, high), one per index, (n,) int64 on the device of ``indices``."""
    # The mask clears the sign bit. The bias of the modulo is at most high / 2^63.
    return (_bits(seed, stream, step, indices, 1)[:, 0] & (1 << 63) - 1) % high

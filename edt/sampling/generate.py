"""Images from a model.

Image i depends on the weights, the configuration and i only. The batch and the process that it is
sampled in make no difference.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from edt.data.vae import VAE, to_uint8
from edt.diffusion import create_sampler
from edt.nn.precision import autocast, set_matmul_precision
from edt.nn.transformer import DiffusionTransformer
from edt.sampling.config import SamplingConfig, check_classes
from edt.utils.errors import UserError
from edt.utils.randomness import ImageNoise


class SampleBatch(NamedTuple):
    """Some finished images, on the CPU."""

    indices: torch.Tensor  # (n,) int64
    images: torch.Tensor  # (n, H, W, 3) uint8
    labels: torch.Tensor  # (n,) int64


@torch.no_grad()
def generate(
    model: DiffusionTransformer,
    vae: VAE,
    config: SamplingConfig,
    indices: torch.Tensor,
    batch_size: int,
    *,
    labels: torch.Tensor | None = None,
    progress: bool = False,
) -> Iterator[SampleBatch]:
    """Sample images, one batch at a time.

    Args:
        model: in eval mode, with AMM already switched on or off.
        vae: decodes the latents.
        config: how to sample.
        indices: the images, (n,) int64.
        batch_size: images that go through the model at once.
        labels: their labels, (n,); None follows ``config.labels``.
        progress: show a bar over the denoising steps of each batch.

    Raises:
        UserError: a label is outside the model's classes; an image is not finite, and the message
            names it.
    """
    if labels is None:
        labels = config.labels_of(indices, model.num_classes)
    check_classes(labels.tolist(), model.num_classes)
    device = next(model.parameters()).device
    stream = _decoder_stream(device) if device.type == "cuda" else None
    decoding: _Decoding | None = None
    for start in range(0, len(indices), batch_size):
        rows = slice(start, start + batch_size)
        latents = sample_latents(model, config, indices[rows], labels[rows], progress)
        previous = decoding
        decoding = _decode(vae, indices[rows], labels[rows], latents, stream)
        # On a GPU the caller writes the previous batch while this one is still decoded. A CPU has
        # nothing to overlap.
        if previous is not None:
            yield previous.finish()
        if stream is None:
            yield decoding.finish()
            decoding = None
    if decoding is not None:
        yield decoding.finish()


def sample_latents(
    model: DiffusionTransformer,
    config: SamplingConfig,
    indices: torch.Tensor,
    labels: torch.Tensor,
    progress: bool = False,
) -> torch.Tensor:
    """Sample latents, (n, C, S, S) on the model's device.

    Args:
        model: in eval mode.
        config: how to sample.
        indices: the images, (n,) int64.
        labels: their labels, (n,) int64.
        progress: show a bar over the denoising steps.
    """
    side, device = model.config.input_size, next(model.parameters()).device
    noise = ImageNoise(config.seed, indices, (model.in_channels, side, side), device)
    sampler = create_sampler(config.solver, config.num_sampling_steps)
    model_kwargs = {
        "y": labels.to(device),
        "channels": config.guided_channels(model.in_channels),
    }
    set_matmul_precision(config.precision)
    with autocast(device, config.precision):
        return sampler.sample(
            model.forward_with_cfg,
            noise(0),
            model_kwargs,
            guidance_scale=config.guidance,
            noise_at=noise,
            progress=progress,
        )


@functools.cache
def _decoder_stream(device: torch.device) -> torch.cuda.Stream:
    """The decoder's stream, created once per process.

    torch reuses freed GPU memory only in the stream that allocated it. A new stream for each call
    could not reuse that memory and would raise the peak memory.
    """
    return torch.cuda.Stream(device)


class _Decoding(NamedTuple):
    """A batch that a GPU may still be decoding."""

    batch: SampleBatch
    finite: torch.Tensor  # (n,) bool
    done: torch.cuda.Event | None  # None on a CPU, where decoding is finished

    def finish(self) -> SampleBatch:
        """Wait for the images and check that they are finite."""
        if self.done is not None:
            self.done.synchronize()
        if not self.finite.all():
            broken = self.batch.indices[~self.finite].tolist()
            raise UserError(
                f"images {broken} are not finite; check the weights, or try --precision fp32"
            )
        return self.batch


def _decode(
    vae: VAE,
    indices: torch.Tensor,
    labels: torch.Tensor,
    latents: torch.Tensor,
    stream: torch.cuda.Stream | None,
) -> _Decoding:
    """Decode latents (n, C, S, S) to images on the CPU.

    On a GPU this happens in a stream of its own beside the denoising, and the host does not wait.
    """
    if stream is None:
        pixels = vae.decode(latents)
        images = to_uint8(pixels).contiguous()
        return _Decoding(SampleBatch(indices, images, labels), _is_finite(pixels), None)
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        latents.record_stream(stream)
        pixels = vae.decode(latents)
        images = _copy_to_host(to_uint8(pixels))
        finite = _copy_to_host(_is_finite(pixels))
    return _Decoding(SampleBatch(indices, images, labels), finite, stream.record_event())


def _is_finite(pixels: torch.Tensor) -> torch.Tensor:
    """Whether each image is finite, (n, 3, H, W) -> (n,) bool."""
    return pixels.isfinite().flatten(1).all(dim=1)


def _copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Start a copy to page-locked memory, which the stream performs later."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)

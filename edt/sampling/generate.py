"""Images from a model.

Image i depends on the weights, the configuration and i only. The batch and the process that it is
sampled in make no difference.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from edt.data.vae import VAE, to_uint8
from edt.diffusion import create_sampler
from edt.nn.precision import autocast, set_matmul_precision
from edt.nn.transformer import DiffusionTransformer
from edt.sampling.config import SamplingConfig, check_integers, check_labels
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
    progress: bool | tqdm = False,
) -> Iterator[SampleBatch]:
    """Sample images, one batch at a time.

    Args:
        model: in eval mode, with AMM already switched on or off.
        vae: decodes the latents.
        config: how to sample.
        indices: the images, (n,) int64.
        batch_size: images that go through the model at once.
        labels: their labels, (n,); None follows ``config.labels``.
        progress: show a bar, or advance this one of :func:`image_bar`.

    Raises:
        UserError: indices or labels are not one integer per image, or a label is outside the
            model's classes; an image is not finite, and the message names it.
    """
    indices = _to_integers("indices", indices)
    if labels is None:
        labels = config.labels_of(indices, model.num_classes)
    else:
        labels = _checked_labels(labels, len(indices), model.num_classes)
    if not isinstance(progress, bool):
        yield from _generate(model, vae, config, indices, labels, batch_size, progress)
        return
    with image_bar(len(indices), disable=not progress) as bar:
        yield from _generate(model, vae, config, indices, labels, batch_size, bar)


def _generate(
    model: DiffusionTransformer,
    vae: VAE,
    config: SamplingConfig,
    indices: torch.Tensor,
    labels: torch.Tensor,
    batch_size: int,
    bar: tqdm,
) -> Iterator[SampleBatch]:
    """:func:`generate` with checked labels and a bar."""
    device = next(model.parameters()).device
    stream = _decoder_stream(device) if device.type == "cuda" else None
    decoding: _Decoding | None = None
    for start in range(0, len(indices), batch_size):
        rows = slice(start, start + batch_size)
        latents = sample_latents(model, config, indices[rows], labels[rows], bar)
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


def image_bar(total: int, **options: Any) -> tqdm:
    """A progress bar that counts images and moves at every step of the sampler.

    Args:
        total: number of images.
        options: of tqdm.
    """
    # The part of the images that the steps amount to is a fraction; it is shown without decimals.
    counts = "{n:.0f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    # A log file gets a line of every refresh.
    return tqdm(
        total=total,
        unit="images",
        bar_format=f"{{l_bar}}{{bar}}| {counts}",
        mininterval=0.5,
        **options,
    )


def _to_integers(name: str, values: Any) -> torch.Tensor:
    """Numbers that a caller gave, one for each image, (n,) int64."""
    try:
        integers = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):  # which one depends on the value
        raise UserError(f"the {name} are no numbers; give an integer per image") from None
    check_integers(name, integers)
    return integers.long()


def _checked_labels(labels: Any, count: int, num_classes: int) -> torch.Tensor:
    """Labels that a caller gave, checked, (count,) int64."""
    labels = _to_integers("labels", labels)
    check_labels(labels, num_classes)
    if len(labels) != count:
        raise UserError(f"{len(labels)} labels do not fit {count} images; give a label per image")
    return labels


def sample_latents(
    model: DiffusionTransformer,
    config: SamplingConfig,
    indices: torch.Tensor,
    labels: torch.Tensor,
    bar: tqdm | None = None,
) -> torch.Tensor:
    """Sample latents, (n, C, S, S) on the model's device.

    Args:
        model: in eval mode.
        config: how to sample.
        indices: the images, (n,) int64.
        labels: their labels, (n,) int64.
        bar: a progress bar of :func:`image_bar` to advance.
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
            bar=bar,
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
            rest = f" and {len(broken) - 8} more" if len(broken) > 8 else ""
            raise UserError(
                f"images {broken[:8]}{rest} are not finite; check the weights of model and VAE, "
                "or try --precision fp32"
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

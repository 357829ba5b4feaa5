"""Images from a model: image i depends on (weights, recipe, i) only, whatever batch or process it
is drawn in.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from edt.data.vae import LatentVAE, PixelVAE, to_uint8
from edt.diffusion import FEW_STEP_SOLVERS, FewStepSolver, create_diffusion, parse_steps
from edt.models import EDT
from edt.nn.precision import allow_tf32
from edt.utils.errors import UserError
from edt.utils.randomness import integers, normal

SOLVERS = ("ddpm", "ddim", *FEW_STEP_SOLVERS)
CFG_CHANNELS = ("3", "all")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything an image depends on besides the weights and its index. Defaults are the
    50,000-image script's.
    """

    seed: int = 42
    num_sampling_steps: str = "250"
    solver: str = "ddpm"
    cfg_scale: float = 1.0
    precision: str = "tf32"
    """As in edt.training.trainer.TrainConfig; the state of the sampler is fp32 always."""
    labels: str = "uniform"
    """"uniform" at random (the paper's way), "balanced", or class indices separated by commas."""
    cfg_channels: str = "3"
    """Noise channels that are guided: the first "3" of 4 as in the release (of other latents all),
    or "all".
    """
    cfg_interval: tuple[int, int] | None = None
    """Guide where lo <= t <= hi only (Kynkäänniemi et al., 2024), t of the 1000-step process; None:
    everywhere.
    """

    def __post_init__(self):
        if not self.cfg_scale >= 1 or not math.isfinite(self.cfg_scale):
            raise UserError(f"--cfg-scale must be 1 (no guidance) or more, got {self.cfg_scale}")
        if self.solver not in SOLVERS:
            raise UserError(f"unknown solver {self.solver!r}; choose one of {', '.join(SOLVERS)}")
        if self.cfg_channels not in CFG_CHANNELS:
            raise UserError(
                f"unknown --cfg-channels {self.cfg_channels!r}; choose one of {', '.join(CFG_CHANNELS)}"
            )
        low, high = self.cfg_interval or (0, 999)
        if not 0 <= low <= high <= 999:
            raise UserError(
                f"--cfg-interval {low} {high} is none; give two timesteps LO <= HI from 0 (clean) to 999 (noise)"
            )
        if self.solver in FEW_STEP_SOLVERS:
            parse_steps(self.solver, self.num_sampling_steps)
        else:
            create_diffusion(self.num_sampling_steps)  # refuses what cannot be

    def scale_at(self, timestep: int) -> float:
        """Guidance scale at a timestep of the 1000-step process."""
        low, high = self.cfg_interval or (0, 999)
        return self.cfg_scale if low <= timestep <= high else 1.0

    def labels_of(self, indices: torch.Tensor, num_classes: int) -> torch.Tensor:
        """Labels of images, (n,) int64.

        Raises:
            UserError: a class outside the model's.
        """
        if num_classes == 0:
            return torch.zeros_like(indices)
        if self.labels == "uniform":
            return integers(self.seed, "labels", 0, indices, num_classes)
        if self.labels == "balanced":
            return indices % num_classes
        try:
            classes = torch.tensor([int(part) for part in self.labels.split(",")])
        except ValueError:
            raise UserError(
                f"cannot read labels {self.labels!r}; give uniform, balanced or e.g. 207,360"
            ) from None
        check_classes(classes.tolist(), num_classes)
        return classes[indices % len(classes)]


def check_classes(classes: Sequence[int], num_classes: int) -> None:
    """Raises a UserError if a class is outside the model's."""
    for label in classes:
        if not 0 <= label < max(num_classes, 1):
            raise UserError(
                f"class {label} is outside the model's classes, 0 to {max(num_classes, 1) - 1}"
            )


class Batch(NamedTuple):
    """Some finished images, on the CPU."""

    indices: torch.Tensor  # (n,) int64
    images: torch.Tensor  # (n, H, W, 3) uint8
    labels: torch.Tensor  # (n,) int64


def sample_latents(
    model: EDT, recipe: Recipe, indices: torch.Tensor, labels: torch.Tensor, progress: bool = False
) -> torch.Tensor:
    """Latents of images ``indices`` with ``labels``, (n, C, S, S) on the model's device."""
    device, config = model.pos_embed.device, model.config
    shape = (config.in_channels, config.input_size, config.input_size)
    indices = indices.to(device)

    def noise_at(i: int) -> torch.Tensor:
        """The noise of loop step i = 1, 2, ...; 0 is what the loop starts from."""
        return normal(recipe.seed, "noise", i, indices, shape, device)

    if recipe.solver in FEW_STEP_SOLVERS:
        solver = FewStepSolver(recipe.solver, recipe.num_sampling_steps)
        timesteps, loop = solver.timesteps, solver.sample_loop
    else:
        diffusion = create_diffusion(recipe.num_sampling_steps)
        timesteps = diffusion.timestep_map[::-1]
        loop = diffusion.p_sample_loop if recipe.solver == "ddpm" else diffusion.ddim_sample_loop
        loop = functools.partial(loop, noise_at=noise_at)
    # Every loop calls the model once a timestep, in order: the host knows t without asking the
    # device for it.
    scales = iter([recipe.scale_at(timestep) for timestep in timesteps])
    channels = model.in_channels if recipe.cfg_channels == "all" else None

    def guided(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return model.forward_with_cfg(x, t, y, next(scales), channels=channels)

    allow_tf32(recipe.precision)
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        return loop(guided, noise_at(0), {"y": labels.to(device)}, progress=progress)


@torch.no_grad()
def generate(
    model: EDT,
    vae: PixelVAE | LatentVAE,
    recipe: Recipe,
    indices: torch.Tensor,
    batch_size: int,
    *,
    labels: torch.Tensor | None = None,
    progress: bool = False,
) -> Iterator[Batch]:
    """Draw images, a batch at a time.

    Args:
        model: in eval mode, AMM set as wanted.
        indices: the images, (n,) int64.
        labels: their labels, (n,); None follows the recipe.
        progress: show a bar over the denoising steps of each batch.

    Raises:
        UserError: an image is not finite, naming it; labels outside the model's classes.
    """
    if labels is None:
        labels = recipe.labels_of(indices, model.num_classes)
    device = model.pos_embed.device
    decoder = _decoder_stream(device) if device.type == "cuda" else None
    waiting: _Decoding | None = None
    for start in range(0, len(indices), batch_size):
        some, their_labels = indices[start : start + batch_size], labels[start : start + batch_size]
        latents = sample_latents(model, recipe, some, their_labels, progress)
        decoding = _decode(vae, Batch(some, latents, their_labels), decoder)
        if decoder is None:
            yield decoding.finish()
        else:  # the batch before is written while the GPU finishes and decodes this one
            if waiting is not None:
                yield waiting.finish()
            waiting = decoding
    if waiting is not None:
        yield waiting.finish()


@functools.cache
def _decoder_stream(device: torch.device) -> torch.cuda.Stream:
    """One for good: memory freed in a stream is kept for that stream."""
    return torch.cuda.Stream(device)


class _Decoding(NamedTuple):
    """A batch that a GPU may still be busy with."""

    batch: Batch
    finite: torch.Tensor  # (n,) bool
    done: torch.cuda.Event | None

    def finish(self) -> Batch:
        if self.done is not None:
            self.done.synchronize()
        if not self.finite.all():
            broken = self.batch.indices[~self.finite].tolist()
            raise UserError(
                f"images {broken} are not finite; are the weights whole? try --precision fp32"
            )
        return self.batch


def _decode(vae: PixelVAE | LatentVAE, batch: Batch, stream: torch.cuda.Stream | None) -> _Decoding:
    """Latents to images on the CPU; on a GPU in a stream beside the denoising, without waiting."""
    if stream is None:
        images = vae.decode(batch.images)
        return _Decoding(
            batch._replace(images=to_uint8(images).contiguous()), _finite(images), None
        )
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        batch.images.record_stream(stream)
        images = vae.decode(batch.images)
        on_host = [
            torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(
                part, non_blocking=True
            )
            for part in (to_uint8(images), _finite(images))
        ]
    return _Decoding(batch._replace(images=on_host[0]), on_host[1], stream.record_event())


def _finite(images: torch.Tensor) -> torch.Tensor:
    """(n,) bool."""
    return images.isfinite().flatten(1).all(dim=1)

"""What a run measures and writes: running means, metrics.jsonl, trackers."""

import contextlib
import errno
import importlib.util
import json
import math
import os
import resource
import time
from collections import deque
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.tracking import filter_trackers

from edt.baselines.mdtv2 import MASK_RATIO_SPAN, masks_from_noise
from edt.nn.flops import forward_flops, peak_flops_per_sec
from edt.training.trainer import StepReport, Trainer
from edt.utils.choices import check_choice
from edt.utils.errors import UserError
from edt.utils.files import atomic_write

QUARTILES = 4
CONSOLE_LINE = (
    "step %(step)d  images %(images_seen)d  epoch %(epoch).2f  loss %(loss).4f  "
    "full %(loss_full).4f  masked %(loss_masked).4f  grad %(grad_norm).3g  lr %(lr).2e  "
    "skipped %(skipped_steps)d  %(images_per_sec).1f images/s"
)
REMEMBERED_STEPS = 1000  # whose skipped images can be named; more would take memory

Tracker = Literal["tensorboard", "wandb"]


class Meter:
    """Running means over the steps since the last line of the log.

    The sums stay on the device until they are read, since reading makes the host wait. A skipped
    step counts in images_per_sec, because it took time, but in no mean.
    """

    def __init__(self, trainer: Trainer) -> None:
        # Of each step: its number, found_inf (), and which images had finite losses (B,).
        self.remembered: deque[tuple[int, torch.Tensor, torch.Tensor]] = deque(
            maxlen=REMEMBERED_STEPS
        )
        self.trainer, self.device = trainer, trainer.device
        # The backward pass takes twice the operations of the forward pass.
        self.flops_per_image = 3 * sum(_flops_of_passes(trainer))
        self.peak_flops_per_sec = peak_flops_per_sec(self.device, trainer.config.precision)
        self.reset()

    def reset(self) -> None:
        """Reset the sums and the timer."""
        self.losses = torch.zeros(2, device=self.device)  # full pass, masked pass
        # By quartile of the timestep: sum of weighted losses, sum of weights.
        self.quartiles = torch.zeros(2, QUARTILES, device=self.device)
        self.grad_norm = torch.zeros((), device=self.device)
        self.finite_steps = torch.zeros((), device=self.device)
        self.steps = 0
        self.start_sec = time.perf_counter()

    def add(self, report: StepReport) -> None:
        """Add a step to the sums.

        Losses have their importance weights, as in the training objective. Unweighted losses would
        rise when the timestep sampler starts to prefer timesteps with a high loss.
        """
        self.steps += 1
        is_finite = ~report.found_inf
        finite_images = report.losses.isfinite().all(dim=1)
        self.remembered.append((self.trainer.step, report.found_inf, finite_images))
        self.finite_steps += is_finite
        weight = report.weight * is_finite
        weighted = torch.where(is_finite, report.losses, 0) * weight[:, None]
        means = weighted.mean(dim=0)
        self.losses[: len(means)] += means
        quartile = report.t * QUARTILES // self.trainer.diffusion.num_timesteps
        self.quartiles.index_add_(1, quartile, torch.stack([weighted.sum(dim=1), weight]))
        self.grad_norm += torch.where(is_finite, report.grad_norm, 0)

    def skipped_steps(self) -> dict[int, list[int]]:
        """The steps that were skipped since the last call, and the images that made them.

        Returns:
            step -> rows of the global batch whose losses were not finite. No rows mean that the
            gradient was not finite although every loss was.
        """
        remembered = list(self.remembered)
        self.remembered.clear()
        if not remembered:
            return {}
        skipped = torch.stack([found_inf for _, found_inf, _ in remembered]).tolist()
        return {
            step: (~finite_images).nonzero().flatten().tolist()
            for (step, _, finite_images), was_skipped in zip(remembered, skipped, strict=True)
            if was_skipped
        }

    def read(self) -> dict[str, Any]:
        """Return the means since the last call as a row of the log, then reset."""
        trainer, batch_size = self.trainer, self.trainer.config.global_batch_size
        sums = torch.stack([*self.losses, self.grad_norm])
        full, masked, grad_norm = (sums / self.finite_steps).tolist()
        quartiles = (self.quartiles[0] / self.quartiles[1]).tolist()
        images_per_sec = self.steps * batch_size / (time.perf_counter() - self.start_sec)
        processes = trainer.accelerator.num_processes
        flops_per_sec = images_per_sec * self.flops_per_image / processes
        utilization = None
        if self.peak_flops_per_sec is not None:
            utilization = flops_per_sec / self.peak_flops_per_sec
        row = {
            "step": trainer.step,
            "images_seen": trainer.images_seen,
            "epoch": float(trainer.epoch),
            "loss": full + masked,
            "loss_full": full,
            "loss_masked": masked,
            "loss_by_timestep_quartile": quartiles,
            "grad_norm": grad_norm,
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "skipped_steps": int(trainer.skipped_steps),
            "images_per_sec": images_per_sec,
            "model_tflops_per_sec": flops_per_sec / 1e12,  # of one process
            "model_flops_utilization": utilization,
            "memory_gib": _peak_memory_bytes(self.device) / 2**30,
        }
        self.reset()
        return row


def _flops_of_passes(trainer: Trainer) -> list[int]:
    """Operations of each forward pass of one image in a training step."""
    model, masking = trainer.model, trainer.config.masking
    full = forward_flops(model)
    if masking == "none":
        return [full]
    if masking == "edt":
        return [full, full]
    # The ratio differs from step to step. The operations at its mean are their mean within 0.1 %.
    with torch.device("meta"):
        noise = torch.empty(1, model.config.grid_size**2)
        masks = masks_from_noise(noise, model.config.mask_ratio + MASK_RATIO_SPAN / 2)
    return [full, forward_flops(model, masks)]


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---------------------------------------------------------------------------------------------
# metrics.jsonl


def append_row(file: Path, row: dict[str, Any]) -> None:
    """Append a line to a JSONL file, completely or not at all.

    A value that is not finite, such as the mean of no steps, becomes null.

    Raises:
        UserError: the disk is full.
    """
    values = {name: _finite_or_none(value) for name, value in row.items()}
    line = json.dumps(values).encode() + b"\n"
    try:
        with open(file, "ab", buffering=0) as stream:
            size = stream.tell()
            if stream.write(line) < len(line):
                stream.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise UserError(
            f"cannot write to {file} ({error.strerror}); free some disk space"
        ) from None


def drop_rows_after(file: Path, step: int) -> None:
    """Drop an incomplete last line, and the lines of steps that are about to be taken again."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    with atomic_write(file) as temporary:
        temporary.write_text("".join(kept))


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite_or_none(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ---------------------------------------------------------------------------------------------
# Trackers


def check_tracker(tracker: Tracker | None) -> None:
    """Raise a UserError if a tracker is unknown, or its package is not installed."""
    if tracker is None:
        return
    check_choice("tracker", tracker, Tracker)
    if importlib.util.find_spec(tracker) is None:
        raise UserError(f"--tracker {tracker} needs the package: pip install {tracker}")


def tracker_values(row: dict[str, Any]) -> dict[str, int | float]:
    """The numbers of a row of metrics, a curve each in a tracker. The step is their axis."""
    values = {}
    for name, value in row.items():
        if isinstance(value, int | float) and name != "step":
            values[name] = value
        elif isinstance(value, list):
            values |= {f"{name}/{i + 1}": number for i, number in enumerate(value)}
    return values


def start_tracker(
    accelerator: Accelerator, tracker: Tracker, folder: Path, config: dict[str, Any], step: int = 0
) -> None:
    """Log to TensorBoard or Weights & Biases too, through accelerate.

    Args:
        accelerator: its ``log`` reaches the tracker from now on.
        tracker: which one.
        folder: the run's folder.
        config: recorded with the run; values that a tracker cannot show become text.
        step: where the run begins or continues. TensorBoard hides what an earlier start wrote of
            the steps after it.
    """
    accelerator.project_configuration.set_directories(str(folder))
    accelerator.log_with = filter_trackers([tracker], str(folder))
    shown = {
        key: value if isinstance(value, int | float | str | bool) else str(value)
        for key, value in config.items()
    }
    options = {"tensorboard": {"purge_step": step + 1}} if step else {}
    accelerator.init_trackers("edt", shown, init_kwargs=options)

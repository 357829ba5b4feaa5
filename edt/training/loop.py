"""The loop around the training step: data, log, checkpoints, signals."""

import contextlib
import dataclasses
import logging
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from edt.checkpoints.folder import newest_checkpoint
from edt.data.features import Features
from edt.data.vae import LatentVAE, PixelVAE
from edt.nn.flops import forward_flops, peak_flops
from edt.sampling.generate import Recipe, generate
from edt.sampling.image_grid import grid
from edt.training.run_dir import Run
from edt.training.step_inputs import StepDraws
from edt.training.trainer import BatchIndices, StepReport, Trainer, batches
from edt.utils.errors import UserError
from edt.utils.files import atomic_write

logger = logging.getLogger(__name__)
QUARTILES = 4
CONSOLE_LINE = (
    "step %(step)d  images %(images_seen)d  epoch %(epoch).2f  loss %(loss).4f  full %(loss_full).4f  "
    "masked %(loss_masked).4f  grad %(grad_norm).3g  lr %(lr).2e  %(images_per_sec).1f images/s"
)


class Meter:
    """Running means of what the steps report, kept on the device until they are read."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.device = trainer, trainer.accelerator.device
        passes = 1 if trainer.config.masking == "none" else 2
        self.flops_per_image = (
            3 * passes * forward_flops(trainer.model.config)
        )  # backward: twice the forward
        self.peak = peak_flops(self.device, trainer.config.precision)
        self.reset()

    def reset(self) -> None:
        self.losses = torch.zeros(2, device=self.device)  # full pass, masked pass
        self.quartiles = torch.zeros(
            2, QUARTILES, device=self.device
        )  # by timestep: sum of losses, of weights
        self.grad_norm = torch.zeros((), device=self.device)
        self.applied = torch.zeros((), device=self.device)
        self.steps = 0
        self.since = time.perf_counter()

    def add(self, report: StepReport, draws: StepDraws) -> None:
        """Take in a step. Losses are importance-weighted, as what is trained on: unweighted, they
        would rise when the timestep sampler begins to prefer the hard timesteps."""
        self.steps += 1
        self.applied += report.applied
        weight = draws.weight * report.applied
        weighted = torch.where(report.applied, report.losses, 0) * weight[:, None]
        means = weighted.mean(dim=0)
        self.losses[: len(means)] += means
        quartile = draws.t * QUARTILES // self.trainer.diffusion.num_timesteps
        self.quartiles.index_add_(1, quartile, torch.stack([weighted.sum(dim=1), weight]))
        self.grad_norm += torch.where(report.applied, report.grad_norm, 0)

    def read(self, steps_per_epoch: int) -> dict:
        """A line for the log: means since the last one."""
        trainer, batch = self.trainer, self.trainer.config.global_batch_size
        full, masked, grad_norm = (
            torch.stack([*self.losses, self.grad_norm]) / self.applied
        ).tolist()
        quartiles = (self.quartiles[0] / self.quartiles[1]).tolist()
        images_per_sec = self.steps * batch / (time.perf_counter() - self.since)
        flops = images_per_sec * self.flops_per_image / trainer.accelerator.num_processes
        row = {
            "step": trainer.step,
            "images_seen": trainer.step * batch,
            "epoch": trainer.step / steps_per_epoch,
            "loss": full + masked,
            "loss_full": full,
            "loss_masked": masked,
            "loss_by_timestep_quartile": quartiles,
            "grad_norm": grad_norm,
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "bad_steps": int(trainer.bad_steps),
            "images_per_sec": images_per_sec,
            "model_tflops_per_sec": flops / 1e12,  # of one process
            "model_flops_utilization": flops / self.peak if self.peak else None,
            "memory_gib": _peak_memory_bytes(self.device) / 2**30,
        }
        self.reset()
        return row


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class StopSignal:
    """Notes SIGTERM and SIGINT instead of dying of them; a second SIGINT kills as usual."""

    def __enter__(self) -> "StopSignal":
        self.number: int | None = None
        self._previous = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def _note(self, number: int, frame) -> None:
        self.number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@dataclasses.dataclass
class FitConfig:
    """How long, and what is written on the way; the weights do not depend on it."""

    max_steps: int = 400_000
    log_every: int = 100
    ckpt_every: int = 50_000
    num_workers: int = 4
    max_bad_steps: int = 20
    sample_every: int | None = None


def fit(
    trainer: Trainer,
    features: Features,
    run: Run,
    config: FitConfig,
    draw_samples: Callable | None = None,
) -> int:
    """Train until ``max_steps`` steps were taken in all, or a signal asks to stop; saves a
    checkpoint at the end.

    Args:
        draw_samples: called on the main process every ``sample_every`` steps.

    Returns:
        exit code: 0, or 130 after SIGINT.

    Raises:
        UserError: ``max_bad_steps`` steps in a row were not finite, or the last checkpoint cannot
            be written.
    """
    accelerator = trainer.accelerator
    device, main = accelerator.device, accelerator.is_main_process
    indices = BatchIndices(
        len(features),
        trainer.config.seed,
        trainer.config.global_batch_size,
        trainer.rows,
        trainer.step,
    )
    meter, processes = Meter(trainer), _processes(accelerator)
    with (
        StopSignal() as stop,
        _progress(trainer.step, config.max_steps, main) as bar,
        contextlib.closing(
            batches(features, indices, config.num_workers, device.type == "cuda")
        ) as loader,
    ):
        stopping = trainer.step >= config.max_steps
        while not stopping:
            stored, y = (tensor.to(device, non_blocking=True) for tensor in next(loader))
            draws = trainer.draw()
            report = trainer.update(trainer.latents(stored), y, draws)
            meter.add(report, draws)
            bar.update()
            logs = trainer.step % config.log_every == 0
            # A GPU is asked when it is waited for anyway: until then the steps leave no trace.
            if (logs or device.type == "cpu") and trainer.bad_in_a_row >= config.max_bad_steps:
                last = newest_checkpoint(run.checkpoints)
                raise UserError(
                    f"{trainer.bad_in_a_row} steps in a row were not finite; the last good checkpoint is {last}"
                )
            if logs:
                row = meter.read(indices.steps_per_epoch)
                with _going_on("tracker"):
                    accelerator.log(
                        {name: value for name, value in row.items() if isinstance(value, float)},
                        step=trainer.step,
                    )
                if main:
                    logger.info(CONSOLE_LINE, row)
                    with _going_on("metrics"):
                        run.log_metrics(row)
            if main and config.sample_every and trainer.step % config.sample_every == 0:
                with _going_on("samples"):
                    draw_samples()
            stopping = _any(stop.number is not None, processes) or trainer.step == config.max_steps
            if main and (stopping or trainer.step % config.ckpt_every == 0):
                with contextlib.nullcontext() if stopping else _going_on("checkpoint"):
                    logger.info("saved %s", run.save(trainer))
        accelerator.wait_for_everyone()
    return 130 if stop.number == signal.SIGINT else 0


def write_sample_grid(trainer: Trainer, vae: PixelVAE | LatentVAE, folder: Path) -> None:
    """A PNG of 8 x 4 EMA samples, the same classes and noise at every step: DDIM, 50 steps,
    guidance 1.5.
    """
    columns, rows = 8, 4
    num_classes = max(trainer.model.num_classes, 1)
    labels = (torch.arange(columns) * num_classes // columns).repeat(rows)
    recipe = Recipe(
        seed=0,
        num_sampling_steps="50",
        solver="ddim",
        cfg_scale=1.5,
        precision=trainer.config.precision,
    )
    done = next(
        generate(trainer.ema, vae, recipe, torch.arange(len(labels)), len(labels), labels=labels)
    )
    folder.mkdir(exist_ok=True)
    with atomic_write(folder / f"{trainer.step:07d}.png") as temporary:
        Image.fromarray(grid(done.images.unflatten(0, (rows, columns))).numpy()).save(
            temporary, format="png"
        )


@contextlib.contextmanager
def _going_on(what: str) -> Iterator[None]:
    """What cannot be written, on a full disk or for want of finite samples, is not worth the run:
    the next time may do.
    """
    try:
        yield
    except (OSError, UserError) as error:
        logger.error("%s: %s; training goes on", what, error)


@contextlib.contextmanager
def _progress(step: int, max_steps: int, main: bool) -> Iterator[tqdm]:
    disable = (
        None if main else True
    )  # None: a bar on a terminal only. A file has the log's lines, and may find no room
    with (
        tqdm(total=max_steps, initial=step, unit="step", disable=disable) as bar,
        logging_redirect_tqdm(),
    ):
        yield bar


def _processes(accelerator: Accelerator) -> dist.ProcessGroup | None:
    """A way for the processes to talk that no GPU has a part in; None if there is only one."""
    return dist.new_group(backend="gloo") if accelerator.num_processes > 1 else None


def _any(flag: bool, processes: dist.ProcessGroup | None) -> bool:
    """True on every process as soon as it is on one."""
    if processes is None:
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=processes)
    return bool(flags)


def log_to(path: Path, main: bool) -> None:
    """Log to the console and to a file, from the main process."""
    logging.raiseExceptions = False  # a full disk is no reason for a traceback at every line
    handlers = (
        [logging.StreamHandler(), logging.FileHandler(path)] if main else [logging.NullHandler()]
    )
    logging.basicConfig(
        level=logging.INFO, format="[%(asctime)s] %(message)s", handlers=handlers, force=True
    )

"""The loop around the training step: data, log, checkpoints, signals."""

import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from edt.checkpoints.folder import newest_checkpoint
from edt.data.batches import STOP_SIGNALS, BatchIndices, read_batches
from edt.data.features import Batch, Features
from edt.data.vae import VAE
from edt.sampling.config import SamplingConfig
from edt.sampling.generate import generate
from edt.sampling.image_grid import make_grid
from edt.training.config import LoopConfig
from edt.training.metrics import CONSOLE_LINE, Meter, append_row, tracker_values
from edt.training.run_dir import RunDirectory
from edt.training.trainer import StepReport, Trainer
from edt.utils.errors import UserError
from edt.utils.files import atomic_write

logger = logging.getLogger(__name__)
EXIT_CODE_SIGINT = 130  # 128 + SIGINT. SIGTERM is a scheduler's normal request to stop: exit code 0
# The terminal and a launcher such as torchrun both pass one Ctrl-C on: SIGINT comes twice.
SAME_KEY_PRESS = 2.0  # seconds


def training_loop(
    trainer: Trainer,
    features: Features,
    run_dir: RunDirectory,
    config: LoopConfig,
    vae: VAE | None = None,
) -> int:
    """Train until ``max_steps`` steps were taken in all, or a signal asks to stop.

    A checkpoint is saved at the end, also before an error ends the training between two steps.

    Args:
        trainer: at the step where training starts or continues.
        features: what is trained on.
        run_dir: where log, samples and checkpoints go.
        config: how long, and how often things are written.
        vae: decodes the grids of samples; needed where ``sample_every`` is set.

    Returns:
        exit code: 0, or 130 after SIGINT.

    Raises:
        UserError: ``max_skipped_steps`` steps in a row were skipped, or the last checkpoint cannot
            be written.
    """
    accelerator, device = trainer.accelerator, trainer.device
    is_main, first_step = accelerator.is_main_process, trainer.step
    seed, batch_size = trainer.config.seed, trainer.config.global_batch_size
    indices = BatchIndices(len(features), seed, batch_size, trainer.rows, first_step)
    loader = read_batches(features, indices, config.num_workers, pin_memory=device.type == "cuda")
    meter, group = Meter(trainer), _signal_group(accelerator)
    errors: list[Exception] = []
    with (
        StopSignal() as stop,
        _progress_bar(first_step, config.max_steps, is_main) as bar,
        contextlib.closing(loader),
    ):
        while trainer.step < config.max_steps:
            report = _next_step(trainer, loader, stop, errors, group)
            if report is None:
                break
            trainer.epoch += Fraction(1, indices.steps_per_epoch)
            with _collect(errors):
                bar.update()
                meter.add(report)
            logging_now = trainer.step % config.log_every == 0
            # Both lines wait for a GPU. Skipped steps have changed nothing there in the meantime.
            if logging_now or device.type == "cpu":
                _log_skipped_steps(meter, indices, features)
                if trainer.skipped_in_a_row >= config.max_skipped_steps:
                    break
            with _collect(errors):
                if logging_now:
                    _log(accelerator, run_dir, meter.read())
                if is_main:
                    _write_due(trainer, run_dir, config, vae)
        _log_skipped_steps(meter, indices, features)
        with _collect(errors):
            _finish(trainer, run_dir, first_step, config.max_skipped_steps)
        _raise_first(errors, group)
    return EXIT_CODE_SIGINT if stop.number == signal.SIGINT else 0


def _next_step(
    trainer: Trainer,
    loader: Iterator[Batch],
    stop: "StopSignal",
    errors: list[Exception],
    group: dist.ProcessGroup | None,
) -> StepReport | None:
    """Read a batch and take a step with it.

    Returns:
        None if no step was taken, because of a signal or an error on any process. The trainer's
        state is then that of the last step.
    """
    with _collect(errors):
        batch = next(loader)
    # All processes take the step, or none does: it needs every one of them.
    if _any(bool(errors) or stop.number is not None, group):
        return None
    try:
        return trainer.train_step(batch)
    except Exception as error:
        # The other processes wait in this step, and cannot be told that it failed.
        if group is not None or trainer.is_updating:
            raise
        errors.append(error)
        return None


def _write_due(
    trainer: Trainer, run_dir: RunDirectory, config: LoopConfig, vae: VAE | None
) -> None:
    """Write the samples and the checkpoint that are due after this step."""
    if config.sample_every and trainer.step % config.sample_every == 0:
        with _log_write_errors("samples"):
            write_sample_grid(trainer, vae, run_dir.folder / "samples")
    if trainer.step % config.ckpt_every == 0 and trainer.step < config.max_steps:
        with _log_write_errors("checkpoint"):
            logger.info("saved %s", run_dir.save(trainer.state()))


@contextlib.contextmanager
def _collect(errors: list[Exception]) -> Iterator[None]:
    """Keep an error for later, when the checkpoint is saved."""
    try:
        yield
    except Exception as error:
        errors.append(error)


def _raise_first(errors: list[Exception], group: dist.ProcessGroup | None) -> None:
    """Raise the first error; a UserError if only other processes have one. Waits for them all."""
    failed = _any(bool(errors), group)
    for error in errors[1:]:
        logger.error("after that error: %s", error)
    if errors:
        raise errors[0]
    if failed:
        raise UserError("another process of this run failed; its message says why")


class StopSignal:
    """Records a signal of STOP_SIGNALS instead of ending the process; a second Ctrl-C ends it.

    Attributes:
        number: the first signal that came, or None.
    """

    number: int | None = None
    _first_sigint: float | None = None  # seconds, of time.monotonic

    def __enter__(self) -> "StopSignal":
        numbers = set(STOP_SIGNALS)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            numbers.remove(signal.SIGHUP)  # started with nohup, to outlive the terminal
        self._previous = {number: signal.signal(number, self._record) for number in numbers}
        return self

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._first_sigint is None:
            self._first_sigint = now
            logger.warning(
                "stopping after this step; Ctrl-C again ends at once and loses the steps since the "
                "last checkpoint"
            )
        elif now - self._first_sigint >= SAME_KEY_PRESS:
            # A process that hangs never reaches the end of its step.
            signal.default_int_handler(number, frame)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def write_sample_grid(trainer: Trainer, vae: VAE | None, folder: Path) -> None:
    """Write a PNG of 8 x 4 EMA samples: DDIM, 50 steps, guidance 1.5.

    Classes and noise are the same at every step, so the pictures of a run can be compared.
    """
    if vae is None:
        raise UserError("grids of samples need a VAE; give one, or set sample_every to 0")
    columns, rows = 8, 4
    num_classes = max(trainer.model.num_classes, 1)
    labels = (torch.arange(columns) * num_classes // columns).repeat(rows)
    config = SamplingConfig(
        seed=0,
        num_sampling_steps="50",
        solver="ddim",
        cfg_scale=1.5,
        precision=trainer.config.precision,
    )
    indices = torch.arange(len(labels))
    (batch,) = generate(trainer.ema, vae, config, indices, len(labels), labels=labels)
    picture = make_grid(batch.images.unflatten(0, (rows, columns)))
    folder.mkdir(exist_ok=True)
    with atomic_write(folder / f"{trainer.step:07d}.png") as temporary:
        Image.fromarray(picture.numpy()).save(temporary, format="png")


def _log(accelerator: Accelerator, run_dir: RunDirectory, row: dict[str, Any]) -> None:
    """Write a row of metrics to trackers, console and metrics.jsonl."""
    with _log_write_errors("tracker"):
        accelerator.log(tracker_values(row), step=row["step"])
    if accelerator.is_main_process:
        logger.info(CONSOLE_LINE, row)
        with _log_write_errors("metrics"):
            append_row(run_dir.metrics, row)


def _log_skipped_steps(meter: Meter, indices: BatchIndices, features: Features) -> None:
    """Warn of the steps that were skipped since the last call, and name their images."""
    skipped = meter.skipped_steps()
    if len(skipped) > 10:
        logger.warning("%d steps were skipped; the last 10:", len(skipped))
    for step, rows in list(skipped.items())[-10:]:
        if not rows:
            logger.warning(
                "step %d was skipped: its gradient was not finite, although all losses were", step
            )
            continue
        images, _ = indices.global_batch(step - 1)
        shown = [f"image {index} ({features.locate(index)})" for index in images[rows[:8]].tolist()]
        logger.warning(
            "step %d was skipped: the losses of %d of its %d images were not finite: %s%s",
            step,
            len(rows),
            len(images),
            ", ".join(shown),
            ", ..." if len(rows) > len(shown) else "",
        )


def _finish(trainer: Trainer, run_dir: RunDirectory, first_step: int, max_skipped: int) -> None:
    """Save the last state, and raise a UserError if too many steps in a row were skipped.

    This is the task of the first process; the others learn of the error in :func:`_raise_first`.
    """
    if not trainer.accelerator.is_main_process:
        return
    in_a_row = int(trainer.skipped_in_a_row)
    stuck = in_a_row >= max_skipped
    # The skipped steps changed no weights. So a run without a good step since its last checkpoint
    # saves nothing. Started again and again, it would otherwise prune the older checkpoints, and a
    # user goes back to these if the weights themselves are the cause.
    last_good_step = trainer.step - in_a_row if stuck else trainer.step
    if last_good_step > max(first_step, run_dir.saved_step or 0):
        logger.info("saved %s", run_dir.save(trainer.state()))
    if stuck:
        checkpoint = newest_checkpoint(run_dir.checkpoints)
        last = "no checkpoint was saved before"
        if checkpoint is not None:
            last = f"the last good checkpoint is {checkpoint}"
        raise UserError(
            f"{in_a_row} steps in a row were not finite; {last}. "
            "Check the images that the log names, or train with a smaller --init-lr"
        )


@contextlib.contextmanager
def _log_write_errors(what: str) -> Iterator[None]:
    """Log OSError and UserError and keep training. The write is retried at the next interval."""
    try:
        yield
    except (OSError, UserError) as error:
        logger.error("%s: %s; training goes on", what, error)


@contextlib.contextmanager
def _progress_bar(step: int, max_steps: int, is_main: bool) -> Iterator[tqdm]:
    # tqdm takes None to mean "on a terminal only". A file gets the lines of the log instead.
    disable = None if is_main else True
    with (
        tqdm(total=max_steps, initial=step, unit="step", disable=disable) as bar,
        logging_redirect_tqdm(),
    ):
        yield bar


def _signal_group(accelerator: Accelerator) -> dist.ProcessGroup | None:
    """A gloo group that all-reduces the stop flag on the CPU; None for one process.

    With NCCL, the host would wait for the GPU in every step.
    """
    if accelerator.num_processes == 1:
        return None
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


def _any(flag: bool, group: dist.ProcessGroup | None) -> bool:
    """Whether the flag is set on any process; the same on all of them."""
    if group is None:
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=group)
    return bool(flags)


def configure_logging(path: Path, is_main: bool) -> None:
    """Log to the console and to a file, from the main process only."""
    logging.raiseExceptions = False  # with a full disk, every line would print a traceback
    # Without any handler, logging would print the warnings of every process to stderr.
    handlers: list[logging.Handler] = [logging.NullHandler()]
    if is_main:
        handlers = [logging.StreamHandler(), logging.FileHandler(path)]
    logging.basicConfig(
        level=logging.INFO, format="[%(asctime)s] %(message)s", handlers=handlers, force=True
    )

"""The loop around the training step: data, log, checkpoints, signals."""

import logging
import signal
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from edt.draws import StepDraws
from edt.features import Features
from edt.runs import Run
from edt.train import BatchIndices, Trainer, batches

logger = logging.getLogger(__name__)
QUARTILES = 4


class Meter:
    """Running means of what a step reports, kept on the device until they are read."""

    def __init__(self, num_timesteps: int, device: torch.device):
        self.num_timesteps = num_timesteps
        self.losses = torch.zeros(2, device=device)  # full pass, masked pass
        self.quartiles = torch.zeros(2, QUARTILES, device=device)  # by timestep: sum of losses, of importance weights
        self.steps, self.since = 0, time.perf_counter()

    def add(self, losses: torch.Tensor, draws: StepDraws) -> None:
        """Take in a step's unweighted losses, (B, passes). What is reported is importance-weighted, as what is
        trained on: otherwise it would rise when the timestep sampler begins to prefer the hard timesteps."""
        weighted = losses * draws.weight[:, None]
        means = weighted.mean(dim=0)
        self.losses[: len(means)] += means
        quartile = draws.t * QUARTILES // self.num_timesteps
        self.quartiles.index_add_(1, quartile, torch.stack([weighted.sum(dim=1), draws.weight]))
        self.steps += 1

    def read(self, batch: int) -> dict[str, float | list | None]:
        """Means since the last reading, and start anew."""
        full, masked = (self.losses / self.steps).tolist()
        quartiles = (self.quartiles[0] / self.quartiles[1]).tolist()
        seconds = time.perf_counter() - self.since
        row = {
            "loss": full + masked,
            "loss_full": full,
            "loss_masked": masked,
            "loss_by_timestep_quartile": [value if value == value else None for value in quartiles],
            "images_per_sec": self.steps * batch / seconds,
        }
        self.__init__(self.num_timesteps, self.losses.device)
        return row


class StopSignal:
    """Notes SIGTERM and SIGINT instead of dying of them; a second SIGINT kills as usual."""

    def __enter__(self) -> "StopSignal":
        self.number: int | None = None
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, frame) -> None:
        self.number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def fit(
    trainer: Trainer,
    features: Features,
    run: Run,
    *,
    max_steps: int,
    log_every: int = 100,
    ckpt_every: int = 50_000,
    num_workers: int = 4,
) -> int:
    """Train until ``max_steps`` steps were taken in all, or a signal asks to stop; saves a checkpoint at the end.

    Returns:
        exit code: 0, or 130 after SIGINT.
    """
    accelerator, batch = trainer.accelerator, trainer.config.global_batch_size
    device, main = accelerator.device, accelerator.is_main_process
    indices = BatchIndices(len(features), trainer.config.seed, batch, trainer.rows, trainer.step)
    meter = Meter(trainer.diffusion.num_timesteps, device)
    with StopSignal() as stop, tqdm(total=max_steps, initial=trainer.step, unit="step", disable=not main) as bar, \
            logging_redirect_tqdm():  # fmt: skip
        loader = batches(features, indices, num_workers, pin_memory=device.type == "cuda")
        while trainer.step < max_steps:
            x_start, y = next(loader)
            draws = trainer.draw()
            losses = trainer.update(x_start.to(device, non_blocking=True), y.to(device, non_blocking=True), draws)
            meter.add(losses, draws)
            bar.update()
            stopping = _agreed(accelerator, stop.number is not None)
            if trainer.step % log_every == 0:
                row = {"step": trainer.step, "images_seen": trainer.step * batch,
                       "epoch": trainer.step / indices.steps_per_epoch,
                       "lr": trainer.optimizer.param_groups[0]["lr"], **meter.read(batch)}  # fmt: skip
                if main:
                    run.log_metrics(row)
                    logger.info("step %(step)d  epoch %(epoch).2f  loss %(loss).4f  full %(loss_full).4f  "
                                "masked %(loss_masked).4f  lr %(lr).2e  %(images_per_sec).1f images/s", row)  # fmt: skip
            if stopping or trainer.step % ckpt_every == 0 or trainer.step == max_steps:
                if main:
                    logger.info("saved %s", run.save(trainer))
                accelerator.wait_for_everyone()
            if stopping:
                break
    return 130 if stop.number == signal.SIGINT else 0


def _agreed(accelerator, flag: bool) -> bool:
    """True on every process as soon as it is on one."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device)) > 0)


def log_to(path: Path, main: bool) -> None:
    """Log to the console and to a file, from the main process."""
    handlers = [logging.StreamHandler(), logging.FileHandler(path)] if main else [logging.NullHandler()]
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(message)s", handlers=handlers, force=True)

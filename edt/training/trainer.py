"""Training (paper, section 3.3 and 4.1): two passes a step, Adan, EMA; state that a run can be
continued from.
"""

import contextlib
import copy
import dataclasses
import signal
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from edt.checkpoints.folder import flatten_optimizer, restore_optimizer
from edt.data.features import Features, sample_posterior
from edt.diffusion import create_diffusion, create_timestep_sampler
from edt.models import EDT
from edt.nn.compilation import compile_network
from edt.nn.precision import allow_tf32
from edt.training.ema import update_ema
from edt.training.optim import Adan, create_optimizer, learning_rate
from edt.training.step_inputs import PassDraws, StepDraws, draw_step
from edt.utils.errors import UserError
from edt.utils.randomness import epoch_order, generator


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What the weights after a number of steps depend on, besides model and features. Defaults are
    the release's.
    """

    seed: int = 42
    global_batch_size: int = 256
    init_lr: float = 1e-3
    lr_steps: int = 400_000
    """Steps over which the learning rate falls linearly to 5e-5."""
    optimizer: str = "adan"
    ema_decay: float = 0.9999
    label_dropout: float = 0.1
    masking: str = "edt"
    """"edt": a full and a masked pass a step; "none": the full pass alone (the paper's starred
    models).
    """
    noise: str = "independent"
    """"independent": each pass draws its own noise and label dropout (release); "shared": one draw
    (paper, Eq. 3).
    """
    schedule_sampler: str = "loss-second-moment"
    precision: str = "tf32"
    """"fp32", "tf32" (matrix products on a GPU), or "bf16" (autocast; weights, optimizer, EMA and
    loss stay fp32).
    """
    clip: float | None = None
    """Largest norm of the gradient; None leaves it alone, as the release does."""


class StepReport(NamedTuple):
    """What one step says of itself."""

    losses: torch.Tensor  # (B, passes), unweighted, of the global batch in its order
    grad_norm: torch.Tensor  # (), before clipping
    applied: (
        torch.Tensor
    )  # () bool; False: loss or gradient was not finite, and the step left no trace


class Trainer:
    """Owns everything that changes during training, and one step of it.

    Attributes:
        model, ema: the bare networks.
        step: training steps taken, those that left no trace included.
        bad_steps: of these, the latter; bad_in_a_row: how many of them were the last. () int64, on
            the device.
    """

    def __init__(
        self,
        model: EDT,
        config: TrainConfig,
        accelerator: Accelerator,
        micro_batch_size: int | None = None,
        separate_passes: bool = False,
        compile: str = "off",
    ):
        """Args: micro_batch_size: images a process puts through the network at once; None, or the
        release's -1, is all of its
            share. The update is that of the whole batch.
        separate_passes: put the full and the masked pass through one after the other: slower, less
            memory, the same update.
        compile: one of edt.nn.compilation.COMPILE.

        Raises:
            UserError: the global batch does not divide over the processes.
        """
        world = accelerator.num_processes
        if config.global_batch_size < 1 or config.global_batch_size % world:
            raise UserError(
                f"--global-batch-size {config.global_batch_size} does not divide over {world} processes"
            )
        self.config, self.accelerator = config, accelerator
        self.local_batch = config.global_batch_size // world
        self.rows = slice(
            accelerator.process_index * self.local_batch,
            (accelerator.process_index + 1) * self.local_batch,
        )
        self.micro_batch = (
            self.local_batch
            if (micro_batch_size or 0) < 1
            else min(micro_batch_size, self.local_batch)
        )
        self.separate_passes = separate_passes
        allow_tf32(config.precision)
        self.model = model.to(accelerator.device).train()
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = create_optimizer(
            config.optimizer, self.model.parameters(), config.init_lr, compiled=compile != "off"
        )
        self.averages = list(self.ema.parameters())
        compile_network(self.model, compile)
        self.wrapped = accelerator.prepare_model(
            self.model
        )  # distributed, and in autocast if asked
        self.diffusion = create_diffusion()
        self.timestep_sampler = create_timestep_sampler(
            config.schedule_sampler, self.diffusion.num_timesteps
        )
        self.timestep_sampler.to(accelerator.device)
        self.step = 0
        self.bad_steps, self.bad_in_a_row = torch.zeros(
            2, dtype=torch.int64, device=accelerator.device
        ).unbind()

    def draw(self) -> StepDraws:
        """This step's draws for the global batch."""
        config = self.config
        return draw_step(
            config.seed,
            self.step,
            config.global_batch_size,
            self.model.config,
            self.timestep_sampler,
            self.accelerator.device,
            masking=config.masking,
            noise=config.noise,
            label_dropout=config.label_dropout,
        )

    def update(self, x_start: torch.Tensor, y: torch.Tensor, draws: StepDraws) -> StepReport:
        """One step: losses, gradients, and if they are finite on every process optimizer, EMA and
        timestep sampler.

        Args:
            x_start: this process's share of the latents, (b, C, S, S).
            y: its labels, (b,).
            draws: of the global batch, B.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config.init_lr, self.config.lr_steps)
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.accelerator.gather(self._backward(x_start, y, draws.rows(self.rows)))
        gradients = [
            parameter.grad for parameter in self.model.parameters() if parameter.grad is not None
        ]
        grad_norm = torch.nn.utils.get_total_norm(gradients)
        if self.config.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(
                self.model.parameters(), self.config.clip, grad_norm
            )
        # Losses are gathered and gradients reduced, so every process decides the same.
        applied = losses.isfinite().all() & grad_norm.isfinite()
        self._apply(applied)
        self.timestep_sampler.update(draws.t, losses.sum(dim=1), applied)
        self.step += 1  # data and draws move on in any case
        self.bad_steps = self.bad_steps + ~applied
        self.bad_in_a_row = (self.bad_in_a_row + 1) * ~applied
        return StepReport(losses, grad_norm, applied)

    def _apply(self, applied: torch.Tensor) -> None:
        """Optimizer and EMA, without waiting to learn whether the step is to leave a trace."""
        decay = self.config.ema_decay
        if isinstance(self.optimizer, Adan):
            self.optimizer.step(apply=applied, averages=self.averages, average_decay=decay)
        elif applied:  # adan-pytorch knows of no such thing: the host waits
            self.optimizer.step()
            update_ema(self.ema, self.model, decay)

    def latents(self, stored: torch.Tensor) -> torch.Tensor:
        """This step's latents from what the features store: themselves, or moments (b, 2C, S, S) to
        sample from.
        """
        config, device = self.model.config, self.accelerator.device
        if stored.shape[1] == config.in_channels:
            return stored
        shape = (
            self.config.global_batch_size,
            config.in_channels,
            config.input_size,
            config.input_size,
        )
        noise = torch.randn(
            shape,
            generator=generator(self.config.seed, "posterior", self.step, device),
            device=device,
        )
        return sample_posterior(stored, noise[self.rows])

    def _backward(self, x_start: torch.Tensor, y: torch.Tensor, draws: StepDraws) -> torch.Tensor:
        """Gradients of mean(weight * loss), summed over the passes; returns the losses, (b,
        passes).

        Micro-batches (and passes, if they are separate) are back-propagated one after the other, so
        only one of them is in memory; the processes exchange gradients in the last."""
        starts = range(0, self.local_batch, self.micro_batch)
        passes = range(len(draws.passes))
        groups = [slice(i, i + 1) for i in passes] if self.separate_passes else [slice(None)]
        losses = x_start.new_empty(self.local_batch, len(passes))
        for start in starts:
            rows = slice(start, start + self.micro_batch)
            part = draws.rows(rows)
            for group in groups:
                last = start == starts[-1] and group is groups[-1]
                with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                    loss = self._losses(x_start[rows], y[rows], part.t, part.passes[group])
                    self.accelerator.backward(
                        (part.weight[:, None] * loss).sum() / self.local_batch
                    )
                losses[rows, group] = loss.detach()
        return losses

    def _losses(
        self, x_start: torch.Tensor, y: torch.Tensor, t: torch.Tensor, passes: Sequence[PassDraws]
    ) -> torch.Tensor:
        """(b, passes): all of them go through the network as one batch, (passes b) rows in the
        order of the passes.

        With shared noise the passes differ in their masks only, and the network computes once what
        comes before these."""
        count, null = len(passes), self.model.num_classes
        noise = torch.cat([one.noise for one in passes])
        labels = torch.cat([torch.where(one.drop, null, y) for one in passes])
        masks = (
            passes[-1].masks
            if count == 1 or passes[-1].masks is None
            else passes[-1].masks.after_full_pass()
        )
        rows = len(y) if self.config.noise == "shared" else len(noise)

        def network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.wrapped(x_t[:rows], t[:rows], labels[:rows], masks)

        terms = self.diffusion.training_losses(
            network, x_start.repeat(count, 1, 1, 1), t.repeat(count), noise
        )
        return terms["loss"].view(count, -1).T

    def state(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, dict]]:
        """Everything a run is continued from, as named tensors and JSON documents (see
        edt.checkpoints.folder).
        """
        names = [name for name, _ in self.model.named_parameters()]
        optimizer, rest = flatten_optimizer(self.optimizer, names)
        tensors = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": optimizer,
            "sampler": self.timestep_sampler.state_dict(),
        }
        return tensors, {
            "state": {
                "step": self.step,
                "bad_steps": int(self.bad_steps),
                "optimizer": rest,
                "config": dataclasses.asdict(self.config),
            }
        }

    def load_state(self, tensors: dict[str, dict[str, torch.Tensor]], state: dict) -> None:
        """Inverse of :meth:`state`; an optimizer or timestep sampler of another kind than the
        state's starts anew.
        """
        names = [name for name, _ in self.model.named_parameters()]
        self.model.load_state_dict(tensors["model"])
        self.ema.load_state_dict(tensors["ema"])
        if state["config"]["optimizer"] == self.config.optimizer:
            restore_optimizer(self.optimizer, names, tensors["optimizer"], state["optimizer"])
        if state["config"]["schedule_sampler"] == self.config.schedule_sampler:
            self.timestep_sampler.load_state_dict(tensors["sampler"])
        self.step = state["step"]
        self.bad_steps.fill_(state["bad_steps"])


def steps_per_epoch(count: int, global_batch_size: int) -> int:
    """Whole batches in ``count`` images; what does not fill one is dropped.

    Raises:
        UserError: there is not one.
    """
    if count < global_batch_size:
        raise UserError(f"{count} images are fewer than --global-batch-size {global_batch_size}")
    return count // global_batch_size


class BatchIndices:
    """(indices, flips) of this process's share of each step from ``first_step`` on, without end;
    flips are those of the images' turns, for features that store both orientations."""

    def __init__(
        self, count: int, seed: int, global_batch_size: int, rows: slice, first_step: int = 0
    ):
        self.count, self.seed, self.batch, self.rows, self.first_step = (
            count,
            seed,
            global_batch_size,
            rows,
            first_step,
        )
        self.steps_per_epoch = steps_per_epoch(count, global_batch_size)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        step = self.first_step
        while True:
            epoch, position = divmod(step, self.steps_per_epoch)
            start = position * self.batch
            indices = epoch_order(self.seed, epoch, self.count)[start : start + self.batch]
            flips = torch.randint(2, (self.batch,), generator=generator(self.seed, "flip", step))
            yield indices[self.rows].numpy(), flips[self.rows].numpy()
            step += 1


def batches(
    features: Features, indices: BatchIndices, num_workers: int, pin_memory: bool
) -> Generator:
    """(what is stored, labels) of each step, read ahead by ``num_workers`` processes. Close it:
    they end with it.
    """
    loader = iter(
        torch.utils.data.DataLoader(
            features,
            batch_size=None,
            sampler=indices,
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=_ignore_signals,
        )
    )
    try:
        yield from loader
    finally:
        if (
            num_workers > 0
        ):  # not left to the garbage collector: a process waits for workers at its exit, and no signal ends these
            loader._shutdown_workers()


def _ignore_signals(worker: int) -> None:
    """Whether to stop is for the process that trains to decide; its workers read on until it tells
    them.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

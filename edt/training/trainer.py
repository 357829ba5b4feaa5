"""One training step, and the state that a run is continued from (paper, sections 3.3 and 4.1)."""

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import torch
from accelerate import Accelerator

from edt.baselines.mdtv2 import InputMasks
from edt.checkpoints.folder import TrainingState, flatten_optimizer, restore_optimizer
from edt.data.features import Batch, sample_posterior
from edt.diffusion import create_diffusion, create_timestep_sampler
from edt.masking import TokenMasks
from edt.nn.compilation import CompileMode, compile_network
from edt.nn.precision import autocast, set_matmul_precision
from edt.nn.transformer import DiffusionTransformer
from edt.training.config import TrainConfig
from edt.training.optim import create_optimizer, learning_rate
from edt.training.step_inputs import StepInputs, draw_posterior_noise, draw_step_inputs
from edt.utils.errors import UserError


class StepReport(NamedTuple):
    """What one step reports, for the global batch B in its order; tensors on the device."""

    t: torch.Tensor  # (B,) timesteps
    weight: torch.Tensor  # (B,) importance weights of t
    losses: torch.Tensor  # (B, passes), with min-SNR and without importance weights
    grad_norm: torch.Tensor  # (), before clipping
    found_inf: torch.Tensor  # () bool; True: a loss or the gradient was not finite, step skipped


class MicroBatch(NamedTuple):
    """n images of this process. The rows of its k passes are concatenated, pass by pass."""

    rows: slice  # of this process's images
    passes: slice  # of the step's passes
    x_start: torch.Tensor  # (k n, C, S, S)
    t: torch.Tensor  # (k n,)
    noise: torch.Tensor  # (k n, C, S, S)
    y: torch.Tensor  # (k n,), dropped labels replaced by the null class
    masks: TokenMasks | InputMasks | None  # of k n rows
    weight: torch.Tensor  # (n,)
    network_rows: int  # of the network's input: n with shared noise (repeated inside), else k n
    is_last: bool  # of the step; its backward pass reduces the gradients


class Trainer:
    """Owns everything that changes during training, and takes one step of it.

    Args:
        model: the network to train; moved to the accelerator's device.
        config: what the weights depend on.
        accelerator: device and processes. Its mixed precision must be "no" or agree with
            ``config.precision``.
        micro_batch_size: images per forward pass on each process; gradients are accumulated over
            the local batch, so the update is the same. None or -1 (release): the local batch.
        separate_passes: run the full and the masked pass one after the other instead of as one
            batch. This is slower and takes less memory; the update is the same.
        compile: a key of edt.nn.compilation.COMPILE_MODES.

    Attributes:
        model: the trained network.
        ema: the network with averaged weights.
        step: training steps taken, the skipped ones included.
        images_seen: images of these steps.
        epoch: passes over the features. The training loop counts them: it knows the features.
        is_updating: the update is not complete, and the state is that of no step.
        skipped_steps: steps that were skipped, () int64 on the device.
        skipped_in_a_row: how many of the last steps were skipped, () int64 on the device.

    Raises:
        UserError: the global batch size is not divisible by the number of processes, the
            accelerator computes in another precision, or the model has not this masking.
    """

    def __init__(
        self,
        model: DiffusionTransformer,
        config: TrainConfig,
        accelerator: Accelerator,
        micro_batch_size: int | None = None,
        separate_passes: bool = False,
        compile: CompileMode = "off",
    ) -> None:
        _check_precision(config, accelerator)
        _check_masking(config, model, compile)
        processes, rank = accelerator.num_processes, accelerator.process_index
        if config.global_batch_size % processes:
            raise UserError(
                f"--global-batch-size {config.global_batch_size} is not divisible by "
                f"{processes} processes; choose a multiple of {processes}"
            )
        self.config, self.accelerator = config, accelerator
        self.device = accelerator.device
        self.local_batch_size = config.global_batch_size // processes
        self.rows = slice(rank * self.local_batch_size, (rank + 1) * self.local_batch_size)
        if micro_batch_size is None or micro_batch_size < 1:
            micro_batch_size = self.local_batch_size
        self.micro_batch_size = min(micro_batch_size, self.local_batch_size)
        self.separate_passes = separate_passes or not model.can_batch_passes

        set_matmul_precision(config.precision)
        self.autocast = autocast(self.device, config.precision)
        self.model = model.to(self.device).train()
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        if config.masking == "none":
            self.model.freeze_masked_pass()
        trainable = dict(self._trainable_parameters())
        self.ema_params = [p for name, p in self.ema.named_parameters() if name in trainable]
        self.optimizer = create_optimizer(
            config.optimizer, trainable.values(), config.init_lr, compiled=compile != "off"
        )
        compile_network(self.model, compile)
        self.network = accelerator.prepare_model(self.model)  # the model, or its DDP wrapper
        self.diffusion = create_diffusion(min_snr_gamma=config.min_snr_gamma)
        self.timestep_sampler = create_timestep_sampler(config.schedule_sampler).to(self.device)
        self.step, self.images_seen, self.epoch = 0, 0, Fraction(0)
        self.is_updating = False
        zeros = torch.zeros(2, dtype=torch.int64, device=self.device)
        self.skipped_steps, self.skipped_in_a_row = zeros.unbind()

    def train_step(self, batch: Batch, inputs: StepInputs | None = None) -> StepReport:
        """Take one step: losses, gradients and, if all are finite, the update.

        Args:
            batch: this process's images of the step.
            inputs: of the global batch; None draws them from (seed, step).
        """
        # Draw the step's inputs.
        if inputs is None:
            inputs = self.draw_inputs()
        y = batch.labels.to(self.device, non_blocking=True)
        x_start = self.clean_latents(batch.stored.to(self.device, non_blocking=True))
        config = self.config
        lr = learning_rate(self.step, config.init_lr, config.final_lr, config.lr_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)

        # Losses and gradients. Only one micro-batch is in memory at a time.
        losses = x_start.new_empty(self.local_batch_size, len(inputs.passes))
        for part in self._split(x_start, y, inputs.select(self.rows)):
            with self._exchange_gradients(part.is_last):
                x_t = self.diffusion.q_sample(part.x_start, part.t, part.noise)
                n = part.network_rows
                with self.autocast:
                    output = self.network(x_t[:n], part.t[:n], part.y[:n], part.masks)
                terms = self.diffusion.losses(output, part.x_start, x_t, part.t, part.noise)
                loss = terms.loss.view(-1, len(part.weight)).T  # (images, passes)
                ((part.weight[:, None] * loss).sum() / self.local_batch_size).backward()
            losses[part.rows, part.passes] = loss.detach()

        # Losses are gathered and gradients are reduced, so every process decides the same.
        losses = self.accelerator.gather(losses)
        parameters = list(self.model.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm(gradients)
        if config.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, grad_norm)
        found_inf = ~(losses.isfinite().all() & grad_norm.isfinite())

        # Update. found_inf stays a tensor: the host does not wait to learn its value.
        self.is_updating = True
        self.optimizer.step(
            found_inf=found_inf, ema_params=self.ema_params, ema_decay=config.ema_decay
        )
        self.timestep_sampler.update(inputs.t, losses.sum(dim=1), found_inf)
        self.step += 1  # a skipped step counts too: data and draws move on
        self.images_seen += config.global_batch_size
        self.skipped_steps = self.skipped_steps + found_inf
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * found_inf
        self.is_updating = False
        return StepReport(inputs.t, inputs.weight, losses, grad_norm, found_inf)

    def draw_inputs(self) -> StepInputs:
        """This step's inputs for the global batch."""
        return draw_step_inputs(
            self.config, self.step, self.model.config, self.timestep_sampler, self.device
        )

    def clean_latents(self, stored: torch.Tensor) -> torch.Tensor:
        """This step's latents x_0, (b, C, S, S), from what the features store.

        Args:
            stored: latents (b, C, S, S), or moments (b, 2C, S, S) that are sampled from.
        """
        if stored.shape[1] == self.model.in_channels:
            return stored
        noise = draw_posterior_noise(self.config, self.step, self.model.config, self.device)
        return sample_posterior(stored, noise[self.rows])

    def _split(
        self, x_start: torch.Tensor, y: torch.Tensor, inputs: StepInputs
    ) -> Iterator[MicroBatch]:
        """Micro-batches of this process's images, and of single passes if they are separate."""
        count = len(inputs.passes)
        groups = [slice(0, count)]
        if self.separate_passes:
            groups = [slice(i, i + 1) for i in range(count)]
        starts = range(0, self.local_batch_size, self.micro_batch_size)
        for start in starts:
            rows = slice(start, start + self.micro_batch_size)
            part = inputs.select(rows)
            for group in groups:
                passes = part.passes[group]
                null = torch.full_like(y[rows], self.model.num_classes)
                labels = [torch.where(one_pass.drop, null, y[rows]) for one_pass in passes]
                masks = passes[-1].masks
                if len(passes) > 1 and isinstance(masks, TokenMasks):
                    masks = masks.prepend_full_pass()
                # With shared noise the passes differ in their masks only. The network gets the
                # rows once, and repeats them where the first mask acts.
                copies = 1 if self.config.noise == "shared" else len(passes)
                yield MicroBatch(
                    rows=rows,
                    passes=group,
                    x_start=x_start[rows].repeat(len(passes), 1, 1, 1),
                    t=part.t.repeat(len(passes)),
                    noise=torch.cat([one_pass.noise for one_pass in passes]),
                    y=torch.cat(labels),
                    masks=masks,
                    weight=part.weight,
                    network_rows=copies * len(part.t),
                    is_last=start == starts[-1] and group is groups[-1],
                )

    def _exchange_gradients(self, is_last: bool) -> contextlib.AbstractContextManager:
        """Processes exchange gradients in the step's last backward pass only."""
        if is_last:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(self.network)

    def _trainable_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Names and parameters; DiT's position table is a parameter that is not trained."""
        named = self.model.named_parameters()
        return ((name, parameter) for name, parameter in named if parameter.requires_grad)

    def state(self) -> TrainingState:
        """Everything that the run is continued from; the tensors are not copied."""
        names = [name for name, _ in self._trainable_parameters()]
        optimizer_tensors, optimizer_values = flatten_optimizer(self.optimizer, names)
        return TrainingState(
            step=self.step,
            skipped_steps=int(self.skipped_steps),
            config=dataclasses.asdict(self.config),
            optimizer=optimizer_values,
            tensors={
                "model": self.model.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizer": optimizer_tensors,
                "sampler": self.timestep_sampler.state_dict(),
            },
            images_seen=self.images_seen,
            epoch=self.epoch,
        )

    def load_state(self, state: TrainingState) -> None:
        """Inverse of :meth:`state`.

        If the state is of another optimizer or timestep sampler than the configuration names, the
        new one starts without a history.
        """
        names = [name for name, _ in self._trainable_parameters()]
        self.model.load_state_dict(state.tensors["model"])
        self.ema.load_state_dict(state.tensors["ema"])
        if state.config["optimizer"] == self.config.optimizer:
            tensors = state.tensors["optimizer"]
            restore_optimizer(self.optimizer, names, tensors, state.optimizer)
        if state.config["schedule_sampler"] == self.config.schedule_sampler:
            self.timestep_sampler.load_state_dict(state.tensors["sampler"])
        self.step = state.step
        self.images_seen, self.epoch = state.images_seen or 0, state.epoch or Fraction(0)
        self.skipped_steps.fill_(state.skipped_steps)


def _check_masking(config: TrainConfig, model: DiffusionTransformer, compile: CompileMode) -> None:
    """Refuse a masking that the model's family has not, or that cannot be compiled."""
    if config.masking not in model.maskings:
        raise UserError(
            f"{model.config.family} has no masking {config.masking!r}; "
            f"choose --masking {' or '.join(model.maskings)}"
        )
    if config.masking == "mdt" and compile == "full":
        raise UserError(
            "--compile full would compile a graph for every number of tokens that --masking mdt "
            "keeps; use --compile block"
        )


def _check_precision(config: TrainConfig, accelerator: Accelerator) -> None:
    """The configuration decides the precision; refuse an accelerator that asks for another."""
    if accelerator.mixed_precision not in ("no", config.precision):
        raise UserError(
            f"the accelerator computes in {accelerator.mixed_precision} and the training "
            f"configuration in {config.precision}; choose the precision with --precision only"
        )

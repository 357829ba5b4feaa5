"""Train EDT on extracted features with the masking strategy.

accelerate launch --multi_gpu --num_processes 8 train_mask_adan.py --model EDT-S/2 \\
    --feature-path features256 --run-dir results/s --max-steps 400000
"""

import argparse
import contextlib
import dataclasses
import logging
import math
from pathlib import Path

import torch

from edt.checkpoints.folder import list_checkpoints
from edt.checkpoints.loading import read_weights
from edt.cli.arguments import (
    COUNT,
    COUNT_OR_ZERO,
    HelpFormatter,
    Number,
    add_speed_arguments,
    describe,
    from_arguments,
    nonempty,
    nonempty_path,
    set_defaults_from,
)
from edt.cli.build import check_speed_options, load_vae_for_training
from edt.cli.main import exit_on_user_error
from edt.data.batches import steps_per_epoch
from edt.data.features import Features, open_features
from edt.diffusion import TIMESTEP_SAMPLERS
from edt.masking import MASKINGS
from edt.registry import MODELS, create_model
from edt.training.accelerator import create_accelerator, first_process_decides
from edt.training.config import PASS_NOISES, LoopConfig, TrainConfig, default_init_lr
from edt.training.init_from import InitReport, init_from
from edt.training.loop import configure_logging, training_loop
from edt.training.metrics import Tracker, check_tracker, drop_rows_after, start_tracker
from edt.training.optim import OPTIMIZERS
from edt.training.run_dir import (
    RunDirectory,
    check_all_see,
    choose_run_dir,
    lock_run_dir,
    newest_run_dir,
    resolve_resume,
)
from edt.training.trainer import Trainer
from edt.utils.choices import choices
from edt.utils.distributed import ignored_launcher_settings
from edt.utils.errors import UserError
from edt.utils.weights_format import check_is_utf8

RESUME_RUN = Path("RUN-DIR")  # --resume without a path


def parser() -> argparse.ArgumentParser:
    """The command line of the training script."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    p.add_argument(
        "--feature-path",
        "--features-path",
        type=nonempty_path,
        default="features256",
        metavar="DIR",
        help="folder made by extract_features.py",
    )
    p.add_argument("--model", default="EDT-S/2", metavar="NAME", help=f"one of {', '.join(MODELS)}")
    p.add_argument(
        "--num-classes",
        type=int,
        help="default: as recorded in the features, else 1000; 0 trains an unconditional model",
    )
    p.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="fail if the features differ in image size; default: theirs",
    )
    p.add_argument(
        "--vae",
        type=nonempty,
        help="fail if the features were extracted with another VAE; --sample-every uses it; "
        "default: theirs",
    )
    run = p.add_argument_group("run")
    _add_start_arguments(run)
    _add_run_arguments(run)
    _add_method_arguments(p.add_argument_group("method"))
    add_speed_arguments(p.add_argument_group("speed"))
    set_defaults_from(p, TrainConfig, LoopConfig)
    # None: main() derives init_lr from the model's name and max_steps from --epochs.
    p.set_defaults(init_lr=None, max_steps=None)
    return p


def _add_start_arguments(g: argparse._ArgumentGroup) -> None:
    """Add the flags that say which folder a run has, and what it starts from."""
    add = g.add_argument
    add(
        "--results-dir",
        type=nonempty_path,
        default="results",
        metavar="DIR",
        help="a new run is DIR/NNN-MODEL",
    )
    add(
        "--run-dir",
        type=nonempty_path,
        metavar="DIR",
        help="continued if it holds a checkpoint; default: a new run",
    )
    add(
        "--resume",
        "--checkpoint-path",
        type=nonempty_path,
        nargs="?",
        const=RESUME_RUN,
        metavar="PATH",
        help="resume from PATH, a checkpoint or a run folder, and fail if there is no checkpoint; "
        "PATH defaults to --run-dir, else to the newest run of --model in --results-dir",
    )
    add(
        "--resume-step", type=int, metavar="STEP", help="like --resume, at this step; default: none"
    )
    add(
        "--allow-config-change",
        action="store_true",
        help="resume although method flags or features differ from those of the checkpoint",
    )
    add(
        "--init-from",
        type=nonempty_path,
        metavar="CKPT",
        help="initialise from the EMA weights of this checkpoint, see docs/training.md; default: "
        "new weights",
    )


def _add_run_arguments(g: argparse._ArgumentGroup) -> None:
    """Add the flags of one run: duration, logging, checkpoints."""
    add = g.add_argument
    add("--epochs", type=COUNT, default=90, help="passes over the features")
    add("--max-steps", type=COUNT, metavar="STEPS", help="total steps; default: those of --epochs")
    add("--log-every", type=COUNT, metavar="STEPS", help="steps between lines of the log")
    add("--ckpt-every", type=COUNT, metavar="STEPS", help="steps between checkpoints")
    add("--keep-last", type=COUNT, default=3, metavar="N", help="keep the N newest checkpoints")
    add(
        "--keep-every",
        type=COUNT,
        default=50_000,
        metavar="STEPS",
        help="also keep the checkpoints at multiples of STEPS",
    )
    add(
        "--sample-every",
        type=COUNT_OR_ZERO,
        metavar="STEPS",
        help="steps between grids of EMA samples from the same noise; 0: none",
    )
    add("--tracker", choices=choices(Tracker), help="also log to this tracker; default: none")
    add("--num-workers", type=COUNT_OR_ZERO, help="processes that read features ahead")
    add(
        "--max-skipped-steps",
        "--max-bad-steps",
        type=COUNT,
        metavar="STEPS",
        help="stop after so many steps in a row whose loss or gradient is not finite",
    )


def _add_method_arguments(g: argparse._ArgumentGroup) -> None:
    """Add the flags of TrainConfig, and those that split a batch to save memory."""
    add = g.add_argument
    fraction = Number(float, least=0, most=1)
    positive = Number(float, above=0)
    add("--global-batch-size", type=COUNT, metavar="IMAGES", help="over all processes")
    add(
        "--micro-batch-size",
        "--mini-batch-size",
        type=Number(least=-1),
        metavar="IMAGES",
        help="images per forward pass and process, with gradient accumulation; does not change the "
        "update (default: all images of the process)",
    )
    add(
        "--separate-passes",
        action="store_true",
        help="full and masked pass one after the other: slower, less memory, the same update",
    )
    add("--init-lr", type=positive, help="first learning rate (default: 1e-3; 5e-4 for EDT-XL)")
    add("--final-lr", type=positive, help="learning rate after --lr-steps")
    add("--lr-steps", type=COUNT, help="steps from --init-lr to --final-lr, linearly")
    add("--optimizer", choices=OPTIMIZERS, help=describe(OPTIMIZERS))
    add("--max-grad-norm", "--clip", type=positive, help="clip to this norm (default: never)")
    add("--ema-decay", type=fraction, help="decay of the weights' moving average, per step")
    add(
        "--label-dropout",
        type=fraction,
        help="probability that a label is replaced by the null class",
    )
    add("--masking", choices=MASKINGS, help=describe(MASKINGS))
    add("--noise", choices=PASS_NOISES, help=describe(PASS_NOISES))
    add(
        "--schedule-sampler",
        "--schedule_sampler",
        choices=TIMESTEP_SAMPLERS,
        help="how timesteps are drawn",
    )
    add("--min-snr-gamma", type=positive, help="gamma of the loss weight min(SNR, gamma) / SNR")
    add("--seed", "--global-seed", type=int, help="seed of weights, data order and noise")


def resolve_run_dir(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """The run's folder, and the checkpoint or run to resume from (None: not required)."""
    resume = args.resume
    if resume == RESUME_RUN or (resume is None and args.resume_step is not None):
        resume = args.run_dir or newest_run_dir(args.results_dir, args.model)
    is_inside_run = resume is not None and resume.name == "checkpoints"
    if is_inside_run and not (resume / "checkpoints").exists():
        resume = resume.parent  # its run is meant
    folder = choose_run_dir(args.run_dir, args.results_dir, args.model, resume)
    check_is_utf8(folder)  # else its checkpoints could be written, but not read
    return folder, resume


def create_trainer(
    args: argparse.Namespace, config: TrainConfig, features: Features, image_size: int | None
) -> Trainer:
    """The trainer of a fresh network."""
    accelerator = create_accelerator()
    check_speed_options(args, accelerator.device)
    channels, side, _ = features.latent_shape
    torch.manual_seed(config.seed)  # the initial weights
    model = create_model(
        args.model,
        input_size=side,
        in_channels=channels,
        num_classes=features.num_classes,
        image_size=image_size,
    )
    model.set_attention(args.attention)
    return Trainer(
        model, config, accelerator, args.micro_batch_size, args.separate_passes, args.compile
    )


def start_from(path: str, trainer: Trainer) -> InitReport:
    """Copy what fits of the weights of another model into a fresh trainer's, and into its EMA.

    Raises:
        UserError: nothing fits; or the weights cannot be read.
    """
    report = init_from(trainer.model, read_weights(path).tensors)
    if not report.kept and not report.resized:
        raise UserError(
            f"none of the tensors in {path} fits a parameter of the model; "
            "give the weights of a similar model to --init-from"
        )
    trainer.ema.load_state_dict(trainer.model.state_dict())
    return report


def last_step(args: argparse.Namespace, trainer: Trainer, epoch_steps: int) -> int:
    """The step at which training ends: --max-steps, or the end of --epochs.

    The epochs behind the trainer count as they were, with another batch size or other features.
    """
    steps_left = math.ceil(max(args.epochs - trainer.epoch, 0) * epoch_steps)
    return args.max_steps or trainer.step + steps_left


def log_resumed(checkpoint: Path, trainer: Trainer, max_steps: int) -> None:
    """Log where the run continues, or that it has nothing left to do."""
    step, epoch = trainer.step, float(trainer.epoch)
    if step < max_steps:
        logging.info("resumed %s at step %d, epoch %.2f", checkpoint, step, epoch)
    else:
        logging.info(
            "%s is finished: it is at step %d, epoch %.2f, and training ends at step %d; "
            "a larger --max-steps or --epochs continues it",
            *(checkpoint, step, epoch, max_steps),
        )


def log_start(
    args: argparse.Namespace, run_dir: RunDirectory, config: TrainConfig, report: InitReport | None
) -> None:
    """Log what is trained where, and what --init-from kept, resized and left new.

    Without --run-dir, name an unfinished run that was perhaps meant.
    """
    logging.info("training %s in %s: %s", args.model, run_dir.folder, config)
    if args.run_dir is None:
        checkpoint = run_dir.find_unfinished(args.results_dir, config, args.max_steps)
        if checkpoint is not None:
            folder, step = checkpoint.parent.parent, int(checkpoint.name)
            logging.warning(
                "%s holds an unfinished run of the same settings, at step %d of %d. "
                "This is a new run; --run-dir %s continues the unfinished one",
                *(folder, step, args.max_steps, folder),
            )
    for outcome, names in ({} if report is None else report._asdict()).items():
        listed = ", ".join(names) or "none"
        logging.info("from %s: %d parameters %s: %s", args.init_from, len(names), outcome, listed)
    if report is not None and len(report.new) > len(report.kept) + len(report.resized):
        logging.warning(
            "fewer than half of the parameters come from %s; is it of a similar model?",
            args.init_from,
        )


@exit_on_user_error()
def main(argv: list[str] | None = None) -> int:
    """Train; returns the exit code."""
    args = parser().parse_args(argv)
    check_tracker(args.tracker)
    args.init_lr = args.init_lr or default_init_lr(args.model)
    config: TrainConfig = from_arguments(TrainConfig, args)

    features = open_features(args.feature_path)
    features.validate_against(args.image_size, args.num_classes)
    info = features.info()
    epoch_steps = steps_per_epoch(len(features), config.global_batch_size)
    trainer = create_trainer(args, config, features, info.image_size)
    accelerator, model_config = trainer.accelerator, trainer.model.config
    vae = load_vae_for_training(args.vae, features, bool(args.sample_every), accelerator.device)
    if args.vae and info.vae:  # the same VAE, which may have moved
        info = dataclasses.replace(info, vae=args.vae)

    # The first process decides: the others may see the results folder a moment later.
    folder, resume = first_process_decides(lambda: resolve_run_dir(args))
    run_dir = RunDirectory(
        folder, args.model, model_config, info.to_dict(), args.keep_last, args.keep_every
    )
    is_main = accelerator.is_main_process
    # A run that is continued needs no weights to start from: their file may be gone.
    is_new = resume is None and not list_checkpoints(run_dir.checkpoints)
    report = start_from(args.init_from, trainer) if args.init_from and is_new else None
    with contextlib.ExitStack() as stack:
        first_process_decides(lambda: stack.enter_context(lock_run_dir(folder)))
        configure_logging(folder / "log.txt", is_main)
        for sentence in ignored_launcher_settings(vars(args)):
            logging.warning(sentence)
        if is_main:
            run_dir.sweep()
        checkpoint = first_process_decides(lambda: resolve_resume(folder, resume, args.resume_step))
        check_all_see(checkpoint, folder)
        if checkpoint is not None:
            trainer.load_state(run_dir.load(checkpoint, config, args.allow_config_change))
        args.max_steps = last_step(args, trainer, epoch_steps)
        if checkpoint is not None:
            log_resumed(checkpoint, trainer, args.max_steps)
        elif is_main:
            log_start(args, run_dir, config, report)
        # Nothing is set aside or dropped if there is nothing to do.
        if is_main and trainer.step < args.max_steps:
            if checkpoint is not None:
                run_dir.continue_from(checkpoint)
            drop_rows_after(run_dir.metrics, trainer.step)
        if args.tracker:
            start_tracker(accelerator, args.tracker, folder, vars(args), trainer.step)
        loop_config: LoopConfig = from_arguments(LoopConfig, args)
        code = training_loop(trainer, features, run_dir, loop_config, vae)
    accelerator.end_training()
    return code


if __name__ == "__main__":
    raise SystemExit(main())

"""Train EDT on extracted features with the masking strategy.

accelerate launch --multi_gpu --num_processes 8 train_mask_adan.py --model EDT-S/2 --feature-path
features256 --epochs 81"""

import argparse
import contextlib
import logging
import sys

import torch
from accelerate.utils import broadcast_object_list

from edt.checkpoints.folder import build, init_from, read_weights
from edt.cli.build import (
    COUNT,
    add_speed_arguments,
    check_speed,
    check_tracker,
    exit_on_user_error,
    from_arguments,
    make_accelerator,
    number,
    start_tracker,
)
from edt.data.features import open_features
from edt.data.vae import load_vae
from edt.models import EDT_models
from edt.training.loop import FitConfig, fit, log_to, write_sample_grid
from edt.training.optim import OPTIMIZERS
from edt.training.run_dir import Run, locked, run_folder
from edt.training.trainer import TrainConfig, Trainer, steps_per_epoch


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--feature-path",
        "--features-path",
        default="features256",
        help="folder made by extract_features.py",
    )
    p.add_argument(
        "--model", default="EDT-S/2", metavar="NAME", help=f"one of {', '.join(EDT_models)}"
    )
    p.add_argument(
        "--num-classes",
        type=int,
        help="default: the features' own; 1000 where they do not say; 0: unconditional",
    )
    p.add_argument("--image-size", type=int, help="checked against the features")
    p.add_argument("--vae", help="checked against the features")

    g = p.add_argument_group("run")
    g.add_argument("--results-dir", default="results", help="the run's folder is NNN-MODEL in it")
    g.add_argument("--run-dir", help="the run's folder; one that holds a checkpoint is continued")
    g.add_argument(
        "--resume",
        "--checkpoint-path",
        nargs="?",
        const="",
        metavar="PATH",
        help="demand a checkpoint to continue from: PATH, or the newest of --run-dir",
    )
    g.add_argument("--resume-step", type=int, help="demand this step's checkpoint")
    g.add_argument(
        "--allow-config-change",
        action="store_true",
        help="continue with other flags of the method, or features",
    )
    g.add_argument(
        "--init-from",
        metavar="CKPT",
        help="start from the weights of another model, as far as they fit",
    )
    g.add_argument("--epochs", type=COUNT, default=90)
    g.add_argument("--max-steps", type=COUNT, help="stop here instead of after --epochs")
    g.add_argument("--log-every", type=COUNT, default=100, help="steps")
    g.add_argument("--ckpt-every", type=COUNT, default=50_000, help="steps")
    g.add_argument("--keep-last", type=COUNT, default=3, help="checkpoints that stay")
    g.add_argument(
        "--keep-every",
        type=COUNT,
        default=50_000,
        help="checkpoints at multiples of this many steps stay",
    )
    g.add_argument(
        "--sample-every",
        type=number(least=0),
        help="steps between grids of EMA samples from one noise; 0: none",
    )
    g.add_argument(
        "--tracker", choices=["tensorboard", "wandb"], help="besides log.txt and metrics.jsonl"
    )
    g.add_argument("--num-workers", type=number(least=0), default=4)

    g = p.add_argument_group("method")
    g.add_argument("--global-batch-size", type=COUNT, default=256)
    g.add_argument(
        "--mini-batch-size",
        type=number(least=-1),
        help="images a process puts through at once; the same update",
    )
    g.add_argument(
        "--separate-passes",
        action="store_true",
        help="full and masked pass one after the other: slower, less memory, the same update",
    )
    g.add_argument("--init-lr", type=number(float, above=0), help="default: 1e-3; 5e-4 for EDT-XL")
    g.add_argument(
        "--lr-steps", type=COUNT, default=400_000, help="steps from --init-lr down to 5e-5"
    )
    g.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default="adan",
        help="; ".join(f"{name}: {what}" for name, what in OPTIMIZERS.items()),
    )
    g.add_argument(
        "--clip", type=number(float, above=0), help="largest gradient norm; default: no clipping"
    )
    g.add_argument(
        "--max-bad-steps", type=COUNT, default=20, help="steps in a row that may be not finite"
    )
    g.add_argument("--ema-decay", type=number(float, least=0, most=1), default=0.9999)
    g.add_argument(
        "--masking", choices=["edt", "none"], default="edt", help="none: the paper's starred models"
    )
    g.add_argument(
        "--noise",
        choices=["independent", "shared"],
        default="independent",
        help="of a step's two passes: independent as in the release, shared as in the paper's Eq. 3",
    )
    g.add_argument(
        "--schedule-sampler",
        "--schedule_sampler",
        choices=["uniform", "loss-second-moment"],
        default="loss-second-moment",
    )
    g.add_argument("--global-seed", type=int, default=42, dest="seed")
    add_speed_arguments(p.add_argument_group("speed"))
    return p


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check_tracker(args.tracker)
    args.init_lr = args.init_lr or (5e-4 if args.model.startswith("EDT-XL") else 1e-3)
    config, fit_config = from_arguments(TrainConfig, args), from_arguments(FitConfig, args)
    features = open_features(args.feature_path)
    features.settle(image_size=args.image_size, vae=args.vae, num_classes=args.num_classes)
    epoch_steps = steps_per_epoch(len(features), config.global_batch_size)
    fit_config.max_steps = args.max_steps or args.epochs * epoch_steps
    channels, side, _ = features.latent_shape
    accelerator = make_accelerator(bf16=args.precision == "bf16")
    check_speed(args, accelerator.device)
    torch.manual_seed(args.seed)  # of the initial weights
    model = build(
        args.model, input_size=side, in_channels=channels, num_classes=features.num_classes
    )
    started_from = init_from(model, read_weights(args.init_from)[0]) if args.init_from else {}
    model.set_attention(args.attention)
    trainer = Trainer(
        model, config, accelerator, args.mini_batch_size, args.separate_passes, args.compile
    )

    resume = "" if args.resume is None and args.resume_step is not None else args.resume
    folder = broadcast_object_list(
        [run_folder(args.run_dir, args.results_dir, args.model, resume)]
    )[0]
    run = Run(
        folder, {"name": args.model, "features": features.notes()}, args.keep_last, args.keep_every
    )
    with locked(run.folder) if accelerator.is_main_process else contextlib.nullcontext():
        accelerator.wait_for_everyone()
        log_to(run.folder / "log.txt", accelerator.is_main_process)
        checkpoint = run.find(resume, args.resume_step)
        if checkpoint is not None:
            run.load(trainer, checkpoint, args.allow_config_change)
            logging.info(
                "resumed %s at step %d, epoch %.2f",
                checkpoint,
                trainer.step,
                trainer.step / epoch_steps,
            )
        else:
            logging.info("training %s in %s: %s", args.model, run.folder, config)
            for what, names in started_from.items():
                logging.info(
                    "from %s: %d parameters %s: %s",
                    args.init_from,
                    len(names),
                    what,
                    ", ".join(names[:8]),
                )
        if accelerator.is_main_process:
            run.forget_metrics_after(trainer.step)
        if args.tracker:
            start_tracker(accelerator, args.tracker, run.folder, vars(args))
        vae = (
            load_vae(features.notes().get("vae", "ema"), accelerator.device)
            if args.sample_every
            else None
        )
        code = fit(
            trainer,
            features,
            run,
            fit_config,
            lambda: write_sample_grid(trainer, vae, run.folder / "samples"),
        )
    accelerator.end_training()
    return code


if __name__ == "__main__":
    sys.exit(main())

"""Train EDT on extracted features with the masking strategy.

accelerate launch --multi_gpu --num_processes 8 train_mask_adan.py --model EDT-S/2 --feature-path features256 --epochs 81
"""

import argparse
import contextlib
import logging
import sys
from pathlib import Path

from accelerate.utils import broadcast_object_list, set_seed

from edt.checkpoint import build
from edt.cli import exit_on_user_error, make_accelerator
from edt.features import Features
from edt.fit import fit, log_to
from edt.models import EDT_models
from edt.optim import OPTIMIZERS
from edt.precision import PRECISIONS
from edt.runs import Run, locked, run_folder
from edt.train import TrainConfig, Trainer, steps_per_epoch


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--feature-path", "--features-path", default="features256", help="folder made by extract_features.py")
    p.add_argument("--model", default="EDT-S/2", metavar="NAME", help=f"one of {', '.join(EDT_models)}")
    p.add_argument("--num-classes", type=int, help="default: the features' own; 1000 where they do not say; 0: unconditional")
    p.add_argument("--image-size", type=int, help="checked against the features")
    p.add_argument("--vae", help="checked against the features")

    g = p.add_argument_group("run")
    g.add_argument("--results-dir", default="results", help="the run's folder is NNN-MODEL in it")
    g.add_argument("--run-dir", help="the run's folder; one that holds a checkpoint is continued")
    g.add_argument("--resume", "--checkpoint-path", nargs="?", const="", metavar="PATH",
                   help="demand a checkpoint to continue from: PATH, or the newest of --run-dir")  # fmt: skip
    g.add_argument("--resume-step", type=int, help="continue from this step of --run-dir")
    g.add_argument("--epochs", type=int, default=90)
    g.add_argument("--max-steps", type=int, help="stop here instead of after --epochs")
    g.add_argument("--log-every", type=int, default=100, help="steps")
    g.add_argument("--ckpt-every", type=int, default=50_000, help="steps")
    g.add_argument("--keep-last", type=int, default=3, help="checkpoints that stay")
    g.add_argument("--keep-every", type=int, default=50_000, help="checkpoints at multiples of this many steps stay too")
    g.add_argument("--num-workers", type=int, default=4)

    g = p.add_argument_group("method")
    g.add_argument("--global-batch-size", type=int, default=256)
    g.add_argument("--mini-batch-size", type=int, default=-1, help="images a process puts through at once; same update")
    g.add_argument("--init-lr", type=float, help="default: 1e-3; 5e-4 for EDT-XL")
    g.add_argument("--lr-steps", type=int, default=400_000, help="steps from --init-lr down to 5e-5")
    g.add_argument("--optimizer", choices=OPTIMIZERS, default="adan",
                   help="; ".join(f"{name}: {what}" for name, what in OPTIMIZERS.items()))  # fmt: skip
    g.add_argument("--ema-decay", type=float, default=0.9999)
    g.add_argument("--masking", choices=["edt", "none"], default="edt", help="none: the paper's starred models")
    g.add_argument("--noise", choices=["independent", "shared"], default="independent",
                   help="for the two passes of a step: independent as in the release, shared as in the paper's Eq. 3")  # fmt: skip
    g.add_argument("--schedule-sampler", "--schedule_sampler", choices=["uniform", "loss-second-moment"],
                   default="loss-second-moment")  # fmt: skip
    g.add_argument("--precision", choices=PRECISIONS, default="tf32")
    g.add_argument("--global-seed", type=int, default=42)
    return p


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    config = TrainConfig(
        seed=args.global_seed,
        global_batch_size=args.global_batch_size,
        init_lr=args.init_lr or (5e-4 if args.model.startswith("EDT-XL") else 1e-3),
        lr_steps=args.lr_steps,
        optimizer=args.optimizer,
        ema_decay=args.ema_decay,
        masking=args.masking,
        noise=args.noise,
        schedule_sampler=args.schedule_sampler,
        precision=args.precision,
    )
    features = Features(args.feature_path)
    features.check(image_size=args.image_size, vae=args.vae, num_classes=args.num_classes)
    epoch_steps = steps_per_epoch(len(features), config.global_batch_size)
    channels, side, _ = features.latent_shape
    accelerator = make_accelerator(bf16=args.precision == "bf16")
    set_seed(args.global_seed)  # the initial weights
    model = build(args.model, input_size=side, in_channels=channels, num_classes=features.num_classes)
    trainer = Trainer(model, config, accelerator, args.mini_batch_size if args.mini_batch_size > 0 else None)

    folder = broadcast_object_list([run_folder(args.run_dir, args.results_dir, args.model, args.resume)])[0]
    notes = {"name": args.model, "features": features.notes()}
    run = Run(Path(folder), notes, args.keep_last, args.keep_every)
    with locked(run.folder) if accelerator.is_main_process else contextlib.nullcontext():
        accelerator.wait_for_everyone()
        log_to(run.folder / "log.txt", accelerator.is_main_process)
        checkpoint = run.find(args.resume, args.resume_step)
        if checkpoint is None:
            logging.info("training %s in %s", args.model, run.folder)
        else:
            run.load(trainer, checkpoint)
            logging.info("resumed %s at step %d, epoch %.2f", checkpoint, trainer.step, trainer.step / epoch_steps)
        code = fit(
            trainer, features, run, max_steps=args.max_steps or args.epochs * epoch_steps, log_every=args.log_every,
            ckpt_every=args.ckpt_every, num_workers=args.num_workers,
        )  # fmt: skip
    accelerator.end_training()
    return code


if __name__ == "__main__":
    sys.exit(main())

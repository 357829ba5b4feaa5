"""A training step against the released arithmetic, in one run.

    # EDT-S/2, batch 8 on a CPU, 256 on a GPU
    python benchmarks/bench_step.py --json
    # a machine without bfloat16
    python benchmarks/bench_step.py --precision fp32 --json

A step draws the step inputs, runs both passes, and updates weights and EMA. Latents are random; the
time does not depend on them. bench_loader.py measures data loading.
"""

import argparse
import copy
import functools
import sys

import measure
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from reference import ReferenceStep

from edt.data.features import Batch
from edt.models import EDT
from edt.nn.compilation import COMPILE_MODES, CompileMode
from edt.nn.flops import forward_flops, peak_flops_per_sec
from edt.nn.precision import PRECISIONS, set_matmul_precision
from edt.registry import MODELS, create_model
from edt.training.config import PASS_NOISES, PassNoise, TrainConfig
from edt.training.trainer import Trainer

# Largest allowed relative error of the losses. The limit for gradients is five times larger.
MAX_ERRORS = {"fp32": 1e-5, "tf32": 2e-2, "bf16": 2e-2}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add("--model", default="EDT-S/2", choices=MODELS)
    add("--batch-size", type=int, help="default: 8 on a CPU, 256 on a GPU")
    add("--precision", choices=PRECISIONS, default="bf16", help="of the fast rows")
    add("--compile", nargs="*", choices=COMPILE_MODES, default=["off"], help="a row for each")
    add("--steps", type=int, default=10)
    add("--profile", action="store_true", help="where the time of the last row goes, by operation")
    measure.add_arguments(p)
    return p


def make_model(name: str) -> EDT:
    """A network whose zero-initialised parameters are drawn at random instead.

    With the zeros, most of the network would not affect the output, and errors would not show.
    """
    torch.manual_seed(0)
    model = create_model(name)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def make_trainer(args: argparse.Namespace, noise: PassNoise, compile: CompileMode) -> Trainer:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=args.device == "cpu")
    config = TrainConfig(global_batch_size=args.batch_size, noise=noise, precision=args.precision)
    return Trainer(make_model(args.model), config, accelerator, compile=compile)


def step_errors(trainer: Trainer, name: str, batch: Batch) -> dict[str, float]:
    """Relative errors of the losses and gradients of a fast step.

    They are compared with two passes of the released arithmetic in fp32 with the same inputs.
    """
    # A fresh model from the same seed: the trainer's may be compiled, and so would its copy.
    reference = ReferenceStep(make_model(name).to(batch.stored.device), None)
    inputs = trainer.draw_inputs()
    set_matmul_precision("fp32")
    losses = reference.backward(batch.stored, batch.labels, inputs)
    set_matmul_precision(trainer.config.precision)
    report = trainer.train_step(batch, inputs)
    gradients, expected_gradients = (
        torch.cat([p.grad.flatten() for p in model.parameters()])
        for model in (trainer.model, reference.model)
    )
    return {
        "losses": measure.relative_error(report.losses, losses),
        "gradients": measure.relative_error(gradients, expected_gradients),
    }


def run_reference(reference: ReferenceStep, batch: Batch) -> None:
    set_matmul_precision("tf32")  # as released; only a GPU has it
    reference(batch.stored, batch.labels)


def run_fast(trainer: Trainer, batch: Batch) -> None:
    set_matmul_precision(trainer.config.precision)
    trainer.train_step(batch)


def print_profile(trainer: Trainer, batch: Batch) -> None:
    with torch.profiler.profile() as profile:
        for _ in range(3):
            run_fast(trainer, batch)
        measure.wait(trainer.device)
    time = f"self_{trainer.device.type}_time_total"
    print(profile.key_averages().table(sort_by=time, row_limit=20, max_name_column_width=40))


def main() -> int | str:
    args = parser().parse_args()
    device = torch.device(args.device)
    args.batch_size = args.batch_size or (256 if device.type == "cuda" else 8)
    x = torch.randn(args.batch_size, 4, 32, 32, device=device)
    batch = Batch(x, torch.randint(1000, (args.batch_size,), device=device))

    model = make_model(args.model).to(device)
    reference = ReferenceStep(model, copy.deepcopy(model))
    rows = {"reference": functools.partial(run_reference, reference, batch)}
    errors = {}
    for compile in args.compile:
        for noise in PASS_NOISES:
            trainer = make_trainer(args, noise, compile)
            name = noise if compile == "off" else f"{noise}, compile {compile}"
            for quantity, error in step_errors(trainer, args.model, batch).items():
                errors[f"{name}: {quantity}"] = error
            rows[f"{args.precision}, {name}"] = functools.partial(run_fast, trainer, batch)

    timings = measure.in_turn(rows, args.steps, device)
    flops = 6 * forward_flops(trainer.model) * args.batch_size
    peak = peak_flops_per_sec(device, args.precision)
    for row in timings.values():
        row["images_per_sec"] = args.batch_size / row["median_sec"]
        row["model_tflops_per_sec"] = flops / row["median_sec"] / 1e12
        row["model_flops_utilization"] = peak and flops / row["median_sec"] / peak
    if args.profile:
        print_profile(trainer, batch)
    name = f"step-{measure.kind(device)}-{args.model.split('/')[0]}-{args.precision}"
    measure.finish(name, args, device, timings, errors)
    limit = MAX_ERRORS[args.precision]
    wrong = [
        name
        for name, error in errors.items()
        if not error <= limit * (5 if "gradients" in name else 1)
    ]
    return f"error: {', '.join(wrong)} differ from the reference's" if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""A training step - both passes, optimizer, EMA, the step's draws - against the released
arithmetic, in one run.

    python benchmarks/bench_step.py --json                    # EDT-S/2, batch 8 on a CPU, 256 on a
    GPU python benchmarks/bench_step.py --precision fp32 --json   # a machine without bfloat16

Latents are random; the time does not depend on them. Data loading is measured by bench_loader.py.
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

from edt.models import EDT, EDT_models
from edt.nn.compilation import COMPILE
from edt.nn.flops import forward_flops, peak_flops
from edt.nn.precision import PRECISIONS, allow_tf32
from edt.training.trainer import TrainConfig, Trainer

GATES = {
    "fp32": 1e-5,
    "tf32": 2e-2,
    "bf16": 2e-2,
}  # relative error of losses; gradients get five times as much


def make_model(name: str) -> EDT:
    """With every weight drawn: the initial zeros would hide most of the network."""
    torch.manual_seed(0)
    model = EDT_models[name]()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def make_trainer(args: argparse.Namespace, noise: str, compile: str) -> Trainer:
    AcceleratorState._reset_state(reset_partial_state=True)
    bf16 = "bf16" if args.precision == "bf16" else "no"
    accelerator = Accelerator(cpu=args.device == "cpu", mixed_precision=bf16)
    config = TrainConfig(global_batch_size=args.batch_size, noise=noise, precision=args.precision)
    return Trainer(make_model(args.model), config, accelerator, compile=compile)


def gates(trainer: Trainer, name: str, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """Losses and gradients of a fast step against two passes of the released arithmetic in fp32
    with the same draws.
    """
    # Made anew, from the same seed: the trainer's own model runs under autocast by now, and so
    # would its copy.
    reference, draws = ReferenceStep(make_model(name).to(x.device), None), trainer.draw()
    allow_tf32("fp32")
    losses = reference.backward(x, y, draws)
    allow_tf32(trainer.config.precision)
    report = trainer.update(x, y, draws)
    both = [
        torch.cat([p.grad.flatten() for p in model.parameters()])
        for model in (trainer.model, reference.model)
    ]
    return {
        "losses": measure.relative_error(report.losses, losses),
        "gradients": measure.relative_error(*both),
    }


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", default="EDT-S/2", choices=EDT_models)
    p.add_argument("--batch-size", type=int, help="default: 8 on a CPU, 256 on a GPU")
    p.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of the fast rows")
    p.add_argument("--compile", nargs="*", choices=COMPILE, default=["off"], help="a row for each")
    p.add_argument("--steps", type=int, default=10)
    p.add_argument(
        "--profile", action="store_true", help="where the time of the last row goes, by operation"
    )
    measure.add_arguments(p)
    args = p.parse_args()
    device = torch.device(args.device)
    args.batch_size = args.batch_size or (256 if device.type == "cuda" else 8)
    x = torch.randn(args.batch_size, 4, 32, 32, device=device)
    y = torch.randint(1000, (args.batch_size,), device=device)

    def run_reference() -> None:
        allow_tf32("tf32")  # as released; only a GPU has it
        reference(x, y)

    def run_fast(trainer: Trainer) -> None:
        allow_tf32(args.precision)
        trainer.update(x, y, trainer.draw())

    base = make_model(args.model).to(device)
    reference = ReferenceStep(base, copy.deepcopy(base))
    rows, errors = {"reference": run_reference}, {}
    for compile in args.compile:
        for noise in ("independent", "shared"):
            trainer = make_trainer(args, noise, compile)
            suffix = "" if compile == "off" else f", compile {compile}"
            errors |= {
                f"{noise}{suffix}: {what}": value
                for what, value in gates(trainer, args.model, x, y).items()
            }
            rows[f"{args.precision}, {noise}{suffix}"] = functools.partial(run_fast, trainer)
    result = measure.in_turn(rows, args.steps, device)
    flops, peak = (
        6 * forward_flops(trainer.model.config) * args.batch_size,
        peak_flops(device, args.precision),
    )
    for row in result.values():
        row["images_per_sec"] = args.batch_size / row["median_sec"]
        row["model_tflops_per_sec"] = flops / row["median_sec"] / 1e12
        row["model_flops_utilization"] = peak and flops / row["median_sec"] / peak
    if args.profile:
        with torch.profiler.profile() as profile:
            for _ in range(3):
                run_fast(trainer)
            measure.wait(device)
        spent = f"self_{device.type}_time_total"
        print(profile.key_averages().table(sort_by=spent, row_limit=20, max_name_column_width=40))
    kind = "gpu" if device.type == "cuda" else "cpu"
    measure.finish(
        f"step-{kind}-{args.model.split('/')[0]}-{args.precision}", args, device, result, errors
    )
    limit = GATES[args.precision]
    wrong = [
        name
        for name, error in errors.items()
        if not error <= limit * (5 if "gradients" in name else 1)
    ]
    return f"error: {', '.join(wrong)} differ from the reference's" if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""What the command-line scripts share."""

import argparse
import contextlib
import dataclasses
import errno
import functools
import importlib.util
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import filter_trackers

from edt.checkpoints.folder import load_model
from edt.data.vae import LatentVAE, PixelVAE, load_vae
from edt.models import EDT, EDT_models
from edt.nn.attention import PATHS
from edt.nn.compilation import COMPILE, compile_network
from edt.nn.precision import PRECISIONS, round_weights
from edt.sampling.generate import CFG_CHANNELS, SOLVERS, Recipe
from edt.utils.errors import UserError


def exit_on_user_error(main: Callable) -> Callable:
    """Turn a :class:`UserError` raised by ``main``, or a full disk, into one line on stderr and
    exit code 2.
    """

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            message = str(error)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            message = f"{error.strerror} ({error.filename or 'while writing'}); what was finished is whole: make room, run again"
        with contextlib.suppress(OSError):  # the console's output may go to the full disk
            print(f"error: {message}", file=sys.stderr, flush=True)
        raise SystemExit(2)

    return run


def true_or_false(text: str) -> bool:
    """Argument type for ``--flag True|False``, any case."""
    try:
        return {"true": True, "false": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}") from None


def number(
    kind: type = int, least: float = -math.inf, above: float = -math.inf, most: float = math.inf
) -> Callable:
    """Argument type: a finite number in a range."""
    bounds = {"at least": least, "above": above, "at most": most}

    def read(text: str) -> int | float:
        value = kind(text)  # argparse says what a ValueError means
        if not (least <= value <= most and value > above and abs(value) < math.inf):
            wanted = [f"{name} {bound:g}" for name, bound in bounds.items() if math.isfinite(bound)]
            raise argparse.ArgumentTypeError(
                f"{text} is not " + " and ".join(["finite"] * (kind is float) + wanted)
            )
        return value

    read.__name__ = kind.__name__  # which argparse names
    return read


COUNT = number(least=1)


def make_accelerator(bf16: bool = False) -> Accelerator:
    """The process's device and its place among the others: under ``python``, ``torchrun`` or
    ``accelerate launch``, on GPUs if there are any, else on the CPU with gloo."""
    # Every process makes the same position tables: none need be sent.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    precision = "bf16" if bf16 else "no"
    return Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision=precision, kwargs_handlers=[ddp]
    )


def from_arguments(config: type, args: argparse.Namespace):
    """A dataclass from the arguments of the same names."""
    return config(
        **{
            field.name: getattr(args, field.name)
            for field in dataclasses.fields(config)
            if hasattr(args, field.name)
        }
    )


def check_tracker(name: str | None) -> None:
    """Raises a UserError if the package of a tracker is missing."""
    if name is not None and importlib.util.find_spec(name) is None:
        raise UserError(f"--tracker {name} needs the package: pip install {name}")


def start_tracker(accelerator: Accelerator, name: str, folder: Path, config: dict) -> None:
    """Log to TensorBoard or Weights & Biases too, through accelerate."""
    accelerator.project_configuration.set_directories(str(folder))
    accelerator.log_with = filter_trackers([name], str(folder))
    plain = {
        key: value if isinstance(value, int | float | str | bool) else str(value)
        for key, value in config.items()
    }
    accelerator.init_trackers("edt", plain)


class Place(NamedTuple):
    """Where this process stands among those started by torchrun or accelerate launch."""

    rank: int
    world_size: int
    device: torch.device


def find_place() -> Place:
    """For work that needs no exchange between processes: no process group, so nothing to wait for
    or to time out.
    """
    rank, world_size, local_rank = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    return Place(
        rank,
        world_size,
        torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu"),
    )


def add_speed_arguments(p: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """What training and sampling take: the same results, to rounding, at another speed."""
    p.add_argument("--precision", choices=PRECISIONS, default="tf32")
    p.add_argument(
        "--compile",
        choices=COMPILE,
        default="off",
        help="; ".join(f"{k}: {what}" for k, what in COMPILE.items()),
    )
    p.add_argument(
        "--attention",
        choices=PATHS,
        default="auto",
        help="; ".join(f"{k}: {what}" for k, what in PATHS.items()),
    )


def check_speed(args: argparse.Namespace, device: torch.device) -> None:
    """Raises a UserError if what :func:`add_speed_arguments` took cannot run on the device."""
    if args.attention == "triton" and device.type != "cuda":
        raise UserError(
            f"--attention triton needs a GPU, and this is the {device.type}; leave it to auto"
        )
    if (
        args.precision == "bf16"
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) < (8, 0)
    ):
        name = torch.cuda.get_device_name(device)
        raise UserError(
            f"--precision bf16 needs compute capability 8.0, which {name} does not have; use fp32"
        )
    compilers = (os.environ.get("CXX", "g++"), "clang++")
    if args.compile != "off" and device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise UserError(
            f"--compile {args.compile} needs a C++ compiler on a CPU; install g++, or leave it off"
        )


def add_sampling_arguments(
    p: argparse.ArgumentParser,
    *,
    cfg_scale: float,
    amm: Callable = true_or_false,
    amm_values: str = "True|False",
) -> None:
    """What both image generators take. ``amm`` reads the value of --amm."""
    p.add_argument(
        "--ckpt",
        required=True,
        help="checkpoint folder, run folder, .safetensors, or a .pt of the release",
    )
    p.add_argument(
        "--weights", choices=["ema", "model"], default="ema", help="which weights of the checkpoint"
    )
    p.add_argument(
        "--model",
        metavar="NAME",
        help=f"what the checkpoint must be; one of {', '.join(EDT_models)}",
    )
    p.add_argument("--image-size", type=int, help="pixels; default: the checkpoint's")
    p.add_argument("--num-classes", type=int, help="default: the checkpoint's")
    p.add_argument(
        "--vae",
        help="ema, mse, a folder, a hub id, or pixels; default: what the checkpoint was trained on, else ema",
    )
    p.add_argument("--cfg-scale", type=float, default=cfg_scale, help="1: no guidance")
    p.add_argument(
        "--cfg-channels",
        choices=CFG_CHANNELS,
        default="3",
        help="noise channels guided: the release's 3 of 4, or all",
    )
    p.add_argument(
        "--cfg-interval",
        type=int,
        nargs=2,
        metavar=("LO", "HI"),
        help="guide at timesteps LO to HI only, of the 1000-step process: 0 is clean, 999 noise",
    )
    p.add_argument(
        "--num-sampling-steps",
        default="250",
        help="250; with ddpm and ddim also ddim50, or sections like 10,15,25",
    )
    p.add_argument(
        "--solver",
        choices=SOLVERS,
        default="ddpm",
        help="ddpm: the release's; dpm++ and unipc for few steps",
    )
    add_speed_arguments(p)
    g = p.add_argument_group("Attention Modulation Matrix")
    g.add_argument("--amm", nargs="?", const=True, type=amm, metavar=amm_values)
    g.add_argument(
        "--no-amm", dest="amm", action="store_false", help="off, whatever the options below say"
    )
    g.add_argument(
        "--amm-blocks",
        help="0-based, e.g. 7,10; default: placed by model, resolution and guidance scale",
    )
    g.add_argument("--amm-form", choices=["256", "512"], help="default: by resolution")
    g.add_argument("--amm-radius", type=float, help="tokens; default: the paper's sqrt((N-1)^2+4)")


def make_recipe(args: argparse.Namespace, seed: int, labels: str = "uniform") -> Recipe:
    """The recipe that the arguments above ask for.

    Raises:
        UserError: they cannot be combined.
    """
    if not args.num_sampling_steps:
        raise UserError("--num-sampling-steps is empty; give a number, like 250")
    interval = tuple(args.cfg_interval) if args.cfg_interval else None
    return Recipe(
        seed,
        args.num_sampling_steps,
        args.solver,
        args.cfg_scale,
        args.precision,
        labels,
        args.cfg_channels,
        interval,
    )


def load_for_sampling(
    args: argparse.Namespace, device: torch.device
) -> tuple[EDT, PixelVAE | LatentVAE, dict]:
    """Model, VAE and the checkpoint's notes for the arguments above."""
    check_speed(args, device)
    model, notes = load_model(
        args.ckpt, args.model, which=args.weights, num_classes=args.num_classes
    )
    trained_on = notes.get("features", {})
    vae_name = args.vae or trained_on.get("vae", "ema")
    vae = load_vae(vae_name, device, torch.bfloat16 if args.precision == "bf16" else torch.float32)
    image_size = model.config.input_size * vae.downsampling
    if args.image_size not in (None, image_size):
        raise UserError(
            f"{args.ckpt} makes images of {image_size} pixels, not {args.image_size}; leave --image-size out"
        )
    if vae.channels != model.in_channels:
        raise UserError(
            f"the VAE {vae_name} has {vae.channels} latent channels, the model {model.in_channels}; give its --vae"
        )
    notes = {**notes, "features": {**trained_on, "vae": vae_name, "image_size": image_size}}
    model.set_attention(args.attention)
    if args.precision == "bf16":
        round_weights(model)
    compile_network(model, args.compile)
    return model.to(device), vae, notes


def apply_amm(model: EDT, args: argparse.Namespace, on: bool) -> tuple[int, ...]:
    """Set AMM as the arguments say, or off; returns the modulated blocks."""
    if not on:
        return model.set_amm(None)
    try:
        blocks = [int(part) for part in args.amm_blocks.split(",")] if args.amm_blocks else "auto"
    except ValueError:
        raise UserError(
            f"cannot read --amm-blocks {args.amm_blocks!r}; give block numbers like 7,10"
        ) from None
    return model.set_amm(
        blocks, form=args.amm_form, radius=args.amm_radius, cfg_scale=args.cfg_scale
    )

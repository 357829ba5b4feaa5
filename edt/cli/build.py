"""From arguments to models: code that the image generators and the trainer share."""

import argparse
import logging
import os
import shutil
from typing import Any, NamedTuple

import torch

from edt.checkpoints.loading import CheckpointInfo, load_model
from edt.data.vae import VAE, load_vae
from edt.nn.compilation import compile_network
from edt.nn.precision import round_weights
from edt.nn.transformer import DiffusionTransformer
from edt.sampling.config import SamplingConfig
from edt.sampling.sidecar import sample_settings
from edt.utils.distributed import get_distributed_env, ignored_launcher_settings
from edt.utils.errors import UserError

logger = logging.getLogger(__name__)
BF16_CAPABILITY = (8, 0)  # compute capability; GPUs below it emulate bfloat16 slowly


class LoadedModel(NamedTuple):
    """A model that is ready to sample, its VAE, and a record of the checkpoint."""

    model: DiffusionTransformer
    vae: VAE
    vae_name: str
    image_size: int  # pixels per side
    info: CheckpointInfo


def check_speed_options(args: argparse.Namespace, device: torch.device) -> None:
    """Refuse speed options that the device cannot run.

    Args:
        args: has what ``add_speed_arguments`` added.
        device: where the network will run.

    Raises:
        UserError: the message names the option.
    """
    if args.attention == "triton" and device.type != "cuda":
        raise UserError(
            f"--attention triton needs a GPU, and the device is a {device.type}; use auto"
        )
    if args.precision == "bf16" and device.type == "cuda":
        if torch.cuda.get_device_capability(device) < BF16_CAPABILITY:
            name = torch.cuda.get_device_name(device)
            raise UserError(
                f"--precision bf16 needs compute capability 8.0, which {name} does not have; "
                "use fp32"
            )
    if args.compile != "off" and device.type == "cpu":
        compilers = (os.environ.get("CXX", "g++"), "clang++")
        if not any(map(shutil.which, compilers)):
            raise UserError(
                f"--compile {args.compile} needs a C++ compiler on a CPU; install g++, or use off"
            )


def load_for_sampling(args: argparse.Namespace, device: torch.device) -> LoadedModel:
    """Load model and VAE for what ``add_sampling_arguments`` added.

    Args:
        args: the parsed arguments.
        device: where the network will run.

    Raises:
        UserError: the checkpoint or the VAE cannot be loaded, or they do not fit.
    """
    check_speed_options(args, device)
    if get_distributed_env().rank == 0:
        for sentence in ignored_launcher_settings(vars(args)):
            logger.warning(sentence)
    model, info = load_model(
        args.ckpt, args.model, weights=args.weights, num_classes=args.num_classes
    )
    vae_name = args.vae or info.features.vae or "ema"
    vae = load_vae(vae_name, device, torch.bfloat16 if args.precision == "bf16" else torch.float32)
    image_size = model.config.input_size * vae.downsampling
    if args.image_size not in (None, image_size):
        raise UserError(
            f"{args.ckpt} makes images of {image_size} pixels, not {args.image_size}; "
            "leave --image-size out"
        )
    if vae.channels != model.in_channels:
        raise UserError(
            f"the VAE {vae_name} has {vae.channels} latent channels, the model has "
            f"{model.in_channels}; give the model's own --vae"
        )
    model.set_attention(args.attention)
    if args.precision == "bf16":
        round_weights(model)
    compile_network(model, args.compile)
    return LoadedModel(model.to(device), vae, vae_name, image_size, info)


def settings_of(loaded: LoadedModel, config: SamplingConfig, weights: str) -> dict[str, Any]:
    """The settings of images, for the record; see :func:`edt.sampling.sidecar.sample_settings`.

    Args:
        loaded: the model, with AMM already switched on or off.
        config: how images are sampled.
        weights: "ema" or "model".
    """
    return sample_settings(
        config,
        loaded.model.config,
        loaded.model.modulations,
        weights,
        loaded.info.weights_sha256,
        loaded.vae_name,
        loaded.vae.sha256,
        loaded.image_size,
    )


def set_amm_from_arguments(model: DiffusionTransformer, args: argparse.Namespace) -> None:
    """Switch AMM on or off as the arguments say.

    --amm and --no-amm decide. Without them AMM is on if one of its options is given.

    Raises:
        UserError: the blocks cannot be read, or the model does not have them.
    """
    options = (args.amm_blocks, args.amm_form, args.amm_radius)
    has_options = any(option is not None for option in options)
    is_on = has_options if args.amm is None else bool(args.amm)
    if not is_on:
        model.set_amm(None)
        return
    blocks: str | list[int] = "auto"
    if args.amm_blocks:
        try:
            blocks = [int(part) for part in args.amm_blocks.split(",")]
        except ValueError:
            raise UserError(
                f"cannot read --amm-blocks {args.amm_blocks!r}; give block numbers like 7,10"
            ) from None
    model.set_amm(blocks, form=args.amm_form, radius=args.amm_radius, cfg_scale=args.cfg_scale)

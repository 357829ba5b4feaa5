"""From arguments to models: code that the image generators and the trainer share."""

import argparse
import logging
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from edt.checkpoints.loading import CheckpointInfo, load_model
from edt.data.features import FeatureInfo, Features
from edt.data.vae import VAE, load_vae, vae_source
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
    _check_vae_for_sampling(vae, vae_name, info.features, is_chosen=args.vae is not None)
    model.set_attention(args.attention)
    if args.precision == "bf16":
        round_weights(model)
    compile_network(model, args.compile)
    return LoadedModel(model.to(device), vae, vae_name, image_size, info)


def settings_of(loaded: LoadedModel, config: SamplingConfig) -> dict[str, Any]:
    """The settings of images, for the record; see :func:`edt.sampling.sidecar.sample_settings`.

    Args:
        loaded: the model, with AMM already switched on or off.
        config: how images are sampled.
    """
    return sample_settings(
        config,
        loaded.model.config,
        loaded.model.modulations,
        loaded.info.weights,
        loaded.info.weights_sha256,
        loaded.vae_name,
        loaded.vae.sha256,
        loaded.image_size,
        loaded.vae.config_sha256,
    )


# ---------------------------------------------------------------------------------------------
# The VAE of features


def _check_vae_for_sampling(vae: VAE, name: str, features: FeatureInfo, is_chosen: bool) -> None:
    """Check that a VAE decodes a model's latents, and let it scale them as the model's features.

    Args:
        vae: the VAE.
        name: its name.
        features: those that the model was trained on.
        is_chosen: whether the user chose it. Another decoder may then be meant.

    Raises:
        UserError: the features were made with other weights of that name, or were scaled
            differently.
    """
    if _may_be_of(features, name, vae):
        _scale_as(features, vae)
        return
    if not is_chosen:
        raise UserError(
            f"the weights of the VAE {name} are not those that the model's features were made "
            "with; give the right VAE as --vae, or this one to use it all the same"
        )
    scale = (features.scaling_factor, features.shift_factor or 0.0)
    if features.scaling_factor is not None and scale != (vae.scaling_factor, vae.shift_factor):
        raise UserError(
            f"the VAE {name} scales its latents by {vae.scaling_factor} and shifts them by "
            f"{vae.shift_factor}, the model's features by {scale[0]} and {scale[1]}; "
            "give the model's own --vae"
        )
    logger.warning(
        "the VAE %s is not the one that the model's features were made with, %s",
        name,
        features.vae,
    )


def load_vae_for_training(
    name: str | None, features: Features, is_needed: bool, device: torch.device
) -> VAE | None:
    """Check that --vae is the VAE of the features, and load it where it is needed.

    Args:
        name: --vae; None takes the one of the features.
        features: their manifest says how they were made.
        is_needed: whether images will be decoded; else None is returned.
        device: where the VAE computes.

    Raises:
        UserError: it cannot be loaded, or the features were made with another one.
    """
    info = features.info()
    source = name or info.vae or "ema"
    # A name of the hub stands for the same weights every time; what is in a folder may change.
    is_same_name = source == info.vae and not Path(vae_source(source)).is_dir()
    if not is_needed and (name is None or info.vae is None or is_same_name):
        return None
    if source != info.vae and info.vae is not None and "pixels" in (source, info.vae):
        raise _wrong_vae(features, name, source)  # no weights can make them the same
    vae = load_vae(source, device)
    if not _may_be_of(info, source, vae):
        raise _wrong_vae(features, name, source)
    if vae.channels != features.latent_shape[0]:
        raise UserError(
            f"the VAE {source} has {vae.channels} latent channels, the features in "
            f"{features.path} have {features.latent_shape[0]}; give their own --vae"
        )
    _scale_as(info, vae)
    return vae if is_needed else None


def _wrong_vae(features: Features, name: str | None, source: str) -> UserError:
    """The error for a VAE that is not the one of the features."""
    vae = features.info().vae
    other = f"what is now {source}" if source == vae else source
    remedy = "leave --vae out, or extract such features into a new --features-path"
    if name is None:
        remedy = "give --vae the one that made them, or leave --sample-every out"
    return UserError(f"the features in {features.path} have vae {vae}, not {other}; {remedy}")


def _may_be_of(features: FeatureInfo, name: str, vae: VAE) -> bool:
    """Whether features were made with a VAE, by its hashes, else by its name; True if unknown."""
    if features.vae is None:
        return True
    if None in (features.vae_sha256, vae.sha256):
        return features.vae == name
    configs = features.vae_config_sha256, vae.config_sha256
    is_same_config = None in configs or configs[0] == configs[1]
    return features.vae_sha256 == vae.sha256 and is_same_config


def _scale_as(features: FeatureInfo, vae: VAE) -> None:
    """Let a VAE scale its latents as the features are, if that is known.

    Features of versions that did not know shifts have none.
    """
    if features.scaling_factor is not None:
        vae.scaling_factor = features.scaling_factor
        vae.shift_factor = features.shift_factor or 0.0


# ---------------------------------------------------------------------------------------------
# AMM


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

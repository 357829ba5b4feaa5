"""Helpers of the tests of extraction and features."""

from pathlib import Path

import numpy as np
import torch

import extract_features
from edt.data.features import Features, open_features


def arguments(images: Path, folder: Path, *more: object, vae: object = "pixels") -> list[str]:
    """The command line of an extraction in this process, of 16 or, with a VAE, 64 pixels."""
    size = 16 if vae == "pixels" else 64
    command = ("--data-path", images, "--features-path", folder, "--vae", vae)
    return [str(part) for part in (*command, "--image-size", size, "--num-workers", 0, *more)]


def extract(images: Path, folder: Path, *more: object, vae: object = "pixels") -> None:
    assert extract_features.main(arguments(images, folder, *more, vae=vae)) == 0


def read_all(folder: Path, flip: int = 0) -> tuple[Features, torch.Tensor, torch.Tensor]:
    """The open features, the stored values of every image in one orientation, and the labels."""
    features = open_features(folder)
    batch = features[np.arange(len(features)), np.full(len(features), flip)]
    return features, batch.stored, batch.labels


def save_tiny_vae(folder: Path) -> None:
    """Save a VAE of the SD-VAE's form, with few channels: eight pixels to one."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    ).save_pretrained(folder)

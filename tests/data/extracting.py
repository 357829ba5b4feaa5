"""Helpers of the tests of extraction and features."""

from pathlib import Path

import numpy as np
import torch
from conftest import save_tiny_vae as save_tiny_vae  # where tests of other folders find it

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

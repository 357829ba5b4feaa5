"""Choosing a feature extractor by name."""

from pathlib import Path

import torch

from edt.metrics.features import FeatureExtractor, PixelFeatures
from edt.metrics.inception import InceptionFeatures
from edt.metrics.inception_tensorflow import TensorFlowInceptionFeatures
from edt.metrics.inception_weights import find_weights, load_weights
from edt.utils.errors import UserError

FEATURES = ("inception", "pixels")
BACKENDS = ("torch", "tensorflow")


def create_extractor(
    features: str = "inception",
    backend: str = "torch",
    inception: Path | None = None,
    device: str = "cpu",
) -> FeatureExtractor:
    """A feature extractor ready to run.

    Args:
        features: ``inception``, or ``pixels`` for the images themselves.
        backend: ``torch``, or ``tensorflow`` to run the Inception graph itself.
        inception: the Inception weights; without it the places that :func:`find_weights` knows.
        device: torch device.
    """
    where = _open_device(device)
    if features == "pixels":
        return PixelFeatures(where)
    path = find_weights(inception)
    if backend == "tensorflow":
        return TensorFlowInceptionFeatures(path, where)
    return InceptionFeatures(load_weights(path), where)


def _open_device(name: str) -> torch.device:
    """The torch device of that name, known to work."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:100]
        raise UserError(f"--device {name} cannot be used ({reason}); take cpu") from None

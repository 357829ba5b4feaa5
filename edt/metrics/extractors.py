"""Creates a feature extractor by its name."""

from pathlib import Path

import torch

from edt.metrics.features import Backend, FeatureExtractor, FeatureName, PixelFeatures
from edt.metrics.inception import InceptionFeatures
from edt.metrics.inception_tensorflow import TensorFlowInceptionFeatures
from edt.metrics.inception_weights import find_weights, load_weights
from edt.utils.choices import check_choice
from edt.utils.errors import UserError


def create_extractor(
    features: FeatureName = "inception",
    backend: Backend = "torch",
    inception: Path | None = None,
    device: str = "cpu",
) -> FeatureExtractor:
    """Create a feature extractor with its weights loaded.

    Args:
        features: ``inception``, or ``pixels`` for the images themselves.
        backend: ``torch``, or ``tensorflow`` to run the original Inception graph. Pixels do not use
            it.
        inception: the Inception weights. Default: the first place of :func:`find_weights` that has
            them.
        device: torch device that computes and compares the features.

    Raises:
        UserError: an argument is unknown, the device does not work, or there are no valid weights.
    """
    check_choice("features", features, FeatureName)
    check_choice("backend", backend, Backend)
    torch_device = _working_device(device)
    if features == "pixels":
        return PixelFeatures(torch_device)
    path = find_weights(inception)
    if backend == "tensorflow":
        return TensorFlowInceptionFeatures(path, torch_device)
    return InceptionFeatures(load_weights(path), torch_device)


def _working_device(name: str) -> torch.device:
    """The torch device of that name; a :class:`UserError` if it does not work."""
    try:
        # Only an allocation shows whether the device works. torch.device("cuda") succeeds without
        # a GPU.
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:100]
        raise UserError(f"--device {name} cannot be used ({reason}); use cpu") from None

"""What turns images into the vectors that are compared."""

from typing import Protocol

import numpy as np
import torch

from edt.metrics.precision_recall import Mode
from edt.utils.errors import UserError


class FeatureExtractor(Protocol):
    """Maps images to feature vectors.

    Attributes:
        name: ``inception`` or ``pixels``; statistics of different names are never compared.
        backend: the library that computes the features.
        weights_sha256: hash of the network's weights, None without a network.
        device: where torch computes on the features.
        default_pr: arithmetic of precision and recall.
    """

    name: str
    backend: str
    weights_sha256: str | None
    device: torch.device
    default_pr: Mode

    def check(self, resolution: tuple[int, int]) -> None:
        """Raise a :class:`UserError` for images of a (height, width) that cannot be handled."""

    def extract(self, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features (n, D) and spatial features (n, S), if there are any, of uint8 images (n, H, W,
        3); float32.
        """

    def probabilities(self, features: np.ndarray) -> torch.Tensor | None:
        """Class probabilities (n, classes) for features (n, D); None without a classifier."""


class PixelFeatures:
    """The flattened pixels themselves, in [0, 1]: meaningful for tiny images only, and needs no
    network.
    """

    name, backend, weights_sha256 = "pixels", "torch", None
    default_pr: Mode = "exact"  # half precision would round away the distances between near images
    MAX_DIM = 64 * 64 * 3  # two covariances of this size take 2.4 GB

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)

    def check(self, resolution: tuple[int, int]) -> None:
        height, width = resolution
        if height * width * 3 > self.MAX_DIM:
            raise UserError(
                f"pixel features end at 64x64 pixels, not {width}x{height}; take --features inception"
            )

    def extract(self, images: np.ndarray) -> tuple[torch.Tensor, None]:
        return torch.tensor(images, device=self.device).flatten(1) / 255, None

    def probabilities(self, features: np.ndarray) -> None:
        return None

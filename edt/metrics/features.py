"""Feature extractors: they turn images into the vectors that are compared."""

from typing import Literal, Protocol

import numpy as np
import torch

from edt.metrics.precision_recall import PrecisionRecallMode
from edt.utils.errors import UserError

FeatureName = Literal["inception", "pixels"]  # what the vectors are
Backend = Literal["torch", "tensorflow"]  # library that runs the Inception network


class FeatureExtractor(Protocol):
    """Maps images to feature vectors.

    Attributes:
        name: what the vectors are. Statistics with different names are never compared.
        backend: the library that computes the features.
        weights_sha256: hash of the network's weights, None without a network.
        device: torch device on which the features are compared.
        default_pr: default arithmetic of precision and recall.
    """

    name: FeatureName
    backend: Backend
    weights_sha256: str | None
    device: torch.device
    default_pr: PrecisionRecallMode

    def check(self, resolution: tuple[int, int]) -> None:
        """Check that images of this (height, width) in pixels can be handled.

        Raises:
            UserError: they cannot.
        """

    def extract(self, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the features of uint8 images (n, H, W, 3).

        Returns:
            Features (n, D) and spatial features (n, S), float32. The spatial features are None if
            the extractor has none.
        """

    def probabilities(self, features: np.ndarray) -> torch.Tensor | None:
        """Class probabilities (n, classes) for features (n, D); None without a classifier."""


class PixelFeatures:
    """The flattened pixels in [0, 1].

    They need no network, and are meaningful for tiny images only.
    """

    name: FeatureName = "pixels"
    backend: Backend = "torch"
    weights_sha256: str | None = None
    # Half precision would round small distances between images to zero.
    default_pr: PrecisionRecallMode = "exact"
    MAX_DIM = 64 * 64 * 3  # two covariances of this size take 2.4 GB

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)

    def check(self, resolution: tuple[int, int]) -> None:
        height, width = resolution
        if height * width * 3 > self.MAX_DIM:
            raise UserError(
                f"pixel features allow at most 64x64 pixels, not {width}x{height}; "
                "use --features inception"
            )

    def extract(self, images: np.ndarray) -> tuple[torch.Tensor, None]:
        return torch.tensor(images, device=self.device).flatten(1) / 255, None

    def probabilities(self, features: np.ndarray) -> None:
        return None

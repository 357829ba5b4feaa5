"""Kernel Inception Distance."""

import numpy as np
import torch

from edt.metrics.float32 import full_float32

KERNEL_DEGREE = 3


def kernel_distance(
    reference: np.ndarray,
    samples: np.ndarray,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Kernel Inception Distance (Bińkowski et al. 2018).

    It is the unbiased squared maximum mean discrepancy with the kernel ``(x·y / D + 1)³``, averaged
    over random subsets. Its expectation does not depend on the number of images, unlike that of the
    Fréchet distance. It can fall below zero.

    Args:
        reference: (N, D) features, N at least 2.
        samples: (M, D) features, M at least 2.
        subsets: number of pairs of subsets.
        subset_size: images in a subset; at most N and M are used.
        seed: of the generator that draws the subsets.
        device: torch device that computes the distances.

    Returns:
        Mean and standard deviation over the subsets.
    """
    size = min(subset_size, len(reference), len(samples))
    if size == len(reference) == len(samples):
        subsets = 1  # a subset of this size holds all images, so every subset gives the same
    generator = np.random.default_rng(seed)
    distances = []
    with full_float32():
        for _ in range(subsets):
            reference_subset = _draw_subset(reference, size, generator, device)
            sample_subset = _draw_subset(samples, size, generator, device)
            distances.append(_unbiased_mmd(reference_subset, sample_subset))
    return float(np.mean(distances)), float(np.std(distances))


def _draw_subset(
    features: np.ndarray, size: int, generator: np.random.Generator, device: torch.device | str
) -> torch.Tensor:
    """Draw ``size`` different rows of ``features``, (size, D) float32."""
    rows = generator.choice(len(features), size, replace=False)
    return torch.as_tensor(features[rows], dtype=torch.float32, device=device)


def _unbiased_mmd(x: torch.Tensor, y: torch.Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of two (n, D) sets."""
    within_x = _mean_of_distinct_pairs(_kernel(x, x))
    within_y = _mean_of_distinct_pairs(_kernel(y, y))
    return float(within_x + within_y - 2 * _kernel(x, y).mean())


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Polynomial kernel of all pairs, (n, m) float64."""
    return (x @ y.T / x.shape[1] + 1).double() ** KERNEL_DEGREE


def _mean_of_distinct_pairs(kernel: torch.Tensor) -> torch.Tensor:
    """Mean of a kernel matrix (n, n) without its diagonal.

    The diagonal pairs an image with itself. Counting it would bias the estimate upwards.
    """
    n = len(kernel)
    return (kernel.sum() - kernel.trace()) / (n * (n - 1))

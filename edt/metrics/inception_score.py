"""Inception Score and Kernel Inception Distance."""

import numpy as np
import torch

from edt.metrics.float32 import full_float32


def inception_score_splits(
    probabilities: np.ndarray | torch.Tensor, split_size: int = 5000
) -> list[float]:
    """Inception Score of each run of ``split_size`` consecutive images, a short last one included,
    as ADM splits them.

    ``exp(mean KL(p(y|x) || p(y)))`` with p(y) the mean over the split (Salimans et al. 2016). A
    class that an image excludes (p = 0) adds nothing.

    Args:
        probabilities: (N, classes), rows sum to 1.
    """
    scores = []
    for split in torch.as_tensor(probabilities).split(split_size):
        p = split.double()
        divergence = torch.xlogy(p, p).sum(1) - torch.xlogy(p, p.mean(0)).sum(1)
        scores.append(float(divergence.mean().exp()))
    return scores


def inception_score(probabilities: np.ndarray | torch.Tensor, split_size: int = 5000) -> float:
    """Mean of :func:`inception_score_splits`: each split counts once, however short, as in ADM.

    Args:
        probabilities: (N, classes), rows sum to 1.
    """
    return float(np.mean(inception_score_splits(probabilities, split_size)))


def kernel_distance(
    reference: np.ndarray,
    samples: np.ndarray,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Kernel Inception Distance (Bińkowski et al. 2018): mean and standard deviation over random
    subsets.

    The unbiased squared maximum mean discrepancy with the kernel ``(x·y / D + 1)³``. Its
    expectation does not depend on the number of images, unlike that of the Fréchet distance, and it
    can fall below zero.

    Args:
        reference, samples: (N, D) and (M, D) features, at least 2 rows each.
    """
    size = min(subset_size, len(reference), len(samples))
    if size == len(reference) == len(samples):
        subsets = 1  # every subset would be the whole
    generator = np.random.default_rng(seed)

    def draw(features: np.ndarray) -> torch.Tensor:
        rows = generator.choice(len(features), size, replace=False)
        return torch.as_tensor(features[rows], dtype=torch.float32, device=device)

    with full_float32():
        distances = [_unbiased_mmd(draw(reference), draw(samples)) for _ in range(subsets)]
    return float(np.mean(distances)), float(np.std(distances))


def _unbiased_mmd(x: torch.Tensor, y: torch.Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of two (n, D) sets; pairs of an image with itself
    are left out.
    """

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.T / a.shape[1] + 1).double() ** 3

    def mean_of_pairs(k: torch.Tensor) -> torch.Tensor:
        n = len(k)
        return (k.sum() - k.trace()) / (n * (n - 1))

    return float(
        mean_of_pairs(kernel(x, x)) + mean_of_pairs(kernel(y, y)) - 2 * kernel(x, y).mean()
    )

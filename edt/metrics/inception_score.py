"""Inception Score."""

import numpy as np
import torch


def inception_score_splits(
    probabilities: np.ndarray | torch.Tensor, split_size: int = 5000
) -> list[float]:
    """Inception Score (Salimans et al. 2016) of each split of consecutive images.

    The score of a split is ``exp(mean KL(p(y|x) || p(y)))``, where p(y) is the mean over the split.
    The last split may be shorter; it is scored too, as in ADM.

    Args:
        probabilities: (N, classes), rows sum to 1. Zeros are allowed and add nothing.
        split_size: images in a split.
    """
    scores = []
    for split in torch.as_tensor(probabilities).split(split_size):
        p = split.double()
        divergence = torch.xlogy(p, p).sum(1) - torch.xlogy(p, p.mean(0)).sum(1)
        scores.append(float(divergence.mean().exp()))
    return scores


def inception_score(probabilities: np.ndarray | torch.Tensor, split_size: int = 5000) -> float:
    """Mean of :func:`inception_score_splits`.

    Every split has the same weight, also a shorter last one, as in ADM.

    Args:
        probabilities: (N, classes), rows sum to 1.
        split_size: images in a split.
    """
    return float(np.mean(inception_score_splits(probabilities, split_size)))

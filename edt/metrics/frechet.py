"""Streaming mean and covariance, and the Fréchet distance between two Gaussians."""

import math
from typing import NamedTuple

import numpy as np
import torch

from edt.utils.errors import UserError


class Moments(NamedTuple):
    """Mean and covariance of D-dimensional features, float64."""

    mean: np.ndarray  # (D,)
    covariance: np.ndarray  # (D, D), unbiased


class StreamingMoments:
    """Mean and covariance of rows that arrive in batches, in float64.

    The memory does not grow with the number of rows. Batches are merged as in Chan, Golub and
    LeVeque (1983), so a large mean costs no precision.

    Args:
        dim: length of a row.
        device: torch device that holds the sums.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64, device=device)
        # Sum over the rows of the outer product of their deviation from the mean with itself.
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, rows: torch.Tensor | np.ndarray) -> None:
        """Add a batch of rows (n, D) of any float type."""
        rows = torch.as_tensor(rows).to(self._mean)
        n = len(rows)
        batch_mean = rows.mean(0)
        shift = batch_mean - self._mean
        # Merging also adds the outer product of the shift with itself. With the scaled shift as one
        # more row, a single matrix product adds both terms.
        between = shift * math.sqrt(self.count * n / (self.count + n))
        deviations = torch.cat([rows - batch_mean, between[None]])
        self._scatter.addmm_(deviations.T, deviations)
        self._mean += shift * (n / (self.count + n))
        self.count += n

    def moments(self) -> Moments:
        """The moments of all rows so far.

        Raises:
            UserError: there are fewer than two rows.
        """
        if self.count < 2:
            raise UserError(
                f"a covariance needs at least 2 images, {self.count} given; give more images"
            )
        return Moments(self._mean.cpu().numpy(), (self._scatter / (self.count - 1)).cpu().numpy())


def frechet_distance(
    mean1: np.ndarray, covariance1: np.ndarray, mean2: np.ndarray, covariance2: np.ndarray
) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (Heusel et al. 2017, equation 6).

    On Inception features it is the FID. It equals ``|m1 - m2|² + tr C1 + tr C2 - 2 tr (C1 C2)^½``.
    The last trace is the sum of the square roots of the eigenvalues of the symmetric matrix
    ``C1^½ C2 C1^½``. Covariances may be singular.

    The function checks its arguments, the eigenvalues and the result, which makes it longer than
    the formula. A wrong FID looks like a right one: broken builds of linear-algebra libraries have
    printed plausible numbers.

    Args:
        mean1: (D,).
        covariance1: (D, D), symmetric and positive semi-definite.
        mean2: (D,).
        covariance2: (D, D), symmetric and positive semi-definite.

    Raises:
        UserError: the arguments are not finite moments of one dimension, or the eigenvalues are
            wrong.
    """
    m1, c1 = _checked_moments(mean1, covariance1)
    m2, c2 = _checked_moments(mean2, covariance2)
    if m1.shape != m2.shape:
        raise UserError(
            f"statistics of {len(m1)} and {len(m2)} dimensions cannot be compared; "
            "use the same features"
        )

    variances, axes = torch.linalg.eigh(c1)
    # In the eigenbasis of C1 its square root is diagonal, so it scales rows and columns of the
    # rotated C2. Entries of directions with a small variance stay small, hence accurate.
    scale = _nonnegative(variances).sqrt()
    product = scale[:, None] * (axes.T @ c2 @ axes) * scale
    product = (product + product.T) / 2
    eigenvalues = torch.linalg.eigvalsh(product)
    _check_eigenvalues(eigenvalues, c1, c2, product)

    traces = c1.trace() + c2.trace()
    distance = (m1 - m2).square().sum() + traces - 2 * _nonnegative(eigenvalues).sqrt().sum()
    if distance < -1e-6 * traces:  # a rounding error is smaller
        raise UserError(
            f"the Fréchet distance is negative ({distance:.6g}); "
            "the statistics are damaged, compute them again"
        )
    return max(float(distance), 0.0)


def _checked_moments(mean: np.ndarray, covariance: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert moments to float64 tensors (D,) and (D, D), finite and symmetric."""
    m = torch.as_tensor(mean, dtype=torch.float64, device="cpu").reshape(-1)
    c = torch.as_tensor(covariance, dtype=torch.float64, device="cpu")
    c = c.reshape(1, 1) if c.ndim == 0 else c  # np.cov of one-dimensional features is a scalar
    if c.shape != (len(m), len(m)):
        raise UserError(
            f"the mean has shape {tuple(m.shape)} and the covariance {tuple(c.shape)}; "
            "compute the statistics again"
        )
    if not (m.isfinite().all() and c.isfinite().all()):
        raise UserError(
            "the statistics contain NaN or infinity; compute them again from finite features"
        )
    if (c - c.T).abs().max() > 1e-6 * c.abs().max():
        raise UserError(
            "the covariance is not symmetric; the statistics are damaged, compute them again"
        )
    return m, (c + c.T) / 2


def _nonnegative(eigenvalues: torch.Tensor) -> torch.Tensor:
    """Set the rounding errors below zero to zero.

    Args:
        eigenvalues: those of a positive semi-definite matrix, ascending.
    """
    if eigenvalues[0] < -1e-6 * eigenvalues.abs().max():
        raise UserError(
            "a covariance has negative eigenvalues; the statistics are damaged, compute them again"
        )
    return eigenvalues.clamp(min=0)


def _check_eigenvalues(
    eigenvalues: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, product: torch.Tensor
) -> None:
    """Compare the sums of the eigenvalues and of their squares with traces.

    The traces follow from the matrices without an eigenvalue solver, so a broken solver cannot
    agree with them by accident. Such solvers have printed plausible, wrong FIDs.
    """
    expected = torch.stack([(c1 * c2).sum(), product.square().sum()])
    sums = torch.stack([eigenvalues.sum(), eigenvalues.square().sum()])
    if not torch.allclose(sums, expected, rtol=1e-6, atol=1e-12 * float(c1.trace() * c2.trace())):
        raise UserError(
            f"the eigenvalues fail their check (power sums {sums.tolist()}, "
            f"expected {expected.tolist()}); "
            "the linear-algebra library is faulty, install another build of torch"
        )

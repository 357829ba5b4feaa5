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


class FactoredMoments(NamedTuple):
    """Moments of N rows, fewer than their D dimensions, without a (D, D) matrix.

    Images of 64 x 64 pixels have 12,288 dimensions: a (D, D) matrix of theirs takes 1.2 GB, and
    its eigenvalues take hours.
    """

    mean: np.ndarray  # (D,)
    factor: np.ndarray  # (N, D): the rows' deviations from the mean, divided by √(N - 1)

    @classmethod
    def of_rows(cls, rows: np.ndarray) -> "FactoredMoments":
        """The moments of rows (N, D).

        Raises:
            UserError: there are fewer than two rows.
        """
        _check_row_count(len(rows))
        rows = rows.astype(np.float64)
        mean = rows.mean(0)
        return cls(mean, (rows - mean) / math.sqrt(len(rows) - 1))

    @property
    def covariance(self) -> np.ndarray:
        return self.factor.T @ self.factor


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
        _check_row_count(self.count)
        return Moments(self._mean.cpu().numpy(), (self._scatter / (self.count - 1)).cpu().numpy())


def _check_row_count(count: int) -> None:
    if count < 2:
        raise UserError(f"a covariance needs at least 2 images, {count} given; give more images")


def frechet_distance(
    mean1: np.ndarray, covariance1: np.ndarray, mean2: np.ndarray, covariance2: np.ndarray
) -> float:
    """:func:`moments_distance` of two Gaussians given by their means and covariances.

    Args:
        mean1: (D,).
        covariance1: (D, D), symmetric and positive semi-definite.
        mean2: (D,).
        covariance2: (D, D), symmetric and positive semi-definite.

    Raises:
        UserError: see :func:`moments_distance`.
    """
    return moments_distance(Moments(mean1, covariance1), Moments(mean2, covariance2))


def moments_distance(
    moments1: Moments | FactoredMoments, moments2: Moments | FactoredMoments
) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (Heusel et al. 2017, equation 6).

    On Inception features it is the FID. It equals ``|m1 - m2|² + tr C1 + tr C2 - 2 tr (C1 C2)^½``.
    The last trace is the sum of the square roots of the eigenvalues of ``C1 C2``. Covariances may
    be singular. With factored moments no (D, D) matrix is decomposed.

    The function checks its arguments, the eigenvalues and the result, which makes it longer than
    the formula. A wrong FID looks like a right one: broken builds of linear-algebra libraries have
    printed plausible numbers.

    Raises:
        UserError: the arguments are not finite moments of one dimension, or the eigenvalues are
            wrong.
    """
    # The distance is symmetric, and a factor with few rows makes the smallest product.
    (m1, c1), (m2, c2) = sorted(map(checked_moments, (moments1, moments2)), key=lambda m: len(m[1]))
    if m1.shape != m2.shape:
        raise UserError(
            f"statistics of {len(m1)} and {len(m2)} dimensions cannot be compared; "
            "use the same features"
        )
    traces = _trace(c1) + _trace(c2)
    product, product_trace = _product(c1, c2)
    eigenvalues = torch.linalg.eigvalsh(product)
    _check_eigenvalues(eigenvalues, product, product_trace, 1e-12 * float(_trace(c1) * _trace(c2)))

    distance = (m1 - m2).square().sum() + traces - 2 * _nonnegative(eigenvalues).sqrt().sum()
    if distance < -1e-6 * traces:  # a rounding error is smaller
        raise UserError(
            f"the Fréchet distance is negative ({distance:.6g}); "
            "the statistics are damaged, compute them again"
        )
    return max(float(distance), 0.0)


def checked_moments(moments: Moments | FactoredMoments) -> tuple[torch.Tensor, torch.Tensor]:
    """Convert moments to float64.

    Returns:
        The mean (D,), and the covariance C (D, D) or a factor F (N, D) of it, C = FᵀF. A matrix
        with fewer rows than columns is a factor.

    Raises:
        UserError: they are not real, finite and of one dimension, or C cannot be a covariance.
    """
    m = _to_float64(moments.mean).reshape(-1)
    if isinstance(moments, FactoredMoments) and len(moments.factor) < len(m):
        c, rows = _to_float64(moments.factor), len(moments.factor)
    else:
        c, rows = _to_float64(moments.covariance), len(m)
        c = c.reshape(1, 1) if c.ndim == 0 else c  # np.cov of one-dimensional features is a scalar
    if not len(m) or c.shape != (rows, len(m)):
        raise UserError(
            f"the mean has shape {tuple(m.shape)} and the covariance {tuple(c.shape)}; "
            "compute the statistics again"
        )
    if rows < len(m):
        return m, c
    if (c - c.T).abs().max() > 1e-6 * c.abs().max():
        raise UserError(
            "the covariance is not symmetric; the statistics are damaged, compute them again"
        )
    variances = c.diagonal()
    if variances.min() < -1e-6 * variances.abs().max():  # a rounding error is smaller
        raise UserError(
            "the covariance has negative variances; the statistics are damaged, compute them again"
        )
    return m, (c + c.T) / 2


def _to_float64(values: np.ndarray) -> torch.Tensor:
    """Convert real, finite numbers of any precision."""
    values = np.asarray(values)
    if values.dtype.kind not in "fiu":
        raise UserError(
            f"the statistics hold {values.dtype}, not real numbers; "
            "compute them again from real features"
        )
    if not np.isfinite(values).all():
        raise UserError(
            "the statistics contain NaN or infinity; compute them again from finite features"
        )
    return torch.as_tensor(np.asarray(values, np.float64))


def _trace(c: torch.Tensor) -> torch.Tensor:
    """Trace of a covariance, which may be given by its factor."""
    return c.trace() if len(c) == c.shape[1] else c.square().sum()


def _product(c1: torch.Tensor, c2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A symmetric matrix whose eigenvalues are those of ``C1 C2``, except for some zeros.

    Args:
        c1: a covariance (D, D), or its factor (N, D).
        c2: a covariance, or a factor with at least N rows.

    Returns:
        The matrix and the trace of ``C1 C2``. The matrix is ``C1^½ C2 C1^½`` (D, D), or with the
        factor ``F`` of C1 ``F C2 Fᵀ`` (N, N).
    """
    dim = c1.shape[1]
    if len(c1) == dim:
        variances, axes = torch.linalg.eigh(c1)
        # In the eigenbasis of C1 its square root is diagonal, so it scales rows and columns of the
        # rotated C2. Entries of directions with a small variance stay small, hence accurate.
        scale = _nonnegative(variances).sqrt()
        product = scale[:, None] * (axes.T @ c2 @ axes) * scale
        return (product + product.T) / 2, (c1 * c2).sum()
    if len(c2) == dim:
        product = c1 @ c2 @ c1.T
    else:
        inner_products = c1 @ c2.T
        product = inner_products @ inner_products.T
    return (product + product.T) / 2, product.trace()


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
    eigenvalues: torch.Tensor, product: torch.Tensor, product_trace: torch.Tensor, atol: float
) -> None:
    """Compare the sums of the eigenvalues and of their squares with traces.

    The traces follow from the matrices without an eigenvalue solver, so a broken solver cannot
    agree with them by accident. Such solvers have printed plausible, wrong FIDs.
    """
    expected = torch.stack([product_trace, product.square().sum()])
    sums = torch.stack([eigenvalues.sum(), eigenvalues.square().sum()])
    if not torch.allclose(sums, expected, rtol=1e-6, atol=atol):
        raise UserError(
            f"the eigenvalues fail their check (power sums {sums.tolist()}, "
            f"expected {expected.tolist()}); "
            "the linear-algebra library is faulty, install another build of torch"
        )

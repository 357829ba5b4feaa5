"""Improved precision and recall (Kynkäänniemi et al. 2019), with ADM's arithmetic or in plain
float32.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch

from edt.metrics.float32 import full_float32
from edt.utils.errors import UserError

BLOCK_ROWS = 10_000  # ADM decides for each block of this many rows and columns whether half precision overflowed
CHUNK_ROWS = 1_000  # rows of a block whose intermediate results exist at one time
Mode = Literal["adm", "exact"]


def precision_recall(
    reference: np.ndarray | torch.Tensor,
    samples: np.ndarray | torch.Tensor,
    k: int = 3,
    mode: Mode = "adm",
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Share of samples on the reference manifold, and share of the reference on the samples'
    manifold.

    A manifold is the union of balls around its points, each reaching to the k-th nearest other
    point.

    Args:
        reference, samples: (N, D) and (M, D) features.
        mode: ``adm`` computes squared distances in half precision, and in float32 where a block of
            10,000 x 10,000 overflows, as ADM's published numbers do; ``exact`` always uses float32.
    """
    if min(len(reference), len(samples)) <= k:
        raise UserError(
            f"precision and recall at k = {k} need at least {k + 1} images on both sides; give more images"
        )
    reference = torch.as_tensor(reference, dtype=torch.float32)
    samples = torch.as_tensor(samples, dtype=torch.float32)
    with full_float32():
        reference_radii = _radii(reference, k, mode, device)
        sample_radii = _radii(samples, k, mode, device)
        reference_inside = torch.zeros(len(reference), dtype=torch.bool, device=device)
        sample_inside = torch.zeros(len(samples), dtype=torch.bool, device=device)
        for rows, columns, distances in _blocks(reference, samples, mode, device):
            reference_inside[rows] |= (distances <= sample_radii[columns]).any(1)
            sample_inside[columns] |= (distances <= reference_radii[rows, None]).any(0)
    return float(sample_inside.double().mean()), float(reference_inside.double().mean())


def _radii(features: torch.Tensor, k: int, mode: Mode, device: torch.device | str) -> torch.Tensor:
    """Squared distance (N,) to the k-th nearest neighbour: the (k+1)-th smallest, as the point
    itself counts too.
    """
    nearest = torch.full((len(features), k + 1), torch.inf, device=device)
    for rows, _, distances in _blocks(features, features, mode, device):
        candidates = torch.cat(
            [nearest[rows], distances.topk(min(k + 1, distances.shape[1]), largest=False).values], 1
        )
        nearest[rows] = candidates.topk(k + 1, largest=False).values
    return nearest.amax(1)


def _blocks(
    u: torch.Tensor, v: torch.Tensor, mode: Mode, device: torch.device | str
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Row slice of ``u``, row slice of ``v``, and their squared distances as float32, until all
    pairs have come.

    The distances of one block together never exceed 10,000 x 10,000 half-precision numbers.
    """
    for row in range(0, len(u), BLOCK_ROWS):
        a = u[row : row + BLOCK_ROWS].to(device)
        for column in range(0, len(v), BLOCK_ROWS):
            b = v[column : column + BLOCK_ROWS].to(device)
            columns = slice(column, column + len(b))
            half = _half_distances(a, b) if mode == "adm" else None
            for start in range(0, len(a), CHUNK_ROWS):
                chunk = slice(start, start + CHUNK_ROWS)
                distances = _distances(a[chunk], b) if half is None else half[chunk].float()
                yield slice(row + start, row + min(start + CHUNK_ROWS, len(a))), columns, distances


def _distances(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distances (n, m) in float32, by the binomial formula as ADM computes
    them.
    """
    return (u.square().sum(1)[:, None] - 2 * (u @ v.T) + v.square().sum(1)).clamp_(min=0)


def _half_distances(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor | None:
    """Squared distances (n, m) with every operation rounded to half precision; None if any of them
    is not finite.

    Products are summed in float32 and rounded once, as TensorFlow and cuBLAS do: float32 holds a
    product of two halves exactly, so this gives the same result on every device."""
    u, v = u.half(), v.half()
    v_float, v_norm = v.float(), _half_row_sums(v * v)
    distances = torch.empty(len(u), len(v), dtype=torch.half, device=u.device)
    for start in range(0, len(u), CHUNK_ROWS):
        chunk = u[start : start + CHUNK_ROWS]
        product = (chunk.float() @ v_float.T).half()
        distance = (_half_row_sums(chunk * chunk)[:, None] - 2 * product + v_norm).clamp_(min=0)
        if not distance.isfinite().all():
            return None
        distances[start : start + CHUNK_ROWS] = distance
    return distances


def _half_row_sums(x: torch.Tensor) -> torch.Tensor:
    """Row sums (n,) of half-precision ``x`` (n, D), rounded in the order of TensorFlow's CPU
    kernel.

    The order shows in the last bit of a quarter of the norms, enough to move single images across a
    radius. Rows longer than 1600 are halved; then four accumulators of eight lanes run over the
    row, and are joined one after the other."""
    if x.shape[1] > 1600:
        middle = -(-x.shape[1] // 16) * 8
        return _half_row_sums(x[:, :middle]) + _half_row_sums(x[:, middle:])
    lanes = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).unflatten(1, (-1, 4, 8)).unbind(1)
    accumulators = sum(lanes[1:], lanes[0])
    joined = sum(accumulators.unbind(1)[1:], accumulators[:, 0])
    return joined.float().sum(1).half()

"""Improved precision and recall (Kynkäänniemi et al. 2019).

The distances are computed with ADM's arithmetic or in plain float32.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch

from edt.metrics.float32 import full_float32
from edt.utils.choices import check_choice
from edt.utils.errors import UserError

# Arithmetic of the distances: "adm" reproduces published numbers, "exact" is float32.
PrecisionRecallMode = Literal["adm", "exact"]

NEIGHBOURS = 3  # k, as in ADM
# ADM computes distances in square blocks. A block that overflows half precision is recomputed in
# float32, so the size of a block affects the scores.
BLOCK_ROWS = 10_000
CHUNK_ROWS = 1_000  # rows of a block that are computed at once; limits the memory


def precision_recall(
    reference: np.ndarray | torch.Tensor,
    samples: np.ndarray | torch.Tensor,
    k: int = NEIGHBOURS,
    mode: PrecisionRecallMode = "adm",
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Precision and recall of ``samples``.

    The manifold of a set is the union of balls around its points. The radius of a ball is the
    distance to the k-th nearest other point of the set. Precision is the share of samples on the
    reference manifold. Recall is the share of reference points on the sample manifold.

    Args:
        reference: (N, D) features.
        samples: (M, D) features.
        k: the neighbour that sets the radius.
        mode: ``adm`` computes squared distances in half precision, and in float32 where a block of
            10,000 x 10,000 overflows. Published numbers are computed so. ``exact`` always uses
            float32.
        device: torch device that computes the distances.

    Raises:
        UserError: a set has k images or fewer, or the mode is unknown.
    """
    check_choice("mode of precision and recall", mode, PrecisionRecallMode)
    if min(len(reference), len(samples)) <= k:
        raise UserError(
            f"precision and recall at k = {k} need at least {k + 1} images on both sides; "
            "give more images"
        )
    reference = torch.as_tensor(reference, dtype=torch.float32)
    samples = torch.as_tensor(samples, dtype=torch.float32)
    with full_float32():
        reference_radii = _squared_radii(reference, k, mode, device)
        sample_radii = _squared_radii(samples, k, mode, device)
        reference_covered = torch.zeros(len(reference), dtype=torch.bool, device=device)
        sample_covered = torch.zeros(len(samples), dtype=torch.bool, device=device)
        for rows, columns, distances in _distance_chunks(reference, samples, mode, device):
            reference_covered[rows] |= (distances <= sample_radii[columns]).any(1)
            sample_covered[columns] |= (distances <= reference_radii[rows, None]).any(0)
    return float(sample_covered.double().mean()), float(reference_covered.double().mean())


def _squared_radii(
    features: torch.Tensor, k: int, mode: PrecisionRecallMode, device: torch.device | str
) -> torch.Tensor:
    """Squared distance of every point to its k-th nearest other point, (N,) float32."""
    # The point itself is among the columns at distance 0, so the k-th neighbour is the (k+1)-th
    # smallest distance.
    nearest = torch.full((len(features), k + 1), torch.inf, device=device)
    for rows, _, distances in _distance_chunks(features, features, mode, device):
        nearest_in_chunk = distances.topk(min(k + 1, distances.shape[1]), largest=False).values
        candidates = torch.cat([nearest[rows], nearest_in_chunk], 1)
        nearest[rows] = candidates.topk(k + 1, largest=False).values
    return nearest.amax(1)


def _distance_chunks(
    u: torch.Tensor, v: torch.Tensor, mode: PrecisionRecallMode, device: torch.device | str
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Yield rows of ``u``, rows of ``v`` and their squared distances, until every pair has come.

    At most 10,000 x 10,000 half-precision distances are in memory, and 1,000 x 10,000 in float32.
    """
    for row in range(0, len(u), BLOCK_ROWS):
        u_block = u[row : row + BLOCK_ROWS].to(device)
        for column in range(0, len(v), BLOCK_ROWS):
            v_block = v[column : column + BLOCK_ROWS].to(device)
            columns = slice(column, column + len(v_block))
            # ADM repeats a whole block in float32 if any of its distances overflows, so the half
            # distances of the block must be complete before the first chunk is used.
            half = _half_distances(u_block, v_block) if mode == "adm" else None
            for start in range(0, len(u_block), CHUNK_ROWS):
                chunk = slice(start, start + CHUNK_ROWS)
                rows = slice(row + start, row + min(start + CHUNK_ROWS, len(u_block)))
                if half is None:
                    yield rows, columns, _distances(u_block[chunk], v_block)
                else:
                    yield rows, columns, half[chunk].float()


def _distances(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distances (n, m) in float32, by the binomial formula as in ADM."""
    return (u.square().sum(1)[:, None] - 2 * (u @ v.T) + v.square().sum(1)).clamp_(min=0)


def _half_distances(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor | None:
    """Squared distances (n, m) with every operation rounded to half precision.

    Products are summed in float32 and rounded once, as in TensorFlow and cuBLAS. Float32 holds a
    product of two half-precision numbers exactly, so every device gives the same result.

    Returns:
        None if a distance is not finite.
    """
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
    """Row sums (n,) of half-precision ``x`` (n, D), rounded like TensorFlow's CPU kernel.

    The order of the additions changes the last bit of a quarter of the norms, which is enough to
    move single images across a radius. TensorFlow splits a row longer than 1600 in two and sums the
    parts separately. It then runs four accumulators of eight lanes each over the row, and adds the
    accumulators one after the other.
    """
    if x.shape[1] > 1600:
        # The split falls on a multiple of eight lanes.
        middle = -(-x.shape[1] // 16) * 8
        return _half_row_sums(x[:, :middle]) + _half_row_sums(x[:, middle:])
    steps = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).unflatten(1, (-1, 4, 8)).unbind(1)
    accumulators = sum(steps[1:], steps[0])
    lanes = sum(accumulators.unbind(1)[1:], accumulators[:, 0])
    return lanes.float().sum(1).half()

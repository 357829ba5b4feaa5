"""Streaming moments and the Fréchet distance, against ADM's golden values and closed forms."""

import numpy as np
import pytest
import torch
from evaluation_helpers import ADM_GOLDEN, golden_reference, golden_samples

from edt.metrics import (
    FactoredMoments,
    Moments,
    StreamingMoments,
    frechet_distance,
    moments_distance,
)
from edt.utils.errors import UserError


def moments_of(features: np.ndarray, batch_size: int = 100) -> Moments:
    streaming = StreamingMoments(features.shape[1])
    for start in range(0, len(features), batch_size):
        streaming.update(features[start : start + batch_size])
    return streaming.moments()


@pytest.mark.parametrize("columns, key", [(2048, "fid_2048_n1500"), (64, "fid_64")])
def test_frechet_distance_equals_adm(columns, key):
    distance = frechet_distance(
        *moments_of(golden_reference()[:, :columns]), *moments_of(golden_samples()[:, :columns])
    )
    assert distance == pytest.approx(ADM_GOLDEN[key], rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_streaming_moments_do_not_depend_on_batches(batch_size):
    # A mean this large would cost naive sums their precision.
    rows = np.random.default_rng(0).standard_normal((50, 6)) + 1e4
    mean, covariance = moments_of(rows, batch_size)
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(rows, rowvar=False), rtol=1e-9, atol=1e-10)


def test_moments_of_one_row_are_refused():
    streaming = StreamingMoments(2)
    streaming.update(np.zeros((1, 2)))
    with pytest.raises(UserError, match="at least 2 images, 1 given"):
        streaming.moments()


def random_covariance(seed: int, dim: int, rank: int) -> np.ndarray:
    factor = np.random.default_rng(seed).standard_normal((dim, rank))
    return factor @ factor.T / rank


@pytest.mark.parametrize("rank", [3, 20])
def test_equal_covariances_leave_the_squared_distance_of_the_means(rank):
    covariance = random_covariance(0, 20, rank)
    mean1, mean2 = np.zeros(20), np.linspace(-1, 1, 20)
    distance = frechet_distance(mean1, covariance, mean2, covariance)
    assert distance == pytest.approx((mean2**2).sum(), abs=1e-6)
    assert frechet_distance(mean1, covariance, mean1, covariance) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_commuting_covariances():
    variances1, variances2 = np.array([4.0, 1.0, 0.0]), np.array([1.0, 9.0, 4.0])
    axes = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))[0]
    distance = frechet_distance(
        np.zeros(3), axes * variances1 @ axes.T, np.zeros(3), axes * variances2 @ axes.T
    )
    assert distance == pytest.approx(((variances1**0.5 - variances2**0.5) ** 2).sum(), rel=1e-6)


def test_frechet_distance_is_symmetric_for_singular_covariances():
    c1, c2 = random_covariance(2, 40, 5), random_covariance(3, 40, 30)
    mean = np.zeros(40)
    forwards = frechet_distance(mean, c1, mean, c2)
    assert forwards == pytest.approx(frechet_distance(mean, c2, mean, c1), rel=1e-6)


@pytest.mark.parametrize(
    "mean, covariance, message",
    [
        (np.zeros(3), np.eye(4), "shape"),
        (np.zeros(2), np.eye(2), "dimensions"),
        (np.array([0, np.nan, 0]), np.eye(3), "NaN"),
        (np.zeros(3), np.array([[1, 2, 0], [0, 1, 0], [0, 0, 1]]), "symmetric"),
        (np.zeros(3), np.diag([1, -1, 1]), "negative"),
        (np.zeros(3), np.eye(3) * 1j, "complex128, not real numbers"),
        (np.zeros(3, complex), np.eye(3), "complex128, not real numbers"),
        (np.array(["a", "b", "c"]), np.eye(3), "<U1, not real numbers"),
    ],
)
def test_invalid_moments_are_refused(mean, covariance, message):
    with pytest.raises(UserError, match=message):
        frechet_distance(mean, covariance, np.zeros(3), np.eye(3))


def test_wrong_eigenvalues_are_refused(monkeypatch):
    monkeypatch.setattr(
        torch.linalg, "eigvalsh", lambda matrix: torch.ones(len(matrix), dtype=torch.float64) * 3
    )
    with pytest.raises(UserError, match="fail their check"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(3), 2 * np.eye(3))
    few = FactoredMoments.of_rows(np.eye(3)[:2])
    for other in (few, Moments(np.zeros(3), np.eye(3))):
        with pytest.raises(UserError, match="fail their check"):
            moments_distance(few, other)


def few_rows(seed: int, count: int, kind: str) -> np.ndarray:
    """Rows (count, 192), like the pixels of images."""
    r = np.random.default_rng(seed)
    rows = r.standard_normal((count, 8)) @ r.standard_normal((8, 192)) + 0.1 * r.random(
        (count, 192)
    )
    match kind:
        case "grey":
            return rows[:, :64].repeat(3, 1)
        case "copies":
            return rows[np.arange(count) // 2]
        case "black":
            return rows * 0
    return rows


@pytest.mark.parametrize("counts", [(40, 30), (30, 40), (191, 50), (2, 2), (5, 300)])
@pytest.mark.parametrize("kind", ["usual", "grey", "copies", "black"])
def test_distance_of_few_rows_is_that_of_their_covariances(counts, kind):
    """The (N, N) form equals the (D, D) form to rounding, with a factor on one side or on both."""
    sets = few_rows(0, counts[0], "usual"), few_rows(1, counts[1], kind)
    dense = [Moments(rows.mean(0), np.cov(rows, rowvar=False)) for rows in sets]
    factored = [FactoredMoments.of_rows(rows) for rows in sets]
    expected = moments_distance(*dense)
    for pair in (factored, (dense[0], factored[1]), (factored[0], dense[1]), factored[::-1]):
        assert moments_distance(*pair) == pytest.approx(expected, rel=1e-6)


def test_few_rows_are_at_distance_zero_from_themselves():
    rows = few_rows(0, 40, "usual")
    factored = FactoredMoments.of_rows(rows)
    np.testing.assert_allclose(factored.covariance, np.cov(rows, rowvar=False), atol=1e-12)
    variance = np.trace(factored.covariance)
    assert moments_distance(factored, factored) == pytest.approx(0, abs=1e-6 * variance)
    shifted = FactoredMoments.of_rows(rows + 2)
    assert moments_distance(factored, shifted) == pytest.approx(4 * 192, rel=1e-6)


def test_factors_are_checked():
    few = FactoredMoments.of_rows(np.eye(5)[:3])
    for factor, message in [
        (few.factor[:, :4], "shape"),
        (few.factor * np.nan, "NaN"),
        (few.factor * 1j, "complex128"),
    ]:
        with pytest.raises(UserError, match=message):
            moments_distance(few, few._replace(factor=factor))
    with pytest.raises(UserError, match="5 and 6 dimensions"):
        moments_distance(few, FactoredMoments.of_rows(np.eye(6)[:3]))
    with pytest.raises(UserError, match="at least 2 images, 1 given"):
        FactoredMoments.of_rows(np.eye(5)[:1])

"""The pure functions of edt.metrics against ADM's golden values and closed forms."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edt.metrics import (
    StreamingMoments,
    frechet_distance,
    inception_score,
    inception_score_splits,
    kernel_distance,
    precision_recall,
)
from edt.utils.errors import UserError

# The package exports the function under the name of its module.
MODULE = importlib.import_module("edt.metrics.precision_recall")
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "evaluator.json").read_text())


def draw(seed: int, n: int, scale: float, shift: float) -> np.ndarray:
    """Features (n, 2048) by the rule of the golden values."""
    basis = np.random.default_rng(42).standard_normal((16, 2048), dtype=np.float32)
    r = np.random.default_rng(seed)
    mixed = r.standard_normal((n, 16), dtype=np.float32) @ basis
    return np.abs(
        scale * mixed / 4 + shift + 0.1 * r.standard_normal((n, 2048), dtype=np.float32)
    ).astype(np.float32)


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    return draw(1, 1500, 0.4, 0.3)


@pytest.fixture(scope="module")
def samples() -> np.ndarray:
    return draw(2, 1300, 0.45, 0.33)


def moments_of(features: np.ndarray, batch_size: int = 100):
    streaming = StreamingMoments(features.shape[1])
    for start in range(0, len(features), batch_size):
        streaming.update(features[start : start + batch_size])
    return streaming.moments()


@pytest.mark.parametrize("columns, key", [(2048, "fid_2048_n1500"), (64, "fid_64")])
def test_frechet_distance_meets_adm(reference, samples, columns, key):
    distance = frechet_distance(
        *moments_of(reference[:, :columns]), *moments_of(samples[:, :columns])
    )
    assert distance == pytest.approx(GOLDEN[key], rel=1e-4)


@pytest.mark.parametrize("suffix, factor", [("", 1), ("_x60", 60)])
def test_precision_recall_meets_adm(reference, samples, suffix, factor):
    precision, recall = precision_recall(reference * factor, samples * factor)
    assert precision == pytest.approx(GOLDEN["precision" + suffix], abs=2e-3)
    assert recall == pytest.approx(GOLDEN["recall" + suffix], abs=2e-3)


@pytest.mark.parametrize("split_size", [5000, 500])
def test_inception_score_meets_adm(samples, split_size):
    weights = np.float32(0.05) * np.random.default_rng(3).standard_normal(
        (2048, 1008), dtype=np.float32
    )
    score = inception_score(torch.from_numpy(samples @ weights).softmax(1), split_size)
    assert score == pytest.approx(GOLDEN[f"inception_score_split{split_size}"], rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_streaming_moments_do_not_depend_on_batches(batch_size):
    rows = (
        np.random.default_rng(0).standard_normal((50, 6)) + 1e4
    )  # a large mean, as naive sums would lose
    mean, covariance = moments_of(rows, batch_size)
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(rows, rowvar=False), rtol=1e-9, atol=1e-10)


def random_covariance(seed: int, dim: int, rank: int) -> np.ndarray:
    factor = np.random.default_rng(seed).standard_normal((dim, rank))
    return factor @ factor.T / rank


@pytest.mark.parametrize("rank", [3, 20])
def test_equal_covariances_leave_the_squared_mean_distance(rank):
    covariance = random_covariance(0, 20, rank)
    mean1, mean2 = np.zeros(20), np.linspace(-1, 1, 20)
    assert frechet_distance(mean1, covariance, mean2, covariance) == pytest.approx(
        (mean2**2).sum(), abs=1e-6
    )
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
    assert frechet_distance(mean, c1, mean, c2) == pytest.approx(
        frechet_distance(mean, c2, mean, c1), rel=1e-6
    )


@pytest.mark.parametrize(
    "mean, covariance, message",
    [
        (np.zeros(3), np.eye(4), "shape"),
        (np.zeros(2), np.eye(2), "dimensions"),
        (np.array([0, np.nan, 0]), np.eye(3), "NaN"),
        (np.zeros(3), np.array([[1, 2, 0], [0, 1, 0], [0, 0, 1]]), "symmetric"),
        (np.zeros(3), np.diag([1, -1, 1]), "negative"),
    ],
)
def test_frechet_distance_refuses_what_is_no_covariance(mean, covariance, message):
    with pytest.raises(UserError, match=message):
        frechet_distance(mean, covariance, np.zeros(3), np.eye(3))


def test_wrong_eigenvalues_are_not_printed(monkeypatch):
    monkeypatch.setattr(
        torch.linalg, "eigvalsh", lambda matrix: torch.ones(len(matrix), dtype=torch.float64) * 3
    )
    with pytest.raises(UserError, match="fail their check"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(3), 2 * np.eye(3))


def test_inception_score_closed_forms():
    assert inception_score(np.full((30, 10), 0.1)) == pytest.approx(1)
    assert inception_score(np.eye(10).repeat(3, 0)) == pytest.approx(
        10
    )  # confident and balanced, with zeros
    assert inception_score_splits(np.eye(10), split_size=4) == pytest.approx([4, 4, 2])


@pytest.mark.parametrize("mode", ["adm", "exact"])
def test_identical_sets_have_full_precision_and_recall(samples, mode):
    assert precision_recall(samples[:200], samples[:200], mode=mode) == (1, 1)


@pytest.mark.parametrize("mode", ["adm", "exact"])
def test_precision_and_recall_are_not_swapped(mode):
    grid = np.stack(np.meshgrid(np.arange(4.0), np.arange(4.0)), -1).reshape(-1, 2)
    corner = np.float32([[0, 0], [0.1, 0], [0, 0.1], [0.1, 0.1], [0.05, 0.05]])
    precision, recall = precision_recall(grid.astype(np.float32), corner, mode=mode)
    assert precision == 1  # every sample is near the reference ...
    assert recall == 1 / 16  # ... of which the samples cover one point


def test_exact_precision_recall_is_that_of_all_distances(reference, samples):
    a, b = (torch.from_numpy(x[:400]).double() for x in (reference, samples))
    radius_a, radius_b = (torch.cdist(x, x).kthvalue(4, 1).values for x in (a, b))
    distances = torch.cdist(a, b)
    expected = [float((distances <= radius_a[:, None]).any(0).double().mean())]
    expected.append(float((distances <= radius_b).any(1).double().mean()))
    assert precision_recall(a.numpy(), b.numpy(), mode="exact") == tuple(expected)


@pytest.mark.parametrize("mode", ["adm", "exact"])
def test_blocks_do_not_change_precision_and_recall(reference, samples, mode, monkeypatch):
    whole = precision_recall(reference[:300], samples[:200], mode=mode)
    monkeypatch.setattr(MODULE, "BLOCK_ROWS", 90)
    monkeypatch.setattr(MODULE, "CHUNK_ROWS", 40)
    assert precision_recall(reference[:300], samples[:200], mode=mode) == whole


def test_half_precision_falls_back_block_by_block(monkeypatch):
    """Distances around 900 overflow and are exact; those around 30 stay in half precision, where
    0.2 rounds to 0.
    """
    monkeypatch.setattr(MODULE, "BLOCK_ROWS", 4)
    steps = np.arange(4, dtype=np.float32)[:, None] * np.float32([1, 0])
    reference = np.concatenate([30 + 0.001 * steps, 900 + steps])
    samples = np.concatenate(
        [np.float32([30.2, 30]) + 0.001 * steps, np.float32([900, 902]) + steps]
    )
    assert precision_recall(reference, samples, k=1, mode="adm") == (0.5, 0.5)
    assert precision_recall(reference, samples, k=1, mode="exact") == (0, 0)


def test_training_precision_does_not_reach_the_distances(reference, samples):
    expected = precision_recall(reference[:300], samples[:300], mode="exact")
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert precision_recall(reference[:300], samples[:300], mode="exact") == expected
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before


def test_too_few_images_for_neighbours():
    with pytest.raises(UserError, match="at least 4 images"):
        precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))


def test_kernel_distance_is_unbiased():
    r = np.random.default_rng(0)
    pairs = [r.standard_normal((2, 20, 4)) for _ in range(300)]
    distances = [kernel_distance(x, y)[0] for x, y in pairs]
    assert (
        abs(np.mean(distances)) < 4 * np.std(distances) / len(distances) ** 0.5
    )  # a biased estimate is far above
    assert np.mean(distances) < 0.1 * np.std(distances) * 3


def test_kernel_distance_by_hand():
    x, y = np.float32([[1, 0], [0, 1]]), np.float32([[1, 1], [1, -1]])
    # kernel (x·y / 2 + 1)³: within x 1, within y 1, across 1.5³ three times and 0.5³ once
    assert kernel_distance(x, y)[0] == pytest.approx(1 + 1 - 2 * (3 * 1.5**3 + 0.5**3) / 4)

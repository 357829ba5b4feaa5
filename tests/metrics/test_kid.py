"""The Kernel Inception Distance."""

import numpy as np
import pytest

from edt.metrics import kernel_distance


def test_kernel_distance_is_unbiased():
    r = np.random.default_rng(0)
    pairs = [r.standard_normal((2, 20, 4)) for _ in range(300)]
    distances = [kernel_distance(x, y)[0] for x, y in pairs]
    standard_error = np.std(distances) / len(distances) ** 0.5
    assert abs(np.mean(distances)) < 4 * standard_error  # a biased estimate is far above


def test_kernel_distance_by_hand():
    x, y = np.float32([[1, 0], [0, 1]]), np.float32([[1, 1], [1, -1]])
    # kernel (x·y / 2 + 1)³: within x 1, within y 1, across 1.5³ three times and 0.5³ once
    assert kernel_distance(x, y)[0] == pytest.approx(1 + 1 - 2 * (3 * 1.5**3 + 0.5**3) / 4)


def test_subsets_are_drawn_from_both_sets_with_the_seed():
    r = np.random.default_rng(1)
    x, y = r.standard_normal((2, 50, 4)).astype(np.float32)
    mean, deviation = kernel_distance(x, y, subsets=5, subset_size=20, seed=3)
    assert deviation > 0
    assert kernel_distance(x, y, subsets=5, subset_size=20, seed=3) == (mean, deviation)
    assert kernel_distance(x, y, subsets=5, subset_size=20, seed=4)[0] != mean

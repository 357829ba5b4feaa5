"""The Inception Score, against ADM's golden values and closed forms."""

import numpy as np
import pytest
import torch
from evaluation_helpers import ADM_GOLDEN, golden_samples

from edt.metrics import inception_score, inception_score_splits


@pytest.mark.parametrize("split_size", [5000, 500])
def test_inception_score_equals_adm(split_size):
    r = np.random.default_rng(3)
    weights = np.float32(0.05) * r.standard_normal((2048, 1008), dtype=np.float32)
    probabilities = torch.from_numpy(golden_samples() @ weights).softmax(1)
    expected = ADM_GOLDEN[f"inception_score_split{split_size}"]
    assert inception_score(probabilities, split_size) == pytest.approx(expected, rel=1e-4)


def test_uniform_classes_score_one():
    assert inception_score(np.full((30, 10), 0.1)) == pytest.approx(1)


def test_confident_and_balanced_classes_score_their_number():
    assert inception_score(np.eye(10).repeat(3, 0)) == pytest.approx(10)  # zeros are no problem


def test_last_split_may_be_shorter():
    assert inception_score_splits(np.eye(10), split_size=4) == pytest.approx([4, 4, 2])

"""Precision and recall, against ADM's golden values and direct computation."""

import importlib

import numpy as np
import pytest
import torch
from evaluation_helpers import ADM_GOLDEN, golden_reference, golden_samples

from edt.metrics import PrecisionRecallMode, precision_recall
from edt.utils.choices import choices
from edt.utils.errors import UserError

# The package exports the function under the name of its module.
MODULE = importlib.import_module("edt.metrics.precision_recall")


@pytest.mark.parametrize("suffix, factor", [("", 1), ("_x60", 60)])
def test_precision_recall_equals_adm(suffix, factor):
    precision, recall = precision_recall(golden_reference() * factor, golden_samples() * factor)
    assert precision == pytest.approx(ADM_GOLDEN["precision" + suffix], abs=2e-3)
    assert recall == pytest.approx(ADM_GOLDEN["recall" + suffix], abs=2e-3)


@pytest.mark.parametrize("mode", choices(PrecisionRecallMode))
def test_identical_sets_have_full_precision_and_recall(mode):
    features = golden_samples()[:200]
    assert precision_recall(features, features, mode=mode) == (1, 1)


@pytest.mark.parametrize("mode", choices(PrecisionRecallMode))
def test_precision_and_recall_are_not_swapped(mode):
    grid = np.stack(np.meshgrid(np.arange(4.0), np.arange(4.0)), -1).reshape(-1, 2)
    corner = np.float32([[0, 0], [0.1, 0], [0, 0.1], [0.1, 0.1], [0.05, 0.05]])
    precision, recall = precision_recall(grid.astype(np.float32), corner, mode=mode)
    assert precision == 1  # every sample is near the reference ...
    assert recall == 1 / 16  # ... but the samples cover only one of its points


def test_exact_precision_recall_is_that_of_all_distances():
    a = torch.from_numpy(golden_reference()[:400]).double()
    b = torch.from_numpy(golden_samples()[:400]).double()
    radius_a, radius_b = (torch.cdist(x, x).kthvalue(4, 1).values for x in (a, b))
    distances = torch.cdist(a, b)
    expected_precision = float((distances <= radius_a[:, None]).any(0).double().mean())
    expected_recall = float((distances <= radius_b).any(1).double().mean())
    precision, recall = precision_recall(a.numpy(), b.numpy(), mode="exact")
    assert precision == expected_precision
    assert recall == expected_recall


@pytest.mark.parametrize("mode", choices(PrecisionRecallMode))
def test_blocks_do_not_change_precision_and_recall(mode, monkeypatch):
    sets = golden_reference()[:300], golden_samples()[:200]
    expected = precision_recall(*sets, mode=mode)
    monkeypatch.setattr(MODULE, "BLOCK_ROWS", 90)
    monkeypatch.setattr(MODULE, "CHUNK_ROWS", 40)
    assert precision_recall(*sets, mode=mode) == expected


def test_half_precision_falls_back_block_by_block(monkeypatch):
    """Distances around 900 overflow and are exact. Those around 30 stay in half precision, where
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


def test_training_precision_does_not_reach_the_distances():
    sets = golden_reference()[:300], golden_samples()[:300]
    expected = precision_recall(*sets, mode="exact")
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert precision_recall(*sets, mode="exact") == expected
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before


def test_too_few_images_for_neighbours():
    with pytest.raises(UserError, match="at least 4 images"):
        precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))


def test_unknown_mode_is_refused():
    features = np.zeros((9, 2), np.float32)
    with pytest.raises(UserError, match="'exakt'; choose one of adm, exact"):
        precision_recall(features, features, mode="exakt")


@pytest.mark.slow
def test_half_precision_distances_are_those_of_tensorflow():
    tf = pytest.importorskip("tensorflow")
    r = np.random.default_rng(0)
    a, b = (np.abs(r.standard_normal((n, 2048), dtype=np.float32)) for n in (300, 200))
    u, v = (tf.cast(x, tf.float16) for x in (a, b))
    u_norms, v_norms = (tf.reduce_sum(tf.square(x), 1) for x in (u, v))
    products = tf.matmul(u, v, transpose_b=True)
    expected = tf.maximum(u_norms[:, None] - 2 * products + v_norms, 0).numpy()
    distances = MODULE._half_distances(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    assert (distances == expected).mean() > 0.999

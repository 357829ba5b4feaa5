"""The evaluation of two image sets, as a library."""

import json

import numpy as np
import pytest

from edt.metrics import (
    SCORE_LINES,
    FeatureName,
    PixelFeatures,
    check_comparable,
    compare,
    compute_statistics,
    evaluate,
    open_source,
)
from edt.utils.choices import choices
from edt.utils.errors import UserError

EXTRACTOR = PixelFeatures()


@pytest.fixture(scope="module")
def reference():
    return open_source(np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def samples():
    return open_source(np.random.default_rng(1).integers(0, 200, (15, 4, 4, 3), dtype=np.uint8))


def test_every_kind_of_features_has_printed_scores():
    assert tuple(SCORE_LINES) == choices(FeatureName)


def test_report_holds_the_scores_of_compare(reference, samples):
    report = evaluate(reference, samples, EXTRACTOR)
    scores = compare(
        compute_statistics(reference, EXTRACTOR), compute_statistics(samples, EXTRACTOR), EXTRACTOR
    )
    assert scores.keys() == {"frechet_distance", "precision", "recall"}
    for name, score in scores.items():
        assert report[name] == score
    assert report["precision_recall"] == {"k": 3, "mode": "exact"}
    assert report["samples"]["count"] == 15
    assert json.loads(json.dumps(report))["reference"]["resolution"] == [4, 4]


def test_evaluate_refuses_an_unknown_mode_before_it_computes(reference, samples, monkeypatch):
    monkeypatch.setattr(EXTRACTOR, "extract", None)  # a call would raise a TypeError
    with pytest.raises(UserError, match="'exakt'; choose one of adm, exact"):
        evaluate(reference, samples, EXTRACTOR, pr="exakt")


def test_compare_refuses_an_unknown_mode(reference, samples):
    statistics = (compute_statistics(source, EXTRACTOR) for source in (reference, samples))
    with pytest.raises(UserError, match="'exakt'; choose one of adm, exact"):
        compare(*statistics, EXTRACTOR, pr="exakt")


def test_different_resolutions_are_refused(reference):
    larger = open_source(np.random.default_rng(0).integers(0, 256, (9, 8, 6, 3), dtype=np.uint8))
    with pytest.raises(UserError, match="reference has 4x4 pixels and the samples 6x8"):
        check_comparable(reference, larger)

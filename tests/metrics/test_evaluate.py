"""The evaluation of two image sets, as a library."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from edt.metrics import (
    SCORE_LINES,
    FactoredMoments,
    FeatureName,
    Moments,
    PixelFeatures,
    Source,
    Statistics,
    check_comparable,
    compare,
    compute_statistics,
    evaluate,
    open_source,
)
from edt.metrics.statistics import write_statistics
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


class SmallInception(PixelFeatures):
    """Pixels with the other outputs of the Inception network."""

    name: FeatureName = "inception"
    weights_sha256 = "0" * 64

    def extract(self, images):
        features, _ = super().extract(images)
        return features, features[:, :5] ** 2

    def probabilities(self, features):
        return torch.from_numpy(features).softmax(1)


def test_other_scores_do_not_depend_on_the_form_of_the_moments(reference, samples):
    extractor = SmallInception()
    few = [compute_statistics(source, extractor) for source in (reference, samples)]
    assert all(isinstance(side.moments, FactoredMoments) for side in few)
    assert all(isinstance(side.spatial_moments, Moments) for side in few)
    dense = [
        replace(side, moments=Moments(side.moments.mean, side.moments.covariance)) for side in few
    ]
    scores, expected = compare(*few, extractor), compare(*dense, extractor)
    assert scores.pop("fid") == pytest.approx(expected.pop("fid"), rel=1e-6)
    assert {"sfid", "kid", "precision", "recall", "inception_score"} < expected.keys()
    assert scores == expected


def moments_file(path, dimensions: int, **more):
    np.savez(path, mu=np.zeros(dimensions), sigma=np.eye(dimensions), **more)
    return open_source(path, str(more.get("feature_name", "inception")))


def test_dimensions_are_compared_before_features_are_computed(reference, tmp_path):
    small = moments_file(tmp_path / "64.npz", 64)
    with pytest.raises(UserError, match="64.npz has inception features of 64 .* array of 2048"):
        check_comparable(small, reference)
    with pytest.raises(UserError, match="array has inception features of 2048 .*64.npz of 64;"):
        check_comparable(reference, small)
    check_comparable(small, moments_file(tmp_path / "more.npz", 64))
    check_comparable(moments_file(tmp_path / "2048.npz", 2048), reference)
    with pytest.raises(UserError, match="of 64 dimensions, and .*2048.npz of 2048"):
        check_comparable(small, open_source(tmp_path / "2048.npz"))
    spatial = {"mu_s": np.zeros(9), "sigma_s": np.eye(9)}
    with pytest.raises(UserError, match="of 9 dimensions, and the image array of 2023"):
        check_comparable(moments_file(tmp_path / "spatial.npz", 2048, **spatial), reference)
    pixels = moments_file(tmp_path / "pixels.npz", 64, feature_name="pixels")
    with pytest.raises(UserError, match="pixels features of 64 dimensions, and .* of 48"):
        check_comparable(pixels, reference)


def test_too_few_images_for_precision_are_refused_before_features_are_computed(
    reference, samples, tmp_path
):
    two = open_source(np.random.default_rng(2).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8))
    for pair in ((reference, two), (two, samples)):
        with pytest.raises(UserError, match="array holds 2 images, but .* at least 4 on both"):
            check_comparable(*pair)
    # Without features on both sides there is no precision.
    check_comparable(moments_file(tmp_path / "48.npz", 48, feature_name="pixels"), two)
    write_statistics(tmp_path / "two.npz", compute_statistics(two, EXTRACTOR))
    with pytest.raises(UserError, match="two.npz holds 2 images, but precision and recall need"):
        check_comparable(reference, open_source(tmp_path / "two.npz", "pixels"))


def test_statistics_of_other_weights_are_refused_before_features_are_computed(
    reference, monkeypatch
):
    extractor = SmallInception()
    monkeypatch.setattr(extractor, "extract", None)  # a call would raise a TypeError
    moments = Moments(np.zeros(2048), np.eye(2048))
    statistics = Statistics("inception", moments, weights_sha256="1" * 64)
    with pytest.raises(UserError, match="other.npz was made with other Inception weights"):
        evaluate(reference, Source("other.npz", statistics=statistics), extractor)

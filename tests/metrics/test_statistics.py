"""Files of statistics."""

from dataclasses import replace

import numpy as np
import pytest

from edt.metrics import FactoredMoments, Moments, Statistics, open_source
from edt.metrics.statistics import read_statistics, write_statistics
from edt.utils.errors import UserError


def example_statistics(features: bool = True) -> Statistics:
    r = np.random.default_rng(0)
    rows = r.standard_normal((20, 4)).astype(np.float32)
    return Statistics(
        "pixels",
        Moments(rows.mean(0), np.cov(rows, rowvar=False)),
        Moments(np.zeros(3), np.eye(3)),
        rows if features else None,
        20,
        (2, 1),
        "0" * 64,
    )


@pytest.mark.parametrize("features", [True, False])
def test_written_statistics_are_read_back(tmp_path, features):
    expected = example_statistics(features)
    write_statistics(tmp_path / "s.npz", expected)
    statistics = read_statistics(tmp_path / "s.npz")
    assert statistics.feature_name == "pixels"
    np.testing.assert_array_equal(statistics.moments.mean, expected.moments.mean)
    np.testing.assert_array_equal(statistics.moments.covariance, expected.moments.covariance)
    np.testing.assert_array_equal(statistics.spatial_moments.covariance, np.eye(3))
    assert (statistics.features is not None) == features
    if features:
        np.testing.assert_array_equal(statistics.features, expected.features)
    assert statistics.count == 20
    assert statistics.resolution == (2, 1)
    assert statistics.weights_sha256 == "0" * 64


def test_file_of_adm_holds_inception_moments_only(tmp_path):
    np.savez(tmp_path / "adm.npz", mu=np.zeros(4), sigma=np.eye(4))
    statistics = read_statistics(tmp_path / "adm.npz")
    assert statistics.feature_name == "inception"
    assert statistics.spatial_moments is None
    assert statistics.features is None
    assert statistics.weights_sha256 is None


@pytest.mark.parametrize(
    "name, value, message", [("mu", np.nan, "NaN"), ("sigma", np.inf, "infinity")]
)
def test_moments_that_are_not_finite_are_refused(tmp_path, name, value, message):
    arrays = {"mu": np.zeros(4), "sigma": np.eye(4)}
    arrays[name] = arrays[name] + value
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "s.npz")


@pytest.mark.parametrize("name", ["mu", "sigma", "mu_s", "sigma_s"])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x * (1 + 1e-9j), "complex128, not real numbers"),
        (lambda x: x.astype(str), "not real numbers"),
        (lambda x: x + np.nan, "NaN"),
        (lambda x: x[:2], "shape"),
    ],
    ids=["complex", "text", "NaN", "shape"],
)
def test_arrays_that_are_no_moments_are_refused_at_opening(tmp_path, name, change, message):
    arrays = {"mu": np.zeros(4), "sigma": np.eye(4), "mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    np.savez(tmp_path / "s.npz", **{**arrays, name: change(arrays[name])})
    with pytest.raises(UserError, match=f"s.npz, .*{name}.*{message}"):
        open_source(tmp_path / "s.npz")


def test_damaged_covariances_are_refused_at_opening(tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(4), sigma=np.triu(np.ones((4, 4))))
    with pytest.raises(UserError, match="s.npz, mu and sigma: the covariance is not symmetric"):
        open_source(tmp_path / "s.npz")
    np.savez(tmp_path / "s.npz", mu=np.zeros(4))
    with pytest.raises(UserError, match="s.npz holds mu but no sigma"):
        open_source(tmp_path / "s.npz")


def test_features_of_other_dimensions_are_refused_at_opening(tmp_path):
    write_statistics(
        tmp_path / "s.npz", replace(example_statistics(), features=np.zeros((20, 3), np.float32))
    )
    with pytest.raises(UserError, match=r"features have shape \(20, 3\), but there are 4 means"):
        open_source(tmp_path / "s.npz", "pixels")


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("sigma", -np.eye(4), "mu and sigma: the covariance has negative variances"),
        ("sigma", np.diag([9.0, 9, 9, -1]), "mu and sigma: the covariance has negative variances"),
        ("resolution", np.array([2, 1, 3]), "resolution is no height and width"),
        ("resolution", np.array("2x1"), "resolution is no height and width"),
        ("resolution", np.array([2, -1]), "resolution is no height and width"),
        ("resolution", np.array([2.5, 1]), "resolution is no height and width"),
        ("count", np.arange(3), "count is no number of images"),
        ("count", np.array(-20), "count is no number of images"),
        ("count", np.array("20"), "count is no number of images"),
        ("count", np.array(np.nan), "count is no number of images"),
        ("distinct_count", np.array(-1), "distinct_count is no number of images"),
        ("plain_count", np.array([[1, 2]]), "plain_count is no number of images"),
        ("features", np.array(1.0), r"features are float64 of shape \(\), not a row"),
        ("features", np.zeros((1, 4)), r"features are float64 of shape \(1, 4\), not a row"),
        ("features", np.full((20, 4), "a"), "features are <U1 of shape"),
        ("features", np.full((20, 4), np.nan), "features contain NaN or infinity"),
    ],
)
def test_odd_fields_are_refused_at_opening(tmp_path, name, value, message):
    write_statistics(tmp_path / "s.npz", example_statistics())
    with np.load(tmp_path / "s.npz") as arrays:
        np.savez(tmp_path / "s.npz", **{**arrays, name: value})
    with pytest.raises(UserError, match=f"^{tmp_path}/s.npz.*{message}") as error:
        open_source(tmp_path / "s.npz", "pixels")
    assert "\n" not in str(error.value)


def test_moments_of_no_dimension_are_refused_at_opening(tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(0), sigma=np.zeros((0, 0)))
    with pytest.raises(UserError, match=r"s.npz, mu and sigma: the mean has shape \(0,\)"):
        open_source(tmp_path / "s.npz")


def test_a_count_of_other_programs_is_read(tmp_path):
    write_statistics(tmp_path / "s.npz", example_statistics())
    for count in (np.array([20]), np.array(20.0), np.uint8(20)):
        with np.load(tmp_path / "s.npz") as arrays:
            np.savez(tmp_path / "s.npz", **{**arrays, "count": count})
        assert read_statistics(tmp_path / "s.npz").count == 20


def test_other_arrays_of_another_program_are_ignored(tmp_path):
    arrays = {"features": np.array("pool"), "count": np.arange(3), "resolution": np.array(64)}
    np.savez(tmp_path / "s.npz", mu=np.zeros(4), sigma=np.eye(4), **arrays)
    statistics = open_source(tmp_path / "s.npz").statistics
    assert (statistics.features, statistics.count, statistics.resolution) == (None, None, None)


def test_factored_moments_are_read_back(tmp_path):
    rows = np.random.default_rng(0).standard_normal((5, 9)).astype(np.float32)
    factored = FactoredMoments.of_rows(rows)
    write_statistics(tmp_path / "s.npz", Statistics("pixels", factored, None, rows, 5))
    moments = read_statistics(tmp_path / "s.npz").moments
    np.testing.assert_array_equal(moments.factor, factored.factor)
    write_statistics(tmp_path / "s.npz", Statistics("pixels", factored))
    moments = read_statistics(tmp_path / "s.npz").moments
    np.testing.assert_array_equal(moments.covariance, factored.covariance)


def test_moments_of_different_dimensions_are_refused(tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(4), sigma=np.eye(3))
    with pytest.raises(UserError, match="shape"):
        open_source(tmp_path / "s.npz")


def test_file_without_moments_is_refused(tmp_path):
    np.savez(tmp_path / "s.npz", features=np.zeros((3, 4)))
    with pytest.raises(UserError, match="holds no array mu"):
        read_statistics(tmp_path / "s.npz")


def test_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError):
        write_statistics(tmp_path / "s.npz", example_statistics())
    assert list(tmp_path.iterdir()) == []

"""Files of statistics."""

import numpy as np
import pytest

from edt.metrics import Moments, Statistics, open_source
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

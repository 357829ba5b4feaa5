"""Statistics of images: computed, cached, and stored ones that are used instead."""

import numpy as np
import pytest

from edt.metrics import PixelFeatures, Source, compute_statistics, make_reference, open_source
from edt.metrics.images import ArrayImages
from edt.metrics.statistics import read_statistics, write_statistics
from edt.utils.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)


def test_statistics_are_those_of_the_pixels_and_survive_a_file(tmp_path):
    computed = compute_statistics(open_source(IMAGES), PixelFeatures(), batch_size=6)
    write_statistics(tmp_path / "s.npz", computed)
    opened = compute_statistics(open_source(tmp_path / "s.npz", "pixels"), PixelFeatures())
    flat = IMAGES.reshape(20, -1) / 255
    for statistics in (computed, opened):
        np.testing.assert_allclose(statistics.moments.mean, flat.mean(0), rtol=1e-6)
        np.testing.assert_allclose(
            statistics.moments.covariance, np.cov(flat, rowvar=False), atol=1e-7
        )
        np.testing.assert_allclose(statistics.features, flat, rtol=1e-6)
        assert statistics.count == 20
        assert statistics.resolution == (8, 8)


def test_moments_in_a_file_are_used_instead_of_those_of_its_images(tmp_path):
    """ADM's reference files hold the moments of the whole training set beside 10,000 of its
    images.
    """
    mean, covariance = np.zeros(192), np.eye(192)
    np.savez(tmp_path / "ref.npz", arr_0=IMAGES, mu=mean, sigma=covariance, feature_name="pixels")
    statistics = compute_statistics(open_source(tmp_path / "ref.npz", "pixels"), PixelFeatures())
    np.testing.assert_array_equal(statistics.moments.covariance, covariance)
    assert len(statistics.features) == 20


def test_stored_statistics_of_other_features_are_refused(tmp_path):
    np.savez(tmp_path / "ref.npz", arr_0=IMAGES, mu=np.zeros(4), sigma=np.eye(4))
    source = open_source(tmp_path / "ref.npz")  # opened for Inception features
    with pytest.raises(UserError, match="inception features.*feature_name='pixels'"):
        compute_statistics(source, PixelFeatures())


def test_source_without_content_is_refused():
    with pytest.raises(UserError, match="neither images nor statistics"):
        compute_statistics(Source("nothing"), PixelFeatures())


@pytest.mark.parametrize("image_count", [5, 100])
def test_reference_holds_moments_of_all_images_and_some_images(tmp_path, image_count):
    path = tmp_path / "ref.npz"
    make_reference(ArrayImages(IMAGES), PixelFeatures(), path, image_count, batch_size=6)
    statistics = read_statistics(path)
    assert statistics.count == 20
    assert statistics.features is None
    np.testing.assert_allclose(
        statistics.moments.mean, IMAGES.reshape(20, -1).mean(0) / 255, rtol=1e-6
    )
    with np.load(path) as arrays:
        kept = arrays["arr_0"]
    assert len(kept) == min(image_count, 20)
    # They are different images, in their order.
    positions = [int(np.flatnonzero((IMAGES == image).all((1, 2, 3)))[0]) for image in kept]
    assert positions == sorted(set(positions))


class CountingPixels(PixelFeatures):
    calls = 0

    def extract(self, images):
        self.calls += 1
        return super().extract(images)


def test_cache_is_keyed_by_content(tmp_path):
    extractor, cache = CountingPixels(), tmp_path / "cache"
    np.savez(tmp_path / "a.npz", IMAGES)
    first = compute_statistics(
        open_source(tmp_path / "a.npz", "pixels"), extractor, cache_dir=cache
    )
    (tmp_path / "a.npz").rename(tmp_path / "b.npz")
    second = compute_statistics(
        open_source(tmp_path / "b.npz", "pixels"), extractor, cache_dir=cache
    )
    assert extractor.calls == 1
    np.testing.assert_array_equal(first.features, second.features)
    np.savez(tmp_path / "b.npz", 255 - IMAGES)
    compute_statistics(open_source(tmp_path / "b.npz", "pixels"), extractor, cache_dir=cache)
    assert extractor.calls == 2
    assert all(read_statistics(path).count == 20 for path in cache.iterdir())


def test_pixel_features_refuse_large_images():
    large = np.random.default_rng(1).integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)
    with pytest.raises(UserError, match="64x64"):
        compute_statistics(open_source(large), PixelFeatures())


class InfinitePixels(PixelFeatures):
    def extract(self, images):
        features, spatial_features = super().extract(images)
        return features / 0, spatial_features


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="features of the image array are not finite"):
        compute_statistics(open_source(IMAGES), InfinitePixels())

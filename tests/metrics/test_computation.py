"""Statistics of images: computed, cached, and stored ones that are used instead."""

import numpy as np
import pytest

from edt.metrics import (
    FactoredMoments,
    Moments,
    PixelFeatures,
    Source,
    compare,
    compute_statistics,
    make_reference,
    open_source,
)
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


def test_fewer_images_than_dimensions_need_no_covariance(tmp_path):
    """64 x 64 pixels have 12,288 dimensions. A covariance of theirs takes 1.2 GB, and the Fréchet
    distance of two hours.
    """
    r = np.random.default_rng(3)
    sets = [r.integers(0, high, (6, 64, 64, 3), dtype=np.uint8) for high in (256, 200)]
    extractor = PixelFeatures()
    for _ in ("computed", "from the cache"):
        statistics = [
            compute_statistics(open_source(images, "pixels"), extractor, cache_dir=tmp_path)
            for images in sets
        ]
        assert all(isinstance(side.moments, FactoredMoments) for side in statistics)
        distance = compare(*statistics, extractor)["frechet_distance"]
        (mean1, factor1), (mean2, factor2) = (side.moments for side in statistics)
        roots = np.linalg.svd(factor1 @ factor2.T, compute_uv=False)
        variances = (factor1**2).sum() + (factor2**2).sum()
        expected = ((mean1 - mean2) ** 2).sum() + variances - 2 * roots.sum()
        assert distance == pytest.approx(expected, rel=1e-6)
    assert all(path.stat().st_size < 1e6 for path in tmp_path.iterdir())


def test_more_images_than_dimensions_have_a_covariance():
    images = np.random.default_rng(0).integers(0, 256, (20, 2, 3, 3), dtype=np.uint8)
    statistics = compute_statistics(open_source(images), PixelFeatures())
    assert isinstance(statistics.moments, Moments)


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


def without(name: str):
    """A damage that removes an array from a file of statistics."""

    def damage(path):
        with np.load(path) as arrays:
            rest = {key: arrays[key] for key in arrays if key != name}
        np.savez(path, **rest)

    return damage


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no statistics"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "flipped bits": lambda path: path.write_bytes(bytes(255 - b for b in path.read_bytes())),
    "encrypted, as one flipped bit says": lambda path: path.write_bytes(
        path.read_bytes().replace(b"PK\1\2\x2d\3\x2d\0\0", b"PK\1\2\x2d\3\x2d\0\1")
    ),
    "without features": without("features"),
    "without a mean": without("mu"),
    "of other images": lambda path: np.savez(path, IMAGES[:5]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_is_made_again(tmp_path, damage, caplog):
    extractor, source = CountingPixels(), open_source(IMAGES[:, :1, :2], "pixels")
    expected = compute_statistics(source, extractor, cache_dir=tmp_path)
    assert isinstance(expected.moments, Moments)
    (path,) = tmp_path.iterdir()
    valid = path.read_bytes()
    DAMAGES[damage](path)
    assert path.read_bytes() != valid
    statistics = compute_statistics(source, extractor, cache_dir=tmp_path)
    assert extractor.calls == 2
    assert "cached features are damaged and computed again" in caplog.text
    assert str(path) in caplog.text
    np.testing.assert_array_equal(statistics.features, expected.features)
    assert read_statistics(path).count == 20
    compute_statistics(source, extractor, cache_dir=tmp_path)
    assert extractor.calls == 2


def test_copies_and_images_of_one_colour_bring_a_warning(tmp_path, caplog):
    images = IMAGES.repeat(10, 0).copy()
    images[1::10] = IMAGES[::-1]
    images[-4:] = np.array([0, 0, 255, 70], np.uint8)[:, None, None, None]
    extractor = CountingPixels()
    for calls in (4, 4):  # the second time from the cache
        caplog.clear()
        compute_statistics(open_source(images), extractor, cache_dir=tmp_path)
        assert extractor.calls == calls
        assert "warning: 177 of the 200 images in the image array are copies" in caplog.text
        assert "warning: 4 of the 200 images in the image array have a single" in caplog.text
    caplog.clear()
    make_reference(ArrayImages(images), extractor, tmp_path / "ref.npz")
    assert "177 of the 200" in caplog.text


def test_a_few_copies_bring_no_warning(caplog):
    images = np.random.default_rng(0).integers(0, 256, (200, 2, 2, 3), dtype=np.uint8)
    images[:2] = 0
    compute_statistics(open_source(images), PixelFeatures())
    assert caplog.text == ""


def test_reference_too_small_for_precision_and_recall_is_refused(tmp_path):
    for images, kept in ((IMAGES[:3], 100), (IMAGES, 3)):
        with pytest.raises(UserError, match="reference of 3 images.*at least 4"):
            make_reference(ArrayImages(images), PixelFeatures(), tmp_path / "ref.npz", kept)


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


def test_a_folder_in_place_of_cached_features_is_refused_before_work(tmp_path):
    extractor, source = CountingPixels(), open_source(IMAGES, "pixels")
    compute_statistics(source, extractor, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    path.unlink()
    path.mkdir()
    calls = extractor.calls
    with pytest.raises(UserError, match=f"{path} is a folder, not a file"):
        compute_statistics(source, extractor, cache_dir=tmp_path)
    assert extractor.calls == calls

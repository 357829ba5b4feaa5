"""Opening, checking and measuring what is to be compared."""

import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from edt.metrics import PixelFeatures, compute_statistics, open_source
from edt.metrics.statistics import read_statistics, write_statistics
from edt.utils.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)


def read(source) -> np.ndarray:
    return np.concatenate(list(source.images.batches(7)))


def write_folder(folder, images, names=None):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03}.png")
    return folder


@pytest.fixture(params=["array", "npz", "compressed", "fortran", "folder", "run"])
def source(request, tmp_path):
    if request.param == "array":
        return open_source(IMAGES)
    if request.param == "folder":
        return open_source(write_folder(tmp_path / "images", IMAGES))
    path = tmp_path / "samples_20.npz"
    if request.param == "compressed":
        np.savez_compressed(path, IMAGES)
    else:
        np.savez(path, np.asfortranarray(IMAGES) if request.param == "fortran" else IMAGES)
    return open_source(tmp_path if request.param == "run" else path)


def test_every_kind_of_source_gives_the_same_images(source):
    assert (source.images.count, source.resolution) == (20, (8, 8))
    np.testing.assert_array_equal(read(source), IMAGES)


def test_run_folder_carries_its_recipe(tmp_path):
    np.savez(tmp_path / "samples_20.npz", IMAGES)
    (tmp_path / "recipe.json").write_text(json.dumps({"cfg_scale": 1.5}))
    assert open_source(tmp_path).recipe == {"cfg_scale": 1.5}
    assert open_source(tmp_path / "samples_20.npz").recipe == {"cfg_scale": 1.5}


def test_folder_of_class_folders_is_read_in_path_order_and_cropped(tmp_path):
    for i, name in enumerate("ba"):
        write_folder(tmp_path / name, IMAGES[i * 10 : i * 10 + 10])
    source = open_source(tmp_path, crop=lambda image: image.crop((0, 0, 4, 4)))
    np.testing.assert_array_equal(
        read(source), np.concatenate([IMAGES[10:], IMAGES[:10]])[:, :4, :4]
    )
    assert source.images.sorted_by_class


@pytest.mark.parametrize(
    "labels, in_order", [(np.arange(20) // 5, True), (np.arange(20) % 5, False)]
)
def test_labels_tell_whether_images_are_sorted_by_class(tmp_path, labels, in_order):
    np.savez(tmp_path / "a.npz", IMAGES, labels)
    assert open_source(tmp_path / "a.npz").images.sorted_by_class == in_order


REFUSED = {
    "nan": (np.full((4, 8, 8, 3), np.nan, np.float32), "NaN"),
    "signed range": (
        np.linspace(-1, 1, 768, dtype=np.float32).reshape(4, 8, 8, 3),
        r"\[-1, 1\].*127.5",
    ),
    "float dtype": (IMAGES.astype(np.float64), "float64"),
    "integer dtype": (IMAGES.astype(np.int64), "int64"),
    "objects": (np.array([None, 1]), "object"),
    "cast floats": (IMAGES // 128, r"\[0, 1\]"),
    "one image": (IMAGES[:1], "at least 2"),
    "no image": (IMAGES[:0], "at least 2"),
    "grey": (IMAGES[..., 0], "shape"),
    "channels first": (IMAGES.transpose(0, 3, 1, 2), "shape"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arrays_are_refused(tmp_path, case):
    array, message = REFUSED[case]
    np.savez(tmp_path / "a.npz", array)
    with pytest.raises(UserError, match=message) as error:
        open_source(tmp_path / "a.npz")
    assert "a.npz" in str(error.value) and "\n" not in str(error.value)


def damaged(kind: str) -> bytes:
    file = io.BytesIO()
    np.savez(file, IMAGES)
    whole = file.getvalue()
    if kind == "truncated":
        return whole[:-200]
    if kind == "flipped bit":
        return whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:]
    if kind == "header of a terabyte":
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 1000, 1000, 3)}
        )
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("arr_0.npy", header.getvalue() + b"\0" * 100)
        return file.getvalue()
    return {"empty": b"", "text": b"not an npz"}[kind]


@pytest.mark.parametrize(
    "kind", ["empty", "text", "truncated", "flipped bit", "header of a terabyte"]
)
def test_damaged_files_are_refused(tmp_path, kind):
    path = tmp_path / "a.npz"
    path.write_bytes(damaged(kind))
    with pytest.raises(UserError, match="a.npz"):
        read(open_source(path))


def test_missing_things_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no images below"):
        open_source(tmp_path)
    np.savez(tmp_path / "a.npz", images=IMAGES)
    with pytest.raises(UserError, match="no array arr_0.*images.npy"):
        open_source(tmp_path / "a.npz")
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(UserError, match="finish the sampling"):
        open_source(tmp_path)
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(UserError, match="recipe.json is not JSON"):
        open_source(tmp_path)
    (tmp_path / "recipe.json").unlink()
    (tmp_path / "samples_1.npz").touch()
    (tmp_path / "samples_2.npz").touch()
    with pytest.raises(UserError, match="2 samples_"):
        open_source(tmp_path)


def test_broken_and_odd_sized_pictures_are_named(tmp_path):
    write_folder(tmp_path, IMAGES[:3])
    Image.fromarray(IMAGES[0][:4]).save(tmp_path / "odd.png")
    with pytest.raises(UserError, match="odd.png is 8x4 pixels, others 8x8.*--image-size"):
        open_source(tmp_path)
    (tmp_path / "odd.png").write_bytes((tmp_path / "000.png").read_bytes()[:60])
    with pytest.raises(UserError, match="odd.png"):
        read(open_source(tmp_path))


def test_measured_statistics_survive_a_file(tmp_path):
    measured = compute_statistics(open_source(IMAGES), PixelFeatures(), batch_size=6)
    write_statistics(tmp_path / "s.npz", measured)
    opened = compute_statistics(open_source(tmp_path / "s.npz", "pixels"), PixelFeatures())
    flat = IMAGES.reshape(20, -1) / 255
    for statistics in (measured, opened):
        np.testing.assert_allclose(statistics.moments.mean, flat.mean(0), rtol=1e-6)
        np.testing.assert_allclose(
            statistics.moments.covariance, np.cov(flat, rowvar=False), atol=1e-7
        )
        np.testing.assert_allclose(statistics.features, flat, rtol=1e-6)
        assert (statistics.count, statistics.resolution) == (20, (8, 8))
    with pytest.raises(UserError, match="pixels features, not inception"):
        open_source(tmp_path / "s.npz", "inception")


def test_moments_in_a_file_win_over_those_of_its_images(tmp_path):
    """ADM's reference files hold the moments of the whole training set beside 10,000 of its
    images.
    """
    mean, covariance = np.zeros(192), np.eye(192)
    np.savez(tmp_path / "ref.npz", arr_0=IMAGES, mu=mean, sigma=covariance, feature_name="pixels")
    measured = compute_statistics(open_source(tmp_path / "ref.npz", "pixels"), PixelFeatures())
    np.testing.assert_array_equal(measured.moments.covariance, covariance)
    assert len(measured.features) == 20


@pytest.mark.parametrize(
    "name, value, message", [("mu", np.nan, "NaN"), ("sigma", np.inf, "infinity")]
)
def test_damaged_statistics_are_refused(tmp_path, name, value, message):
    arrays = {"mu": np.zeros(4), "sigma": np.eye(4)}
    arrays[name] = arrays[name] + value
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "s.npz")
    arrays["sigma"] = np.eye(3)
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(UserError, match="shape"):
        open_source(tmp_path / "s.npz")


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


def test_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError):
        write_statistics(
            tmp_path / "s.npz", compute_statistics(open_source(IMAGES), PixelFeatures())
        )
    assert list(tmp_path.iterdir()) == []


def test_pixel_features_refuse_large_images():
    large = np.random.default_rng(1).integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)
    with pytest.raises(UserError, match="64x64"):
        compute_statistics(open_source(large), PixelFeatures())

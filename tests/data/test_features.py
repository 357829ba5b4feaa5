"""Reading of features."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch
from extracting import extract, read_all

from edt.data.features import FeatureInfo, open_features
from edt.utils.errors import UserError


def test_packed_and_npy_hold_the_same(image_folder, tmp_path):
    extract(image_folder, tmp_path / "packed", "--shard-size", 7)
    extract(image_folder, tmp_path / "npy", "--layout", "npy")
    packed, latents, labels = read_all(tmp_path / "packed")
    npy, same_latents, same_labels = read_all(tmp_path / "npy")
    assert torch.equal(latents, same_latents)
    assert torch.equal(labels, same_labels)
    assert len(packed) == len(npy) == 40
    assert packed.latent_shape == npy.latent_shape == (3, 16, 16)
    indices = np.array([39, 0, 8, 7, 8, 21])
    for features in (packed, npy):
        batch = features[indices, np.zeros(6, int)]
        assert torch.equal(batch.stored, latents[indices])
        assert torch.equal(batch.labels, labels[indices])


def release_folder(folder, shape=(1, 4, 8, 8)):
    """12 images in the release's layout; every number of latent i is i."""
    for kind in ("imagenet_features", "imagenet_labels"):
        (folder / kind).mkdir(parents=True)
    for i in range(12):
        np.save(folder / "imagenet_features" / f"{i}.npy", np.full(shape, i, np.float32))
        np.save(folder / "imagenet_labels" / f"{i}.npy", np.array([i * 80]))
    return folder


def test_a_release_folder_without_manifest_is_read(tmp_path):
    release_folder(tmp_path)
    features, latents, labels = read_all(tmp_path)
    assert latents[:, 0, 0, 0].tolist() == list(range(12))
    assert labels.tolist() == list(range(0, 960, 80))
    assert features.latent_shape == (4, 8, 8)
    assert features.num_classes is None
    features.validate_against(image_size=256)  # unknown, so nothing to compare
    assert features.num_classes == 1000
    assert features.info().to_dict() == {"count": 12}


def test_latents_without_a_leading_dimension_are_read(tmp_path):
    release_folder(tmp_path, (4, 8, 8))
    np.save(tmp_path / "imagenet_features" / "5.npy", np.full((1, 4, 8, 8), 5, np.float16))
    np.save(tmp_path / "imagenet_labels" / "5.npy", np.float32(400))
    (tmp_path / "imagenet_features" / "._5.npy").write_bytes(b"macOS")
    features, latents, labels = read_all(tmp_path)
    assert features.latent_shape == (4, 8, 8)
    assert latents.shape == (12, 4, 8, 8)
    assert latents[:, 3, 7, 7].tolist() == list(range(12))
    assert labels.tolist() == list(range(0, 960, 80))


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        ("imagenet_labels/7.npy", np.array([np.nan]), "holds the label nan"),
        ("imagenet_labels/7.npy", np.array([np.inf]), "holds the label inf"),
        ("imagenet_labels/7.npy", np.array([1.7]), "holds the label 1.7"),
        ("imagenet_labels/7.npy", np.array(["cat"]), "holds the label 'cat'"),
        ("imagenet_labels/7.npy", np.array([3, 4]), "has shape (2,), and a label is one number"),
        ("imagenet_features/7.npy", np.zeros((1, 4, 8, 16)), "has shape (1, 4, 8, 16)"),
        ("imagenet_features/7.npy", np.zeros((1, 8, 8, 4), np.float32), "(1, 8, 8, 4)"),
        ("imagenet_features/7.npy", np.zeros((2, 4, 8, 8)), "a latent is (1, C, H, W)"),
        ("imagenet_features/7.npy", np.zeros((8, 8)), "a latent is (1, C, H, W)"),
        ("imagenet_features/7.npy", np.zeros((1, 4, 8, 8), complex), "holds complex128"),
    ],
)
def test_files_of_the_release_layout_are_checked_when_opened(file, array, message, tmp_path):
    np.save(release_folder(tmp_path) / file, array)
    with pytest.raises(UserError) as error:
        open_features(tmp_path)
    assert f"{tmp_path / file} " in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("layout", ["npy", "packed"])
def test_oblong_latents_and_negative_labels_are_refused(layout, image_folder, tmp_path):
    if layout == "npy":
        for shape in ((1, 4, 8, 16), (4, 16, 8)):
            with pytest.raises(UserError, match="are oblong"):
                open_features(release_folder(tmp_path / str(shape), shape))
        folder, place = release_folder(tmp_path / "f"), "imagenet_features/7.npy"
        np.save(folder / "imagenet_labels" / "7.npy", np.array([-1]))
    else:
        folder, place = tmp_path / "f", "shard-00001.npy, row 3"
        extract(image_folder, folder, "--shard-size", 4)
        labels = np.load(folder / "labels.npy")
        labels[7] = -1
        np.save(folder / "labels.npy", labels)
    with pytest.raises(UserError) as error:
        open_features(folder).validate_against()
    assert f"has label -1 for {place}," in str(error.value)
    opened = open_features(folder)
    opened.validate_against(num_classes=0)  # without classes, labels say nothing
    assert not opened.labels.any()


def test_the_place_of_an_image(image_folder, tmp_path):
    extract(image_folder, tmp_path / "f", "--shard-size", 16)
    places = [open_features(tmp_path / "f").locate(i) for i in (0, 15, 16, 39)]
    assert places == [
        "shard-00000.npy, row 0",
        "shard-00000.npy, row 15",
        "shard-00001.npy, row 0",
        "shard-00002.npy, row 7",
    ]
    assert open_features(release_folder(tmp_path / "g")).locate(10) == "imagenet_features/10.npy"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: os.truncate(f / "shard-00001.npy", 1000),
            "shard-00001.npy; it is missing or cut short",
        ),
        (lambda f: (f / "shard-00000.npy").unlink(), "shard-00000.npy; it is missing"),
        (
            lambda f: np.save(f / "shard-00000.npy", np.zeros((16, 3, 8, 8), np.float32)),
            "its manifest says",
        ),
        (
            lambda f: np.save(f / "labels.npy", np.zeros(39, np.int64)),
            "labels.npy holds int64 (39,)",
        ),
        (lambda f: (f / "manifest.json").unlink(), "has not finished"),
        (lambda f: (f / "manifest.json").write_text("{"), "cannot read"),
        (lambda f: (f / "manifest.json").write_text('{"shards": []}'), "was not written by"),
        (lambda f: change_manifest(f, count=41), "do not add up to 41 images"),
        (lambda f: shutil.rmtree(f), "no features in"),
    ],
)
def test_damage_is_named(damage, message, image_folder, tmp_path):
    extract(image_folder, tmp_path / "f", "--shard-size", 16)
    damage(tmp_path / "f")
    with pytest.raises(UserError) as error:
        open_features(tmp_path / "f")
    assert message in str(error.value)


def change_manifest(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


@pytest.mark.parametrize(
    ("expectation", "message"),
    [
        ({"image_size": 32}, "image_size 16, not 32; leave --image-size out"),
        ({"num_classes": 2}, "label 2, beyond --num-classes 2; give at least 3"),
    ],
)
def test_features_that_are_not_as_expected_are_refused(expectation, message, features):
    with pytest.raises(UserError) as error:
        open_features(features).validate_against(**expectation)
    assert message in str(error.value)


def test_the_number_of_classes_is_fixed(features):
    opened = open_features(features)
    opened.validate_against(image_size=16)
    assert opened.num_classes == 3
    opened.validate_against(num_classes=7)
    assert opened.num_classes == 7
    assert opened.labels.max() == 2


def test_without_classes_every_label_is_zero(features):
    opened = open_features(features)
    opened.validate_against(num_classes=0)
    assert opened.num_classes == 0
    assert not opened.labels.any()


# The record in checkpoints. Keys were added at its end; nothing else ever changed.
INFO = {
    "count": 40,
    "image_size": 16,
    "scaling_factor": 1.0,
    "classes": ["ant", "bee", "cat"],
    "draw": "once",
    "flips": "once",
    "images_sha256": "3f8260728e1becfa346202e64b25b8558d79f6e281d1989b0333378562935962",
    "extraction_seed": 0,
    "vae": "pixels",
    "vae_sha256": None,
}


def test_checkpoints_record_what_they_always_did(features):
    info = open_features(features).info()
    record = info.to_dict()
    assert FeatureInfo.from_dict(record) == info
    assert len(record.pop("content_sha256")) == 64
    assert json.dumps(record) == json.dumps(INFO)


def test_the_hash_of_the_content_is_of_values_and_labels(image_folder, features, tmp_path):
    content = open_features(features).info().content_sha256
    # No flip is drawn and nothing is random, so the seed is but recorded.
    for name, options in (("a", ()), ("b", ("--global-seed", 7)), ("c", ("--shard-size", 39))):
        extract(image_folder, tmp_path / name, "--no-flip", *options)
    infos = [open_features(tmp_path / name).info() for name in "abc"]
    assert infos[0].content_sha256 == infos[1].content_sha256
    assert infos[0].extraction_seed != infos[1].extraction_seed
    assert len({content, *(info.content_sha256 for info in infos)}) == 3
    labels = np.load(tmp_path / "a" / "labels.npy")
    np.save(tmp_path / "a" / "labels.npy", labels[::-1])
    assert open_features(tmp_path / "a").info().content_sha256 != infos[0].content_sha256
    extract(image_folder, tmp_path / "npy", "--layout", "npy")
    assert open_features(tmp_path / "npy").info().content_sha256 is None


def test_a_record_may_lack_fields_or_have_unknown_ones():
    info = FeatureInfo.from_dict({"draw": "once", "vae": "ema", "vae_sha256": "ab", "odd": 1})
    assert info == FeatureInfo(draw="once", vae="ema", vae_sha256="ab")
    assert info.to_dict() == {"draw": "once", "vae": "ema", "vae_sha256": "ab"}
    assert FeatureInfo().to_dict() == {}
    assert [field.name for field in dataclasses.fields(FeatureInfo)] == [
        *INFO,
        "vae_config_sha256",
        "shift_factor",
        "content_sha256",
    ]

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


def test_a_release_folder_without_manifest_is_read(tmp_path):
    for kind in ("imagenet_features", "imagenet_labels"):
        (tmp_path / kind).mkdir()
    for i in range(12):
        np.save(tmp_path / "imagenet_features" / f"{i}.npy", np.full((1, 4, 8, 8), i, np.float32))
        np.save(tmp_path / "imagenet_labels" / f"{i}.npy", np.array([i * 80]))
    features, latents, labels = read_all(tmp_path)
    assert latents[:, 0, 0, 0].tolist() == list(range(12))
    assert labels.tolist() == list(range(0, 960, 80))
    assert features.latent_shape == (4, 8, 8)
    assert features.num_classes is None
    features.validate_against(image_size=256)  # unknown, so nothing to compare
    assert features.num_classes == 1000
    assert features.info().to_dict() == {"count": 12}


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
        "shift_factor",
        "content_sha256",
    ]

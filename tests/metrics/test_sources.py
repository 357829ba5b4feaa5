"""Opening the two sides of a comparison."""

import json

import numpy as np
import pytest
from evaluation_helpers import write_pngs

from edt.metrics import PixelFeatures, Source, compute_statistics, open_source
from edt.metrics.images import ArrayImages, FolderImages, NpzImages
from edt.metrics.statistics import write_statistics
from edt.utils.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)


def test_array_is_opened():
    source = open_source(IMAGES)
    assert isinstance(source.images, ArrayImages)
    assert source.resolution == (8, 8)


def test_image_folder_is_opened_and_cropped(tmp_path):
    write_pngs(tmp_path, IMAGES)
    source = open_source(tmp_path, crop=lambda image: image.crop((0, 0, 4, 4)))
    assert isinstance(source.images, FolderImages)
    assert source.resolution == (4, 4)


def test_folder_of_samples_carries_its_recipe(tmp_path):
    np.savez(tmp_path / "samples_20.npz", IMAGES)
    (tmp_path / "recipe.json").write_text(json.dumps({"cfg_scale": 1.5}))
    for path in (tmp_path, tmp_path / "samples_20.npz"):
        source = open_source(path)
        assert isinstance(source.images, NpzImages)
        assert source.recipe == {"cfg_scale": 1.5}


def test_statistics_file_is_opened_for_its_own_features_only(tmp_path):
    path = tmp_path / "statistics.npz"
    write_statistics(path, compute_statistics(open_source(IMAGES), PixelFeatures()))
    source = open_source(path, "pixels")
    assert source.images is None
    assert source.statistics.count == 20
    assert source.resolution == (8, 8)
    with pytest.raises(UserError, match="pixels features, not inception"):
        open_source(path, "inception")


def test_statistics_of_other_features_are_ignored_beside_images(tmp_path):
    np.savez(tmp_path / "ref.npz", arr_0=IMAGES, mu=np.zeros(4), sigma=np.eye(4))
    assert open_source(tmp_path / "ref.npz", "inception").statistics is not None
    source = open_source(tmp_path / "ref.npz", "pixels")
    assert source.statistics is None
    assert source.images.count == 20


def test_resolution_of_moments_alone_is_unknown(tmp_path):
    np.savez(tmp_path / "moments.npz", mu=np.zeros(4), sigma=np.eye(4))
    assert open_source(tmp_path / "moments.npz").resolution is None
    assert Source("nothing").resolution is None


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        open_source(tmp_path / "nowhere")


def test_unfinished_folder_of_samples_is_refused(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"cfg_scale": 1.5}))
    with pytest.raises(UserError, match="run the same sampling command again"):
        open_source(tmp_path)


FOREIGN_RECIPES = {
    "of another program": b'{"ingredients": ["flour"]}',
    "empty": b"",
    "list": b"[1, 2]",
    "damaged": b'{"cfg_scale": 1.',
    "no text": b"\xff\xfe\0",
}


@pytest.mark.parametrize("content", FOREIGN_RECIPES.values(), ids=FOREIGN_RECIPES)
def test_foreign_recipe_is_no_obstacle(tmp_path, content):
    write_pngs(tmp_path, IMAGES)
    (tmp_path / "recipe.json").write_bytes(content)
    source = open_source(tmp_path)
    assert isinstance(source.images, FolderImages)
    np.savez(tmp_path / "samples_20.npz", IMAGES)
    for path in (tmp_path, tmp_path / "samples_20.npz"):
        source = open_source(path)
        assert isinstance(source.images, NpzImages)
        assert source.recipe is None


def test_recipe_that_is_a_folder_is_no_obstacle(tmp_path):
    write_pngs(tmp_path / "recipe.json", IMAGES)
    assert open_source(tmp_path).images.count == 20


def test_damaged_recipe_is_named(tmp_path, caplog):
    np.savez(tmp_path / "samples_20.npz", IMAGES)
    (tmp_path / "recipe.json").write_text('{"cfg_scale": 1.')
    open_source(tmp_path)
    assert f"warning: {tmp_path / 'recipe.json'} is not readable" in caplog.text


def test_folder_with_several_archives_is_refused(tmp_path):
    (tmp_path / "samples_1.npz").touch()
    (tmp_path / "samples_2.npz").touch()
    with pytest.raises(UserError, match="2 samples_"):
        open_source(tmp_path)


def test_unknown_features_are_refused():
    with pytest.raises(UserError, match="'pixles'; choose one of inception, pixels"):
        open_source(IMAGES, "pixles")

import json

import pytest

from edt.registry import create_model
from edt.sampling.config import SamplingConfig
from edt.sampling.sidecar import SIDECAR, open_sample_folder, sample_settings
from edt.utils.errors import UserError


@pytest.fixture
def settings():
    """Settings of samples with AMM, as the 50,000-image script makes them."""
    model = create_model(
        "EDT-Tiny/2", device="meta", input_size=16, in_channels=3, num_classes=3, image_size=16
    )
    model.set_amm([4])
    return sample_settings(
        SamplingConfig(cfg_scale=1.5, cfg_interval=(10, 900)),
        model.config,
        model.modulations,
        "ema",
        "0" * 64,
        "pixels",
        None,
        16,
    )


def write_recipe(folder, settings, **model):
    """A recipe.json on the disk, with these fields of its model changed."""
    folder.mkdir(exist_ok=True)
    recipe = {**settings, "model": {**settings["model"], **model}}
    (folder / SIDECAR).write_text(json.dumps(recipe))


def write_recipe_of_version_01(folder, settings, **model):
    """A recipe.json whose model has "heads" in place of num_heads, and no image_size."""
    recorded = {**settings["model"], **model}
    recorded["heads"] = recorded.pop("num_heads")
    del recorded["image_size"]
    folder.mkdir(exist_ok=True)
    (folder / SIDECAR).write_text(json.dumps({**settings, "model": recorded}))


def test_a_new_folder_records_settings_and_versions(settings, tmp_path):
    open_sample_folder(tmp_path / "samples", settings)
    recipe = json.loads((tmp_path / "samples" / SIDECAR).read_text())
    assert set(recipe.pop("versions")) == {"python", "edt", "torch", "diffusers"}
    assert recipe == json.loads(json.dumps(settings))
    assert recipe["cfg_interval"] == [10, 900]
    assert recipe["amm"]["blocks"] == [4]


def test_the_same_settings_are_accepted_and_the_recipe_stays(settings, tmp_path):
    open_sample_folder(tmp_path, settings)
    before = (tmp_path / SIDECAR).read_bytes()
    open_sample_folder(tmp_path, settings)
    assert (tmp_path / SIDECAR).read_bytes() == before


@pytest.mark.parametrize(
    ("field", "value"), [("seed", 7), ("cfg_scale", 4.0), ("weights_sha256", "1" * 64)]
)
def test_other_settings_are_refused_by_name(settings, tmp_path, field, value):
    open_sample_folder(tmp_path, settings)
    with pytest.raises(UserError, match=f"{field}.*--output-dir"):
        open_sample_folder(tmp_path, {**settings, field: value})


def test_the_same_hashes_under_other_names_are_accepted(settings, tmp_path):
    """A VAE that was moved, and weights that an earlier version recorded by what was asked for."""
    settings |= {"vae": "/old/vae", "vae_sha256": "2" * 64}
    open_sample_folder(tmp_path, settings)
    open_sample_folder(tmp_path, {**settings, "vae": "/new/vae", "weights": "model"})
    with pytest.raises(UserError, match="vae: /old/vae -> pixels, vae_sha256: 2.* -> None"):
        open_sample_folder(tmp_path, {**settings, "vae": "pixels", "vae_sha256": None})
    open_sample_folder(tmp_path, {**settings, "vae_config_sha256": "3" * 64})  # not recorded


def test_a_recipe_of_version_01_is_accepted(settings, tmp_path):
    write_recipe_of_version_01(tmp_path, settings)
    open_sample_folder(tmp_path, settings)


@pytest.mark.parametrize("write", [write_recipe, write_recipe_of_version_01])
@pytest.mark.parametrize("field", ["depths", "num_heads"])
def test_another_model_is_refused(settings, tmp_path, write, field):
    values = list(settings["model"][field])
    write(tmp_path, settings, **{field: [values[0] + 1, *values[1:]]})
    with pytest.raises(UserError, match="model"):
        open_sample_folder(tmp_path, settings)

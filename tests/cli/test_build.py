"""The VAE of a model or of features: hashes decide which one it is, not paths."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TRAIN, fails, save_tiny_vae
from PIL import Image
from safetensors.torch import load_file, save_file

import extract_features
import image_generator_ddp
import train_mask_adan
from edt.cli.build import load_for_sampling, load_vae_for_training
from edt.data.features import open_features
from edt.utils.errors import UserError

CPU = torch.device("cpu")


def extract_latents(images: Path, folder: Path, vae: Path, *more: object) -> None:
    argv = ["--data-path", images, "--features-path", folder, "--vae", vae, "--image-size", 64]
    argv += ["--num-workers", 0, *more]
    assert extract_features.main([str(part) for part in argv]) == 0


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    """A tiny VAE. Tests copy it, so that each has a path and the weights of its own."""
    folder = tmp_path_factory.mktemp("vae")
    save_tiny_vae(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(4):
        path = folder / ("ant", "bee")[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def latents(images, vae, tmp_path_factory) -> Path:
    """Features of a VAE whose folder is gone."""
    folder = tmp_path_factory.mktemp("latents")
    gone = shutil.copytree(vae, folder / "gone")
    extract_latents(images, folder / "features", gone, "--no-flip")
    shutil.rmtree(gone)
    return folder / "features"


def train(features: Path, run: Path, steps: int, *more: object) -> list[str]:
    argv = [*TRAIN, "--feature-path", features, "--run-dir", run, "--max-steps", steps, *more]
    return [str(part) for part in argv]


def saved_features(run: Path, step: int) -> dict:
    file = run / "checkpoints" / f"{step:07d}" / "config.json"
    return json.loads(file.read_text())["features"]


@pytest.fixture(scope="module")
def run_of_latents(latents, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run") / "run"
    assert train_mask_adan.main(train(latents, run, 1)) == 0
    return run


def other_vae(vae: Path, folder: Path, **config: object) -> Path:
    """A copy with other weights of the decoder, and with these changes of its configuration."""
    shutil.copytree(vae, folder)
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    weights["decoder.conv_out.bias"] += 0.5
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **config}))
    return folder


# ---------------------------------------------------------------------------------------------
# Training


def test_a_moved_vae_is_that_of_the_features(latents, vae, tmp_path):
    run = tmp_path / "run"
    assert train_mask_adan.main(train(latents, run, 1, "--vae", vae, "--sample-every", 99)) == 0
    features = saved_features(run, 1)
    assert features["vae"] == str(vae)
    assert len(features["vae_sha256"]) == 64
    assert load(run).vae_name == str(vae)


def test_another_vae_is_refused_before_the_run_starts(latents, vae, tmp_path, capsys):
    other = other_vae(vae, tmp_path / "other")
    gone = json.loads((latents / "manifest.json").read_text())["vae"]["id"]
    for argv, message in (
        (["--vae", other], f"have vae {gone}, not {other}; leave --vae out"),
        (["--vae", "pixels"], f"have vae {gone}, not pixels; leave --vae out"),
        (["--sample-every", 1], f"cannot load the VAE {gone} (there is no such folder"),
    ):
        command = train(latents, tmp_path / "run", 1, *argv)
        assert message in fails(train_mask_adan.main, command, capsys)
    assert not (tmp_path / "run").exists()


def test_another_vae_under_the_same_path_is_refused(images, vae, tmp_path):
    folder = shutil.copytree(vae, tmp_path / "vae")
    extract_latents(images, tmp_path / "features", folder)
    features = open_features(tmp_path / "features")
    assert load_vae_for_training(str(folder), features, is_needed=False, device=CPU) is None
    assert load_vae_for_training(None, features, is_needed=True, device=CPU) is not None
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "norm_num_groups": 2}))
    with pytest.raises(UserError, match=f"not what is now {folder}"):
        load_vae_for_training(str(folder), features, is_needed=True, device=CPU)
    manifest = json.loads((features.path / "manifest.json").read_text())
    del manifest["vae"]["config_sha256"]  # earlier versions wrote none
    (features.path / "manifest.json").write_text(json.dumps(manifest))
    old = open_features(features.path)
    assert load_vae_for_training(str(folder), old, is_needed=True, device=CPU) is not None
    shutil.rmtree(folder)
    other_vae(vae, folder)
    for name, remedy in ((str(folder), "leave --vae out"), (None, "leave --sample-every out")):
        with pytest.raises(UserError, match=f"not what is now {folder}; .*{remedy}"):
            load_vae_for_training(name, features, is_needed=True, device=CPU)


def test_features_that_say_nothing_take_the_vae_that_is_given(vae, features, tmp_path):
    for name, shape in (("imagenet_features", (1, 4, 8, 8)), ("imagenet_labels", (1,))):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "0.npy", np.zeros(shape))
    opened = open_features(tmp_path)
    loaded = load_vae_for_training(str(vae), opened, is_needed=True, device=CPU)
    assert loaded is not None
    assert loaded.channels == 4
    with pytest.raises(UserError, match="pixels has 3 latent channels, the features in .* have 4"):
        load_vae_for_training("pixels", opened, is_needed=True, device=CPU)
    pixels = open_features(features)
    assert load_vae_for_training("pixels", pixels, is_needed=False, device=CPU) is None
    with pytest.raises(UserError, match="have vae pixels, not ema; leave --vae out"):
        load_vae_for_training("ema", pixels, is_needed=False, device=CPU)


def test_a_run_continues_with_features_of_the_same_bytes(
    run_of_latents, images, vae, latents, tmp_path, capsys
):
    """The VAE has another path, and an image another name."""
    run = shutil.copytree(run_of_latents, tmp_path / "run")
    renamed = shutil.copytree(images, tmp_path / "images")
    (renamed / "ant" / "0.png").rename(renamed / "ant" / "00.png")
    extract_latents(renamed, tmp_path / "same", vae, "--no-flip")
    assert train_mask_adan.main(train(tmp_path / "same", run, 2)) == 0
    before, after = (open_features(path).info() for path in (latents, tmp_path / "same"))
    assert before.images_sha256 != after.images_sha256
    assert before.content_sha256 == after.content_sha256
    assert saved_features(run, 2)["images_sha256"] == after.images_sha256

    shard = tmp_path / "same" / "shard-00000.npy"
    np.save(shard, np.load(shard) + 1)
    manifest = json.loads((tmp_path / "same" / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = "0" * 64
    (tmp_path / "same" / "manifest.json").write_text(json.dumps(manifest))
    argv = train(tmp_path / "same", run, 3)
    assert "different settings (content_sha256" in fails(train_mask_adan.main, argv, capsys)


def test_a_run_without_hashes_of_its_content_compares_the_rest(
    run_of_latents, latents, tmp_path, capsys
):
    run = shutil.copytree(run_of_latents, tmp_path / "run")
    file = run / "checkpoints" / "0000001" / "config.json"
    config = json.loads(file.read_text())
    del config["features"]["content_sha256"]
    file.write_text(json.dumps(config))
    (file.parent / "manifest.json").write_text("{}")
    shifted = shutil.copytree(latents, tmp_path / "shifted")
    manifest = json.loads((shifted / "manifest.json").read_text())
    manifest["vae"]["shift_factor"] = 0.5
    (shifted / "manifest.json").write_text(json.dumps(manifest))
    message = fails(train_mask_adan.main, train(shifted, run, 2), capsys)
    assert "different settings (shift_factor: None -> 0.5)" in message
    assert train_mask_adan.main(train(latents, run, 2)) == 0


# ---------------------------------------------------------------------------------------------
# Sampling


def load(checkpoint: Path, *more: object):
    argv = ["--ckpt", checkpoint, *more]
    args = image_generator_ddp.parser().parse_args([str(part) for part in argv])
    return load_for_sampling(args, CPU)


def test_a_moved_vae_samples_into_the_same_folder(run_of_latents, vae, tmp_path, capsys):
    for folder in ("a", "b"):
        moved = shutil.copytree(vae, tmp_path / folder / "vae")
        argv = ["--ckpt", run_of_latents, "--vae", moved, "--output-dir", tmp_path / "out"]
        argv += ["--num-sampling-steps", 2, "--num-images", 2]
        assert image_generator_ddp.main([str(part) for part in argv]) == 0
    first, second = capsys.readouterr().out.split()
    assert first == second


@pytest.mark.parametrize(("asked", "read"), [("model", "ema"), ("ema", "model")])
def test_the_recipe_names_the_weights_that_were_read(asked, read, run_folder, tmp_path, capsys):
    checkpoint = run_folder / "checkpoints" / "0000002"
    argv = ["--ckpt", checkpoint / f"{read}.safetensors", "--weights", asked]
    argv += ["--output-dir", tmp_path, "--num-sampling-steps", 2, "--num-images", 1]
    assert image_generator_ddp.main([str(part) for part in argv]) == 0
    recipe = json.loads((Path(capsys.readouterr().out.strip()).parent / "recipe.json").read_text())
    assert recipe["weights"] == read
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    assert recipe["weights_sha256"] == manifest[f"{read}.safetensors"][1]


def test_another_vae_is_a_warning_if_it_was_chosen(run_of_latents, vae, tmp_path, caplog):
    load(run_of_latents, "--vae", vae)
    other = other_vae(vae, tmp_path / "other")
    assert caplog.text == ""
    load(run_of_latents, "--vae", other)
    assert f"the VAE {other} is not the one that the model's features were made with" in caplog.text
    scaled = other_vae(vae, tmp_path / "scaled", scaling_factor=0.13025)
    with pytest.raises(UserError, match=f"{scaled} scales its latents by 0.13025 .* by 0.18215"):
        load(run_of_latents, "--vae", scaled)
    with pytest.raises(UserError, match="pixels has 3 latent channels, the model has 4"):
        load(run_of_latents, "--vae", "pixels")


def test_other_weights_under_the_recorded_path_are_refused(run_of_latents, vae, tmp_path):
    checkpoint = shutil.copytree(run_of_latents / "checkpoints" / "0000001", tmp_path / "copy")
    config = json.loads((checkpoint / "config.json").read_text())
    config["features"]["vae"] = str(other_vae(vae, tmp_path / "other"))
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="the weights of the VAE .*other are not those"):
        load(checkpoint)
    load(checkpoint, "--vae", tmp_path / "other")


def test_latents_are_scaled_as_those_that_the_model_was_trained_on(run_of_latents, vae, tmp_path):
    """Features of a version that did not know shifts have none, whatever the VAE now says."""
    shifted = shutil.copytree(vae, tmp_path / "vae")
    config = json.loads((shifted / "config.json").read_text())
    (shifted / "config.json").write_text(json.dumps({**config, "shift_factor": 0.5}))
    loaded = load(run_of_latents, "--vae", shifted)
    assert (loaded.vae.scaling_factor, loaded.vae.shift_factor) == (0.18215, 0.0)
    checkpoint = shutil.copytree(run_of_latents / "checkpoints" / "0000001", tmp_path / "copy")
    recorded = json.loads((checkpoint / "config.json").read_text())
    recorded["features"]["shift_factor"] = 0.5
    (checkpoint / "config.json").write_text(json.dumps(recorded))
    assert load(checkpoint, "--vae", shifted).vae.shift_factor == 0.5

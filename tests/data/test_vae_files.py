"""Broken and foreign VAEs are refused when they are loaded, in one line."""

import json
import math
import os
import shutil
import socket

import huggingface_hub
import pytest
import torch
from conftest import fails
from extracting import save_tiny_vae
from safetensors.torch import load_file, save_file

import extract_features
from edt.data.vae import load_vae
from edt.utils.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    save_tiny_vae(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(whole, tmp_path / "vae")


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def change_weights(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: change_weights(f, lambda w: w.pop("decoder.conv_in.bias")),
            "(1 tensors are missing, such as decoder.conv_in.bias)",
        ),
        (
            lambda f: change_weights(
                f, lambda w: w.update({"decoder.conv_in.bias": torch.zeros(3)})
            ),
            "decoder.conv_in.bias expected shape",
        ),
        (lambda f: (f / WEIGHTS).unlink(), "diffusion_pytorch_model"),
        (lambda f: (f / WEIGHTS).write_text("<html>"), f"{WEIGHTS} is an HTML page"),
        (
            lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"),
            f"{WEIGHTS} is a Git LFS pointer",
        ),
        (
            lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:5000]),
            f"{WEIGHTS} is cut short after 5000 bytes",
        ),
        (lambda f: (f / "config.json").unlink(), "(config.json is missing)"),
        (lambda f: (f / "config.json").write_text("{"), "not a valid JSON file"),
        (
            lambda f: change_config(f, scaling_factor=None),
            "scaling_factor in its config.json is nu",
        ),
        (lambda f: change_config(f, scaling_factor=0), "scaling_factor in its config.json is 0)"),
        (lambda f: change_config(f, scaling_factor=float("nan")), "config.json is NaN)"),
        (lambda f: change_config(f, shift_factor="a"), 'shift_factor in its config.json is "a")'),
        (lambda f: change_config(f, latents_mean=[0.0] * 4), "latents_mean are not supported"),
        (
            lambda f: change_config(f, use_quant_conv=False),
            "no place for 2 tensors, such as quant_conv.bias, quant_conv.weight)",
        ),
        (
            lambda f: change_config(f, mid_block_add_attention=False),
            "its config.json has no place for",
        ),
        (lambda f: change_config(f, act_fn=None), "cannot load the VAE"),
        (lambda f: change_config(f, norm_num_groups=0), "cannot load the VAE"),
        (
            lambda f: change_weights(f, lambda w: w["decoder.conv_in.bias"].fill_(math.nan)),
            f"{WEIGHTS}: decoder.conv_in.bias holds NaN or infinity",
        ),
        (
            lambda f: change_weights(
                f, lambda w: w.update({"decoder.conv_in.bias": w["decoder.conv_in.bias"].int()})
            ),
            f"{WEIGHTS}: decoder.conv_in.bias is torch.int32; quantized weights are not supported",
        ),
        (lambda f: change_config(f, _class_name="VQModel"), "(it is a VQModel)"),
    ],
)
def test_a_broken_vae_is_refused_before_work(damage, message, folder, image_folder, capsys):
    damage(folder)
    argv = ["--data-path", image_folder, "--features-path", folder / "out", "--vae", folder]
    assert message in fails(extract_features.main, [*argv, "--image-size", 64], capsys)
    assert not (folder / "out").exists()


def test_the_file_that_is_not_read_does_not_matter(folder, whole):
    """A clone whose .bin files were left on the server holds pointers to them."""
    (folder / "diffusion_pytorch_model.bin").write_text("version https://git-lfs.github.com/s\n")
    assert load_vae(str(folder)).sha256 == load_vae(str(whole)).sha256
    change_config(folder, latent_channels=16)
    with pytest.raises(UserError, match="expected shape"):
        load_vae(str(folder))


def test_a_pipeline_lends_its_vae(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    assert load_vae(str(tmp_path / "pipeline")).sha256 == load_vae(str(whole)).sha256
    change_config(tmp_path / "pipeline" / "vae", scaling_factor=None)
    with pytest.raises(UserError, match="scaling_factor"):
        load_vae(str(tmp_path / "pipeline"))


def test_a_file_and_an_absent_folder_are_named(whole, tmp_path):
    for name, message in (
        (str(whole / WEIGHTS), "it is a file"),
        (str(tmp_path / "absent"), "there is no such folder"),
        ("../absent", "there is no such folder"),
        ("absent", "there is no such folder"),
    ):
        with pytest.raises(UserError, match=f"cannot load the VAE {name} .{message}"):
            load_vae(name)


@pytest.fixture
def closed(tmp_path, monkeypatch):
    """A machine without a network, and with an empty cache; the address that does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
    # The variables HF_HUB_OFFLINE, HF_ENDPOINT and HF_HUB_CACHE are read when the module is loaded.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return address


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_network_one_line_says_what_to_do(
    offline, closed, image_folder, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    argv = ["--data-path", str(image_folder), "--features-path", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as error:
        extract_features.main([*argv, "--image-size", "64"])
    assert error.value.code == 2
    text = capfd.readouterr().err
    assert "Retrying" not in text
    message = text.splitlines()[-1]
    reason = "HF_HUB_OFFLINE is set" if offline else f"no network: {closed} cannot be reached"
    assert "cannot load the VAE stabilityai/sd-vae-ft-ema" in message
    assert reason in message
    assert "put a clone of it into the working directory" in message
    assert not (tmp_path / "out").exists()


def test_without_a_network_the_cache_is_used(closed, whole, tmp_path, capfd):
    """A pipeline's VAE; the cache of the hub keeps a folder for each commit."""
    repository = tmp_path / "cache" / "models--some--pipeline"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(whole, repository / "snapshots" / ("a" * 40) / "vae")
    assert load_vae("some/pipeline").sha256 == load_vae(str(whole)).sha256
    assert "Retrying" not in capfd.readouterr().err
    (repository / "snapshots" / ("a" * 40) / "vae" / WEIGHTS).unlink()
    with pytest.raises(UserError, match="no network"):
        load_vae("some/pipeline")


@pytest.mark.parametrize("name", ["torch_file", "hub"])
def test_tensors_are_checked_wherever_the_vae_comes_from(name, closed, whole, tmp_path):
    """In a .bin file, and in the cache of the hub."""
    folder = tmp_path / "vae"
    if name == "hub":
        repository = tmp_path / "cache" / "models--some--vae"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("a" * 40)
        folder = repository / "snapshots" / ("a" * 40)
    shutil.copytree(whole, folder)
    weights = load_file(folder / WEIGHTS)
    weights["encoder.conv_in.bias"] = weights["encoder.conv_in.bias"].int()
    (folder / WEIGHTS).unlink()
    torch.save(weights, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="encoder.conv_in.bias is torch.int32"):
        load_vae("some/vae" if name == "hub" else str(folder))


def test_a_vae_in_a_path_that_is_not_utf8_is_refused(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / os.fsdecode(b"caf\xe9"))
    with pytest.raises(UserError, match="is not UTF-8"):
        load_vae(str(folder))


def test_an_address_of_the_hub_without_a_scheme_is_named(closed, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "hub.example.org")
    with pytest.raises(UserError, match="HF_ENDPOINT is hub.example.org; write https:// before"):
        load_vae("some/vae")

import json
import shutil

import golden_rule
import pytest
import torch
from extracting import save_tiny_vae

from edt.data.vae import PixelVAE, latent_shape, load_vae, to_uint8, vae_source
from edt.utils.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    save_tiny_vae(folder)
    return folder


@pytest.fixture(scope="module")
def vae(folder):
    return load_vae(str(folder))


@pytest.fixture(scope="module")
def images():
    return golden_rule.normal(0, 2, 3, 32, 32).clamp(-1, 1)


def test_bytes_are_adms():
    x = torch.tensor([-2.0, -1.0, -0.9999, 0.0, 0.5, 1.0, 3.0]).view(1, 1, 1, -1).expand(1, 3, 1, 7)
    assert to_uint8(x)[0, 0, :, 0].tolist() == [0, 0, 0, 128, 191, 255, 255]


def test_missing_vae_is_named(tmp_path):
    with pytest.raises(UserError, match="--vae"):
        load_vae(str(tmp_path / "absent"))


def test_a_clone_in_the_working_directory_comes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert vae_source("ema") == "stabilityai/sd-vae-ft-ema"
    (tmp_path / "sd-vae-ft-ema").mkdir()
    assert vae_source("ema") == "sd-vae-ft-ema"
    assert vae_source("mse") == "stabilityai/sd-vae-ft-mse"
    assert vae_source("./folder") == "./folder"


def test_pixels_are_their_own_latents(images):
    mean, deviation = PixelVAE().encode(images)
    assert torch.equal(mean, images)
    assert torch.equal(deviation, torch.zeros_like(images))
    assert torch.equal(PixelVAE().decode(mean), images)


def test_shape_of_latents(vae):
    assert latent_shape(vae, 256) == (4, 32, 32)
    assert latent_shape(PixelVAE(), 30) == (3, 30, 30)
    for size in (0, 12):
        with pytest.raises(UserError, match="a multiple of 8"):
            latent_shape(vae, size)


def test_latents_are_those_of_the_autoencoder_scaled(vae, images):
    assert (vae.channels, vae.downsampling, vae.scaling_factor) == (4, 8, 0.18215)
    posterior = vae.autoencoder.encode(images).latent_dist
    latents, deviation = vae.encode(images)
    torch.testing.assert_close(latents, 0.18215 * posterior.mean)
    torch.testing.assert_close(deviation, 0.18215 * posterior.std)
    torch.testing.assert_close(
        vae.decode(latents), vae.autoencoder.decode(latents / 0.18215).sample
    )


def test_a_shift_is_taken_off_before_scaling_and_put_back(vae, folder, images, tmp_path):
    """As diffusers' pipelines do for the VAEs of Stable Diffusion 3 and Flux."""
    shutil.copytree(folder, tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    config |= {"shift_factor": 0.0609, "scaling_factor": 1.5305}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    shifted = load_vae(str(tmp_path / "vae"))
    assert (shifted.scaling_factor, shifted.shift_factor) == (1.5305, 0.0609)
    assert vae.shift_factor == PixelVAE().shift_factor == 0
    posterior = vae.autoencoder.encode(images).latent_dist
    latents, deviation = shifted.encode(images)
    torch.testing.assert_close(latents, (posterior.mean - 0.0609) * 1.5305)
    torch.testing.assert_close(deviation, posterior.std * 1.5305)
    torch.testing.assert_close(
        shifted.decode(latents), vae.autoencoder.decode(posterior.mean).sample
    )


def test_more_images_than_are_decoded_at_once(vae, images):
    latents, _ = vae.encode(images)
    many = latents.repeat(20, 1, 1, 1)
    torch.testing.assert_close(vae.decode(many)[-2:], vae.decode(latents))


def test_the_hash_is_of_the_weights_not_of_the_files(vae, folder, tmp_path):
    from diffusers import AutoencoderKL

    assert len(vae.sha256) == 64
    autoencoder = AutoencoderKL.from_pretrained(folder)
    autoencoder.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert load_vae(str(tmp_path / "bin")).sha256 == vae.sha256
    with torch.no_grad():
        autoencoder.decoder.conv_out.bias[0] += 1
    autoencoder.save_pretrained(tmp_path / "changed")
    assert load_vae(str(tmp_path / "changed")).sha256 != vae.sha256


def test_the_second_hash_is_of_how_the_weights_are_used(vae, folder, tmp_path):
    changed = shutil.copytree(folder, tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    assert load_vae("pixels").config_sha256 is None
    for name, value, is_same in (
        ("norm_num_groups", config["norm_num_groups"] // 2, False),
        ("act_fn", "relu", False),
        ("scaling_factor", 0.5, True),
        ("force_upcast", False, True),
    ):
        (changed / "config.json").write_text(json.dumps({**config, name: value}))
        other = load_vae(str(changed))
        assert other.sha256 == vae.sha256
        assert (other.config_sha256 == vae.config_sha256) is is_same, name


def test_bfloat16_decodes_nearly_the_same(vae, folder, images):
    latents, _ = vae.encode(images)
    rounded = load_vae(str(folder), dtype=torch.bfloat16)
    expected, decoded = vae.decode(latents), rounded.decode(latents)
    assert rounded.sha256 == vae.sha256
    assert decoded.dtype == torch.float32
    assert not torch.equal(decoded, expected)
    assert (decoded - expected).norm() < 0.05 * expected.norm()

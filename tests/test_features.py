"""Extraction and reading of features, in process; the processes are in test_scripts.py."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from PIL import Image

import extract_features
from edt.data.features import open_features, sample_posterior
from edt.utils.errors import UserError

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A tiny VAE of the SD-VAE's form, eight pixels to one."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def large_images(image_folder, tmp_path_factory):
    """Those images, 64 x 64: the smallest that both the VAE and EDT take."""
    folder = tmp_path_factory.mktemp("large")
    for file in image_folder.rglob("*.png"):
        path = folder / file.relative_to(image_folder)
        path.parent.mkdir(exist_ok=True)
        Image.open(file).resize((64, 64)).save(path)
    return folder


def argv(images, out, *more, vae="pixels"):
    size = 16 if vae == "pixels" else 64
    return [
        str(part)
        for part in (
            "--data-path",
            images,
            "--features-path",
            out,
            "--vae",
            vae,
            "--image-size",
            size,
            "--num-workers",
            0,
            *more,
        )
    ]


def extract(*arguments, **options):
    assert extract_features.main(argv(*arguments, **options)) == 0


def read_all(folder, flips=None):
    features = open_features(folder)
    flips = np.zeros(len(features), int) if flips is None else flips
    return features, *features[np.arange(len(features)), flips]


def data_files(folder):
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix in (".npy", ".json")
    }


def test_packed_and_npy_hold_the_same(image_folder, tmp_path):
    extract(image_folder, tmp_path / "packed", "--shard-size", 7)
    extract(image_folder, tmp_path / "npy", "--layout", "npy")
    packed, latents, labels = read_all(tmp_path / "packed")
    npy, same_latents, same_labels = read_all(tmp_path / "npy")
    assert torch.equal(latents, same_latents) and torch.equal(labels, same_labels)
    assert len(packed) == len(npy) == 40 and packed.latent_shape == npy.latent_shape == (3, 16, 16)
    indices = np.array([39, 0, 8, 7, 8, 21])
    assert torch.equal(packed[indices, np.zeros(6, int)][0], latents[indices])
    files = sorted(image_folder.rglob("*.png"), key=lambda path: (path.parent.name, path.name))
    for latent, label, file in zip(latents, labels, files, strict=True):
        expected = (
            torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1) / 255 * 2 - 1
        )
        assert torch.equal(latent, expected) or torch.equal(latent, expected.flip(-1))
        assert ("ant", "bee", "cat")[label] == file.parent.name
    manifest = json.loads((tmp_path / "packed" / "manifest.json").read_text())
    assert [shard["count"] for shard in manifest["shards"]] == [7, 7, 7, 7, 7, 5]
    assert (
        manifest["classes"] == ["ant", "bee", "cat"]
        and manifest["vae"]["id"] == "pixels"
        and manifest["flips"] == "once"
    )


def test_a_release_folder_without_manifest_is_read(tmp_path):
    for kind in ("imagenet_features", "imagenet_labels"):
        (tmp_path / kind).mkdir()
    for i in range(12):
        np.save(tmp_path / "imagenet_features" / f"{i}.npy", np.full((1, 4, 8, 8), i, np.float32))
        np.save(tmp_path / "imagenet_labels" / f"{i}.npy", np.array([i * 80]))
    features, latents, labels = read_all(tmp_path)
    assert latents[:, 0, 0, 0].tolist() == list(range(12)) and labels.tolist() == list(
        range(0, 960, 80)
    )
    features.settle()
    assert features.num_classes == 1000 and features.latent_shape == (4, 8, 8)


@torch.no_grad()
def test_fresh_features_hold_the_posterior_of_both_orientations(large_images, vae, tmp_path):
    extract(large_images, tmp_path / "once", "--no-flip", vae=vae)
    extract(large_images, tmp_path / "fresh", "--draw", "fresh", vae=vae)
    fresh, plain, labels = read_all(tmp_path / "fresh")
    _, mirrored, _ = read_all(tmp_path / "fresh", np.ones(40, int))
    assert fresh.fresh and plain.shape == (40, 8, 8, 8) and fresh.latent_shape == (4, 8, 8)
    from edt.data.vae import load_vae

    files = sorted(large_images.rglob("*.png"), key=lambda path: (path.parent.name, path.name))
    images = torch.stack(
        [
            torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1) / 255 * 2 - 1
            for file in files
        ]
    )
    for stored, turned in ((plain, images), (mirrored, images.flip(-1))):
        torch.testing.assert_close(
            stored, torch.cat(load_vae(str(vae)).encode(turned), dim=1), rtol=2e-3, atol=2e-4
        )
    _, once, _ = read_all(tmp_path / "once")
    noise = (once - plain[:, :4]) / plain[
        :, 4:
    ]  # what the frozen draw was made with is standard normal
    assert abs(noise.mean()) < 0.15 and noise.std() == pytest.approx(1, abs=0.12)
    torch.testing.assert_close(sample_posterior(plain, noise), once, rtol=1e-3, atol=1e-3)
    with pytest.raises(SystemExit):
        extract_features.main(
            argv(large_images, tmp_path / "x", "--draw", "fresh", "--layout", "npy")
        )
    extract(large_images, tmp_path / "one-way", "--draw", "fresh", "--no-flip", vae=vae)
    assert torch.equal(read_all(tmp_path / "one-way", np.ones(40, int))[1], plain)


def test_two_processes_of_another_batch_size_and_a_kill_make_the_same_files(
    large_images, vae, tmp_path
):
    common = ("--shard-size", 3)
    extract(large_images, tmp_path / "whole", *common, "--batch-size", 32, vae=vae)
    command = [
        *TORCHRUN,
        "extract_features.py",
        *argv(large_images, tmp_path / "parts", *common, "--batch-size", 5, vae=vae),
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "parts").glob("shard-*.npy")) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    survivors = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("shard-*.npy")}
    assert survivors
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    assert all(
        path.stat().st_mtime_ns == written for path, written in survivors.items()
    )  # only what was missing
    _, expected, labels = read_all(tmp_path / "whole")
    _, found, same_labels = read_all(tmp_path / "parts")
    assert torch.equal(labels, same_labels)
    torch.testing.assert_close(
        found, expected, rtol=1e-5, atol=1e-5
    )  # the VAE's sums depend on the batch
    assert not [path for path in (tmp_path / "parts").iterdir() if path.suffix == ".tmp"]


def test_running_again_mends_what_is_damaged_and_nothing_else(image_folder, tmp_path):
    extract(image_folder, tmp_path / "f", "--shard-size", 16)
    before = data_files(tmp_path / "f")
    content = bytearray(before["shard-00001.npy"])
    content[-5] ^= 1
    (tmp_path / "f" / "shard-00001.npy").write_bytes(content)
    (tmp_path / "f" / "shard-00002.npy").unlink()
    kept = (tmp_path / "f" / "shard-00000.npy").stat().st_mtime_ns
    extract(image_folder, tmp_path / "f", "--shard-size", 16)
    assert data_files(tmp_path / "f") == before
    assert (tmp_path / "f" / "shard-00000.npy").stat().st_mtime_ns == kept


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
        (lambda f: shutil.rmtree(f), "no features in"),
    ],
)
def test_damage_is_named(damage, message, image_folder, tmp_path):
    extract(image_folder, tmp_path / "f", "--shard-size", 16)
    damage(tmp_path / "f")
    with pytest.raises(UserError) as error:
        open_features(tmp_path / "f")
    assert message in str(error.value)


def test_features_made_otherwise_are_refused(image_folder, tmp_path, capsys):
    extract(image_folder, tmp_path / "f")
    for more in (("--no-flip",), ("--global-seed", 3), ("--draw", "fresh")):
        with pytest.raises(SystemExit) as error:
            extract_features.main(argv(image_folder, tmp_path / "f", *more))
        assert error.value.code == 2 and "was made otherwise" in capsys.readouterr().err
    features = open_features(tmp_path / "f")
    for wrong in ({"image_size": 32}, {"vae": "ema"}, {"num_classes": 2}):
        with pytest.raises(UserError):
            features.settle(**wrong)
    features.settle(image_size=16, vae="pixels", num_classes=3)
    assert features.num_classes == 3

"""Extraction in one process and in several; the launchers are in the tests of the scripts."""

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HUGE_PNG, ROOT, fails, run_script
from extracting import arguments, extract, read_all, save_tiny_vae
from PIL import Image
from safetensors.torch import load_file, save_file

import extract_features
from edt.data.extraction import Extraction, ExtractionConfig
from edt.data.features import sample_posterior
from edt.data.images import CroppedImages
from edt.data.vae import PixelVAE, load_vae
from edt.utils.errors import UserError
from edt.utils.files import read_json

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")

# extraction.json as earlier versions wrote it for the images of the fixture.
SETTINGS = {
    "version": 1,
    "count": 40,
    "shape": [3, 16, 16],
    "dtype": "float32",
    "flips": "once",
    "scaling_factor": 1.0,
    "crop": "center",
    "vae": {"id": "pixels", "sha256": None},
    "classes": ["ant", "bee", "cat"],
    "images_sha256": "3f8260728e1becfa346202e64b25b8558d79f6e281d1989b0333378562935962",
    "image_size": 16,
    "seed": 0,
    "draw": "once",
    "flip": True,
    "layout": "packed",
    "shard_size": 8192,
}


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """The folder of a tiny VAE."""
    folder = tmp_path_factory.mktemp("vae")
    save_tiny_vae(folder)
    return folder


@pytest.fixture(scope="module")
def large_images(image_folder, tmp_path_factory):
    """The images scaled to 64 x 64, the smallest size that both the tiny VAE and EDT take."""
    folder = tmp_path_factory.mktemp("large")
    for file in image_folder.rglob("*.png"):
        path = folder / file.relative_to(image_folder)
        path.parent.mkdir(exist_ok=True)
        Image.open(file).resize((64, 64)).save(path)
    return folder


def sorted_images(folder):
    """The files in the order of an ImageFolder, and their pixels (count, 3, S, S) in [-1, 1]."""
    files = sorted(folder.rglob("*.png"), key=lambda path: (path.parent.name, path.name))
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    return files, torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 * 2 - 1


def data_files(folder):
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix in (".npy", ".json")
    }


def test_features_are_the_images_or_their_mirror_images(image_folder, tmp_path):
    extract(image_folder, tmp_path)
    _, latents, labels = read_all(tmp_path)
    files, images = sorted_images(image_folder)
    mirrored = []
    for i, (latent, image) in enumerate(zip(latents, images, strict=True)):
        if not torch.equal(latent, image):
            assert torch.equal(latent, image.flip(-1))
            mirrored.append(i)
    # An extraction that an earlier version began is continued with the same flips.
    assert mirrored == [0, 3, 4, 7, 8, 12, 17, 19, 20, 21, 23, 25, 35, 37, 39]
    names = [("ant", "bee", "cat")[label] for label in labels]
    assert names == [file.parent.name for file in files]


def test_the_manifest_says_how_features_were_made(image_folder, tmp_path):
    extract(image_folder, tmp_path, "--shard-size", 7)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    shards = manifest.pop("shards")
    assert manifest == {**SETTINGS, "shard_size": 7}
    assert [shard["count"] for shard in shards] == [7, 7, 7, 7, 7, 5]
    assert [shard["start"] for shard in shards] == [0, 7, 14, 21, 28, 35]


@pytest.mark.parametrize(
    ("more", "changes"),
    [
        ((), {}),
        (("--layout", "npy"), {"layout": "npy"}),
        (("--no-flip", "--global-seed", 3), {"flips": "none", "seed": 3, "flip": False}),
        (
            ("--draw", "fresh"),
            {"shape": [2, 6, 16, 16], "dtype": "float16", "flips": "both", "draw": "fresh"},
        ),
    ],
)
def test_files_keep_the_form_of_earlier_versions(more, changes, image_folder, tmp_path):
    extract(image_folder, tmp_path, *more)
    settings = {**SETTINGS, **changes}
    assert (tmp_path / "extraction.json").read_text() == json.dumps(settings, indent=2) + "\n"
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    if settings["layout"] == "packed":
        (shard,) = manifest.pop("shards")
        assert list(shard) == ["file", "start", "count", "sha256"]
    assert json.dumps(manifest) == json.dumps(settings)


def test_an_extraction_of_an_earlier_version_is_continued(image_folder, tmp_path):
    extract(image_folder, tmp_path / "whole", "--shard-size", 16)
    (tmp_path / "begun").mkdir()
    settings = json.dumps({**SETTINGS, "shard_size": 16})
    (tmp_path / "begun" / "extraction.json").write_text(settings)
    shard = tmp_path / "begun" / "shard-00001.npy"
    shard.write_bytes((tmp_path / "whole" / "shard-00001.npy").read_bytes())
    written = shard.stat().st_mtime_ns
    extract(image_folder, tmp_path / "begun", "--shard-size", 16)
    assert shard.stat().st_mtime_ns == written
    begun, whole = data_files(tmp_path / "begun"), data_files(tmp_path / "whole")
    del begun["extraction.json"], whole["extraction.json"]  # they differ in line breaks
    assert begun == whole


@pytest.fixture(scope="module")
def fresh_features(large_images, vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fresh")
    extract(large_images, folder, "--draw", "fresh", vae=vae)
    return folder


def test_fresh_features_hold_the_posterior_of_both_orientations(large_images, vae, fresh_features):
    fresh, plain, _ = read_all(fresh_features)
    _, mirrored, _ = read_all(fresh_features, flip=1)
    assert fresh.fresh
    assert plain.shape == (40, 8, 8, 8)
    assert fresh.latent_shape == (4, 8, 8)
    _, images = sorted_images(large_images)
    encoder = load_vae(str(vae))
    for stored, pixels in ((plain, images), (mirrored, images.flip(-1))):
        expected = torch.cat(encoder.encode(pixels), dim=1)
        torch.testing.assert_close(stored, expected, rtol=2e-3, atol=2e-4)


def test_a_frozen_draw_is_a_sample_of_that_posterior(large_images, vae, fresh_features, tmp_path):
    extract(large_images, tmp_path, "--no-flip", vae=vae)
    _, latents, _ = read_all(tmp_path)
    _, moments, _ = read_all(fresh_features)
    noise = (latents - moments[:, :4]) / moments[:, 4:]
    assert abs(noise.mean()) < 0.15
    assert noise.std() == pytest.approx(1, abs=0.12)
    torch.testing.assert_close(sample_posterior(moments, noise), latents, rtol=1e-3, atol=1e-3)


def test_fresh_features_without_flips_hold_one_orientation(
    large_images, vae, fresh_features, tmp_path
):
    extract(large_images, tmp_path, "--draw", "fresh", "--no-flip", vae=vae)
    _, moments, _ = read_all(tmp_path, flip=1)
    assert torch.equal(moments, read_all(fresh_features)[1])


def test_two_processes_of_another_batch_size_and_a_kill_make_the_same_files(
    large_images, vae, tmp_path
):
    common = ("--shard-size", 3)
    extract(large_images, tmp_path / "whole", *common, "--batch-size", 32, vae=vae)
    command = [
        *TORCHRUN,
        "extract_features.py",
        *arguments(large_images, tmp_path / "parts", *common, "--batch-size", 5, vae=vae),
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
    for path, written in survivors.items():  # only missing shards are written
        assert path.stat().st_mtime_ns == written
    _, expected, labels = read_all(tmp_path / "whole")
    _, found, same_labels = read_all(tmp_path / "parts")
    assert torch.equal(labels, same_labels)
    # The VAE's sums depend on the batch.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not [path for path in (tmp_path / "parts").iterdir() if path.suffix == ".tmp"]


def test_processes_share_the_shards(image_folder, tmp_path):
    images = CroppedImages(image_folder, 16)
    config = ExtractionConfig(image_size=16, shard_size=9)
    parts = [
        Extraction(images, PixelVAE(), "pixels", tmp_path, config, rank, 2) for rank in range(2)
    ]
    assert [list(part.my_shards) for part in parts] == [[0, 2, 4], [1, 3]]
    assert [part.num_images for part in parts] == [9 + 9 + 4, 9 + 9]
    assert sum(parts[0].run(4, 0)) == 22
    assert not (tmp_path / "manifest.json").exists()
    assert sum(parts[1].run(4, 0)) == 18
    assert (tmp_path / "manifest.json").exists()


def test_running_again_repairs_what_is_damaged_and_nothing_else(image_folder, tmp_path):
    extract(image_folder, tmp_path, "--shard-size", 16)
    before = data_files(tmp_path)
    content = bytearray(before["shard-00001.npy"])
    content[-5] ^= 1
    (tmp_path / "shard-00001.npy").write_bytes(content)
    (tmp_path / "shard-00002.npy").unlink()
    (tmp_path / "labels.npy").unlink()
    kept = (tmp_path / "shard-00000.npy").stat().st_mtime_ns
    extract(image_folder, tmp_path, "--shard-size", 16)
    assert data_files(tmp_path) == before
    assert (tmp_path / "shard-00000.npy").stat().st_mtime_ns == kept


@pytest.mark.parametrize("damage", ["swapped", "cut short", "of another type"])
def test_running_again_repairs_labels(damage, image_folder, tmp_path, capsys):
    extract(image_folder, tmp_path)
    before = data_files(tmp_path)
    file = tmp_path / "labels.npy"
    labels = np.load(file)
    np.save(file, labels.astype("int32") if damage == "of another type" else labels[::-1])
    if damage == "cut short":
        file.write_bytes(before["labels.npy"][:-8])
    extract(image_folder, tmp_path)
    assert data_files(tmp_path) == before
    assert f"{file} is missing or damaged" in capsys.readouterr().out


def test_labels_of_other_images_are_not_touched(image_folder, tmp_path, capsys):
    other = shutil.copytree(image_folder, tmp_path / "images")
    (other / "ant").rename(other / "dog")
    extract(image_folder, tmp_path / "out")
    before = data_files(tmp_path / "out")
    message = fails(extract_features.main, arguments(other, tmp_path / "out"), capsys)
    assert "was made with different settings" in message
    assert data_files(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["shard-00000.npy", "labels.npy"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_in_place_of_a_file_is_named(name, finished, image_folder, tmp_path, capsys):
    if finished:
        extract(image_folder, tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    message = fails(extract_features.main, arguments(image_folder, tmp_path), capsys)
    assert str(tmp_path / name) in message


@pytest.mark.parametrize("more", [("--no-flip",), ("--global-seed", 3), ("--draw", "fresh")])
def test_features_of_different_settings_are_refused(more, features, image_folder, capsys):
    with pytest.raises(SystemExit) as error:
        extract_features.main(arguments(image_folder, features, *more))
    assert error.value.code == 2
    assert "was made with different settings" in capsys.readouterr().err


def test_a_vae_is_known_by_its_weights_not_by_its_path(large_images, vae, tmp_path, capsys):
    extract(large_images, tmp_path / "f", vae=vae)
    before = data_files(tmp_path / "f")
    moved = shutil.copytree(vae, tmp_path / "moved")
    (tmp_path / "f" / "shard-00000.npy").unlink()
    extract(large_images, tmp_path / "f", vae=moved)
    after = data_files(tmp_path / "f")
    assert before.keys() == after.keys()
    for name in before.keys() - {"manifest.json"}:  # which names the VAE that was given last
        assert before[name] == after[name], name
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "shift_factor": 0.5}))
    argv = arguments(large_images, tmp_path / "f", vae=moved)
    assert "'shift_factor': 0.5" in fails(extract_features.main, argv, capsys)
    groups = config["norm_num_groups"] // 2
    (moved / "config.json").write_text(json.dumps({**config, "norm_num_groups": groups}))
    assert "made with different settings (vae" in fails(extract_features.main, argv, capsys)
    (moved / "config.json").write_text(json.dumps(config))
    weights = load_file(moved / "diffusion_pytorch_model.safetensors")
    weights["decoder.conv_in.bias"] += 1
    save_file(weights, moved / "diffusion_pytorch_model.safetensors")
    assert "made with different settings (vae" in fails(extract_features.main, argv, capsys)


@pytest.mark.parametrize(
    ("content", "num_workers", "reason"),
    [
        (None, 0, "image file is truncated"),
        (None, 1, "image file is truncated"),
        (
            HUGE_PNG,
            0,
            "Image size (3600000000 pixels) exceeds limit of 178956970 pixels, "
            "could be decompression bomb DOS attack.",
        ),
    ],
    ids=["cut short", "cut short, a worker", "too large"],
)
def test_an_image_that_cannot_be_read_is_named_in_one_line(
    content, num_workers, reason, image_folder, tmp_path
):
    folder = shutil.copytree(image_folder, tmp_path / "images")
    file = folder / "bee" / "7.png"
    file.write_bytes(content or file.read_bytes()[:100])
    images, config = CroppedImages(folder, 16), ExtractionConfig(image_size=16)
    extraction = Extraction(images, PixelVAE(), "pixels", tmp_path / "out", config)
    with pytest.raises(UserError) as error:
        list(extraction.run(4, num_workers))
    assert str(error.value) == (
        f"cannot read the image {file} ({reason}); "
        "replace it with a valid image and rerun, "
        "or remove it and extract into a new --features-path"
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layout": "pakced"}, "unknown layout 'pakced'; choose one of packed, npy"),
        ({"draw": "twice"}, "unknown draw 'twice'; choose one of once, fresh"),
        ({"image_size": 0}, "image_size is 0"),
        ({"shard_size": 0}, "shard_size is 0"),
        ({"draw": "fresh", "layout": "npy"}, "--draw fresh needs --layout packed"),
    ],
)
def test_impossible_settings_are_refused(wrong, message):
    with pytest.raises(UserError) as error:
        ExtractionConfig(**wrong)
    assert message in str(error.value)


def test_every_setting_has_a_flag_of_its_default():
    args = extract_features.parser().parse_args(["--data-path", "images"])
    flags = vars(args)
    for field in dataclasses.fields(ExtractionConfig):
        assert flags[field.name] == field.default, field.name
    others = {"data_path", "features_path", "vae", "batch_size", "num_workers"}
    assert set(flags) == others | {field.name for field in dataclasses.fields(ExtractionConfig)}


def test_grey_images_of_16_bits_have_the_features_of_8_bits(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (4, 16, 16), dtype=np.uint8)
    for i, image in enumerate(grey):
        for bits, values in ((8, image), (16, image.astype(np.uint16) * 257)):
            file = tmp_path / f"images{bits}" / "ant" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(file)
    for bits in (8, 16):
        extract(tmp_path / f"images{bits}", tmp_path / f"features{bits}")
    _, expected, _ = read_all(tmp_path / "features8")
    assert torch.equal(read_all(tmp_path / "features16")[1], expected)


def test_an_image_as_thin_as_a_line_is_named(image_folder, tmp_path, capsys, monkeypatch):
    """Scaling its shorter side to the image size would take tens of gigabytes."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    folder = shutil.copytree(image_folder, tmp_path / "images")
    file = folder / "bee" / "7.png"
    Image.new("RGB", (1, 39)).save(file)
    extract(folder, tmp_path / "out")
    Image.new("RGB", (1, 40)).save(file)
    message = fails(extract_features.main, arguments(folder, tmp_path / "other"), capsys)
    assert f"cannot read the image {file} (its sides differ too much: it would be scaled to " in (
        message
    )
    assert "16 x 640 pixels before the crop" in message


def test_names_that_are_no_text_have_features(image_folder, tmp_path, capsys):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/donn\xe9es"))
    shutil.copytree(image_folder, folder / "images")
    cat = folder / "images" / "cat"
    cat.rename(cat.with_name("ch\udce4t"))
    (folder / "images" / "bee" / "10.png").rename(folder / "images" / "bee" / "\udce910.png")
    extract(folder / "images", folder / "out")
    assert r"donn\udce9es/images: 40 images of 3 classes" in capsys.readouterr().out
    features, _, labels = read_all(folder / "out")
    assert features.info().classes == ["ant", "bee", "ch\udce4t"]
    assert labels.bincount().tolist() == [14, 13, 13]
    extract(folder / "images", folder / "out")  # Again: the names are compared.
    (folder / "images" / "bee" / "\udce910.png").write_bytes(b"")
    message = fails(extract_features.main, arguments(folder / "images", folder / "other"), capsys)
    assert r"cannot read the image" in message and r"bee/\udce910.png" in message


class BrokenVAE(PixelVAE):
    """Makes a value of images that are white in the corner that is not finite."""

    def __init__(self, value: float):
        self.value = value

    def encode(self, images):
        mean, deviation = super().encode(images)
        mean = mean.clone()
        mean[(images[:, :, 0, 0] == 1).all(1), 0, 3, 4] = self.value
        return mean, deviation


@pytest.mark.parametrize(
    ("value", "config"),
    [
        (float("nan"), {}),
        (float("-inf"), {"layout": "npy"}),
        (float("nan"), {"draw": "fresh"}),
        (1e5, {"draw": "fresh"}),  # beyond float16
    ],
)
def test_an_image_whose_features_are_not_finite_is_named(value, config, image_folder, tmp_path):
    folder = shutil.copytree(image_folder, tmp_path / "images")
    file = folder / "bee" / "7.png"
    pixels = np.asarray(Image.open(file)).copy()
    pixels[0] = 255
    Image.fromarray(pixels).save(file)
    images = CroppedImages(folder, 16)
    extraction = Extraction(
        images,
        BrokenVAE(value),
        "broken",
        tmp_path / "out",
        ExtractionConfig(image_size=16, shard_size=8, **config),
    )
    with pytest.raises(UserError) as error:
        list(extraction.run(4, 0))
    assert str(error.value) == (
        f"the VAE broken makes NaN or infinite values of {file}; give another --vae"
    )
    assert not (tmp_path / "out" / "manifest.json").exists()
    index = images.paths.index("bee/7.png")
    shard = index // 8 if extraction.config.layout == "packed" else index
    assert not any(path.exists() for path in extraction._files(shard))


@pytest.mark.parametrize("finished", [True, False])
def test_shards_that_earlier_versions_wrote_with_nan_are_found(finished, image_folder, tmp_path):
    """A finished extraction writes them again, and one that is continued names the image."""
    extract(image_folder, tmp_path, "--shard-size", 16)
    before = data_files(tmp_path)
    shard = tmp_path / "shard-00001.npy"
    values = np.load(shard)
    values[3, 0, 5, 5] = np.nan
    np.save(shard, values)
    manifest = json.loads(before["manifest.json"])
    if finished:
        manifest["shards"][1]["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        extract(image_folder, tmp_path, "--shard-size", 16)
        assert data_files(tmp_path) == before
        return
    (tmp_path / "manifest.json").unlink()
    images, config = CroppedImages(image_folder, 16), ExtractionConfig(image_size=16, shard_size=16)
    with pytest.raises(UserError, match=f"values of {images.file(19)}; delete {shard} and"):
        list(Extraction(images, PixelVAE(), "pixels", tmp_path, config).run(4, 0))


def other_image(file: Path) -> None:
    """Replace an image by another one, whose file has another size."""
    Image.new("RGB", (16, 16)).save(file)


@pytest.mark.parametrize("layout", ["packed", "npy"])
@pytest.mark.parametrize("version", ["0.1", "now"])
def test_an_image_that_was_replaced_is_noticed(layout, version, image_folder, tmp_path, capsys):
    folder = shutil.copytree(image_folder, tmp_path / "images")
    command = (folder, tmp_path / "out", "--layout", layout, "--shard-size", 16)
    extract(*command)
    if version == "0.1":  # It recorded no sizes: they are recorded when the command is repeated.
        (tmp_path / "out" / "image_sizes.npy").unlink()
        extract(*command)
    other_image(folder / "bee" / "7.png")
    message = fails(extract_features.main, arguments(*command), capsys)
    assert f"{folder / 'bee' / '7.png'} has changed since its features were extracted" in message
    # The message says how to extract the new image.
    shard = re.search(r"delete (\S+) and rerun", message)[1]
    Path(shard).unlink()
    extract(*command)
    extract(folder, tmp_path / "expected", "--layout", layout, "--shard-size", 16)
    assert torch.equal(read_all(tmp_path / "out")[1], read_all(tmp_path / "expected")[1])
    extract(*command)


def test_a_damaged_image_may_be_replaced_before_its_shard_is_written(
    image_folder, tmp_path, capsys
):
    folder = shutil.copytree(image_folder, tmp_path / "images")
    file = folder / "bee" / "7.png"
    os.truncate(file, 100)
    command = (folder, tmp_path / "out", "--shard-size", 4, "--batch-size", 4)
    assert str(file) in fails(extract_features.main, arguments(*command), capsys)
    assert (tmp_path / "out" / "shard-00000.npy").exists()
    other_image(file)
    extract(*command)
    other_image(folder / "ant" / "0.png")
    assert "ant/0.png has changed" in fails(extract_features.main, arguments(*command), capsys)


def test_a_file_system_without_locks_finishes_with_a_warning(
    image_folder, tmp_path, monkeypatch, caplog
):
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    extract(image_folder, tmp_path / "locked")
    monkeypatch.setattr(fcntl, "flock", flock)
    extract(image_folder, tmp_path / "features")
    assert f"cannot lock {tmp_path / 'features'} (No locks available)" in caplog.text
    manifests = [read_json(tmp_path / name / "manifest.json") for name in ("locked", "features")]
    assert manifests[0] == manifests[1]

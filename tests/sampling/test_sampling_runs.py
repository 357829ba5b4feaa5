"""Runs of the 50,000-image script as processes: split, killed, short of disk space, evaluated."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import ROOT, limited, run_script
from PIL import Image

import image_generator_ddp


class Samples(NamedTuple):
    """A finished run."""

    images: np.ndarray  # (COUNT, 16, 16, 3) int
    labels: np.ndarray  # (COUNT,)
    recipe: dict


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
COUNT = 24


def command(trained: Path, out: Path, *more) -> list[str]:
    """The arguments of a run; ``more`` are further ones."""
    paths = ("--ckpt", trained, "--output-dir", out)
    options = ("--num-images", COUNT, "--num-sampling-steps", 10, "--cfg-scale", 1.5)
    argv = ("image_generator_ddp.py", *paths, *options, "--precision", "fp32", "--amm", *more)
    return [str(part) for part in argv]


def finish(argv: list[str], launcher: tuple[str, ...] = (sys.executable,)) -> str:
    """The output of a run that must succeed."""
    process = run_script(*launcher, *argv)
    assert process.returncode == 0, process.stderr
    return process.stdout


def read_samples(printed: str) -> Samples:
    """Images, labels and sidecar of a finished run, from the path it printed last."""
    path = Path(printed.strip().splitlines()[-1])
    assert path.name == f"samples_{COUNT}x16x16x3.npz"
    with np.load(path) as file:
        assert file.files == ["arr_0"]
        images = file["arr_0"]
    assert images.dtype == np.uint8
    labels = np.load(path.with_suffix(".labels.npy"))
    recipe = json.loads((path.parent / "recipe.json").read_text())
    return Samples(images.astype(int), labels, recipe)


def count_finished(out: Path) -> int:
    """Images that an unfinished run has stored."""
    return sum(sum(path.read_bytes()) for path in out.rglob("*.done"))


def kill_after(
    argv: list[str], out: Path, images: int, number: signal.Signals = signal.SIGKILL
) -> tuple[int, str]:
    """Start a run and send it a signal once it has stored ``images`` more.

    Returns:
        its exit code, and what it printed to stderr.
    """
    expected = count_finished(out) + images
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *argv],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while count_finished(out) < expected:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, printed = process.communicate()
    return process.returncode, printed


def assert_equal_images(images: np.ndarray, expected: np.ndarray) -> None:
    """Equal to within one grey level in under 0.1 % of the pixels."""
    assert images.shape == expected.shape
    assert np.abs(images - expected).max() <= 1
    assert (images != expected).mean() < 0.001


def assert_equal_samples(samples: Samples, expected: Samples) -> None:
    assert_equal_images(samples.images, expected.images)
    assert np.array_equal(samples.labels, expected.labels)
    assert samples.recipe == expected.recipe


@pytest.fixture(scope="module")
def one_run(trained, tmp_path_factory) -> Samples:
    """One process, batches of 8."""
    argv = command(trained, tmp_path_factory.mktemp("one_run"), "--per-proc-batch-size", 8)
    process = run_script(sys.executable, *argv)
    assert process.returncode == 0, process.stderr
    # The bar shows progress, the time that remains and images per second.
    assert "24/24" in process.stderr
    assert "images/s]" in process.stderr
    return read_samples(process.stdout)


def test_the_images_are_those_of_the_recipe(one_run):
    images, labels, recipe = one_run
    assert len(np.unique(images.reshape(COUNT, -1), axis=0)) == COUNT
    assert images.std() > 1
    assert labels.shape == (COUNT,)
    assert recipe["amm"] == {"blocks": [4, 6], "form": "256", "radii": [13**0.5, 53**0.5]}
    expected = {
        "seed": 42,
        "solver": "ddpm",
        "num_sampling_steps": "10",
        "cfg_scale": 1.5,
        "cfg_channels": "3",
        "cfg_interval": None,
        "labels": "uniform",
        "precision": "fp32",
        "weights": "ema",
        "vae": "pixels",
        "vae_sha256": None,
        "image_size": 16,
    }
    assert {name: recipe[name] for name in expected} == expected
    assert len(recipe["weights_sha256"]) == 64
    assert recipe["model"]["depths"] == [1, 1, 1, 2, 2]
    assert set(recipe["versions"]) == {"python", "edt", "torch", "diffusers"}


@pytest.mark.slow
def test_two_processes_draw_the_same(one_run, trained, tmp_path):
    argv = command(trained, tmp_path, "--per-proc-batch-size", 5)
    assert_equal_samples(read_samples(finish(argv, TORCHRUN)), one_run)


def test_a_run_killed_three_times_draws_the_same(one_run, trained, tmp_path):
    argv = command(trained, tmp_path, "--per-proc-batch-size", 3)
    for more, number in ((3, signal.SIGKILL), (6, signal.SIGINT), (3, signal.SIGKILL)):
        code, printed = kill_after(argv, tmp_path, more, number)
        assert not list(tmp_path.rglob("*.npz"))
        if number == signal.SIGKILL:
            assert code == -signal.SIGKILL
        else:  # Ctrl-C
            assert code == 130
            assert "Traceback" not in printed
            assert printed.splitlines()[-1].startswith("interrupted; ")
    assert 12 <= count_finished(tmp_path) < COUNT
    assert_equal_samples(read_samples(finish(argv)), one_run)


def test_writing_samples_takes_no_memory_for_those_written():
    """200 MB of images: mapped, they would count as the process's memory."""
    options = ("--num-images", 4000, "--image-size", 128, "--batch-size", 20)
    process = run_script(sys.executable, "benchmarks/bench_samples.py", *options)
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    assert report["file_gib"] > 0.18
    assert report["peak_beyond_baseline_gib"] < 0.09


def refusal(process: subprocess.CompletedProcess) -> str:
    """The message of a run that must be refused."""
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr
    return process.stderr.strip().splitlines()[-1]


def test_a_full_disk_loses_nothing_that_was_finished(one_run, trained, tmp_path, capsys):
    argv = command(trained, tmp_path, "--per-proc-batch-size", 4)
    assert "24 images need 0.00 GiB" in refusal(run_script(sys.executable, *argv, **limited(8000)))
    assert not list(tmp_path.rglob("*.partial"))
    kill_after(argv, tmp_path, 4)
    before = count_finished(tmp_path)
    limit = limited(16 * 16 * 3 * (before + 6))  # it falls into the second batch
    assert "File too large" in refusal(run_script(sys.executable, *argv, **limit))
    assert count_finished(tmp_path) == before + 4
    image_generator_ddp.main(argv[1:])
    assert_equal_images(read_samples(capsys.readouterr().out).images, one_run.images)
    message = refusal(run_script(sys.executable, *argv, "--png", **limited(60)))
    assert "free some disk space" in message
    assert not list(tmp_path.rglob("*.png"))
    image_generator_ddp.main([*argv[1:], "--png"])
    images = read_samples(capsys.readouterr().out).images
    pngs = sorted(tmp_path.rglob("*.png"))
    assert [path.name for path in pngs] == [f"{i:06d}.png" for i in range(COUNT)]
    assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in pngs]), images)


@pytest.mark.slow
def test_a_thousand_images_are_sampled_written_and_evaluated(trained, image_folder, tmp_path):
    options = ("--num-images", 1000, "--num-sampling-steps", 5, "--solver", "unipc", "--png")
    more = ("--labels", "balanced", "--per-proc-batch-size", 128)
    argv = command(trained, tmp_path, *options, *more)
    path = Path(finish(argv).strip().splitlines()[-1])
    assert path.name == "samples_1000x16x16x3.npz"
    assert np.load(path)["arr_0"].shape == (1000, 16, 16, 3)
    files = {file.name for file in path.parent.iterdir() if file.suffix not in (".png", ".lock")}
    assert files == {path.name, f"{path.stem}.labels.npy", "recipe.json"}
    assert len(list(path.parent.glob("*.png"))) == 1000
    assert np.bincount(np.load(path.with_suffix(".labels.npy"))).tolist() == [334, 333, 333]
    report = tmp_path / "scores.json"
    printed = finish(["evaluator.py", image_folder, path, "--features", "pixels", "--json", report])
    assert "Pixel-space Frechet distance" in printed
    assert '"count": 1000' in report.read_text()

"""Whole runs of the 50,000-image script as processes: split, killed, short of room, evaluated."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, limited, run_script
from PIL import Image

import image_generator_ddp

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
COUNT = 24


def command(trained: Path, out: Path, *more) -> list[str]:
    argv = [
        "image_generator_ddp.py",
        "--ckpt",
        trained,
        "--num-images",
        COUNT,
        "--num-sampling-steps",
        "10",
        "--cfg-scale",
        "1.5",
        "--precision",
        "fp32",
        "--amm",
        "--output-dir",
        out,
        *more,
    ]
    return [str(part) for part in argv]


def finish(argv: list[str], launcher: tuple[str, ...] = (sys.executable,)) -> str:
    """What a run printed that must end well."""
    done = run_script(*launcher, *argv)
    assert done.returncode == 0, done.stderr
    return done.stdout


def samples(printed: str) -> tuple[np.ndarray, np.ndarray, dict]:
    """Images, labels and sidecar of a finished run, from the path it printed last."""
    path = Path(printed.strip().splitlines()[-1])
    assert path.name == f"samples_{COUNT}x16x16x3.npz"
    with np.load(path) as file:
        assert file.files == ["arr_0"] and file["arr_0"].dtype == np.uint8
        return (
            file["arr_0"].astype(int),
            np.load(path.parent / "labels.npy"),
            json.loads((path.parent / "recipe.json").read_text()),
        )


def finished_in(out: Path) -> int:
    return sum(sum(path.read_bytes()) for path in out.rglob("*.done"))


def kill_after(argv: list[str], out: Path, images: int) -> None:
    """Start a run and SIGKILL it once it has stored ``images`` more."""
    wanted = finished_in(out) + images
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *argv],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while finished_in(out) < wanted:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def equal(a: np.ndarray, b: np.ndarray) -> bool:
    """To within one grey level in under 0.1 % of the pixels."""
    return a.shape == b.shape and np.abs(a - b).max() <= 1 and (a != b).mean() < 0.001


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory) -> tuple[np.ndarray, np.ndarray, dict]:
    """One process, batches of 8."""
    argv = command(trained, tmp_path_factory.mktemp("whole"), "--per-proc-batch-size", 8)
    done = run_script(sys.executable, *argv)
    assert (
        "24/24" in done.stderr and "images/s]" in done.stderr
    )  # the bar shows progress, time left and images/s
    assert done.returncode == 0, done.stderr
    return samples(done.stdout)


def test_the_images_are_those_of_the_recipe(whole):
    images, labels, recipe = whole
    assert (
        len(np.unique(images.reshape(COUNT, -1), axis=0)) == COUNT
        and images.std() > 1
        and labels.shape == (COUNT,)
    )
    assert recipe["amm"] == {"blocks": [4, 6], "form": "256", "radii": [13**0.5, 53**0.5]}
    wanted = {
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
    assert {name: recipe[name] for name in wanted} == wanted
    assert len(recipe["weights_sha256"]) == 64 and recipe["model"]["depths"] == [1, 1, 1, 2, 2]
    assert set(recipe["versions"]) == {"python", "edt", "torch", "diffusers"}


@pytest.mark.slow
def test_two_processes_draw_the_same(whole, trained, tmp_path):
    images, labels, recipe = samples(
        finish(command(trained, tmp_path, "--per-proc-batch-size", 5), TORCHRUN)
    )
    assert equal(images, whole[0]) and np.array_equal(labels, whole[1]) and recipe == whole[2]


def test_a_run_killed_three_times_draws_the_same(whole, trained, tmp_path):
    argv = command(trained, tmp_path, "--per-proc-batch-size", 3)
    for more in (3, 6, 3):
        kill_after(argv, tmp_path, more)
        assert not list(tmp_path.rglob("*.npz"))
    assert 12 <= finished_in(tmp_path) < COUNT
    images, labels, recipe = samples(finish(argv))
    assert equal(images, whole[0]) and np.array_equal(labels, whole[1]) and recipe == whole[2]


def test_writing_samples_takes_no_memory_for_those_written():
    """200 MB of images: mapped, they would count as the process's memory."""
    done = run_script(
        sys.executable,
        "benchmarks/bench_samples.py",
        "--num-images",
        4000,
        "--image-size",
        128,
        "--batch-size",
        20,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["file_gib"] > 0.18 and report["peak_beyond_baseline_gib"] < 0.09


def refused(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_a_full_disk_loses_nothing_that_was_finished(whole, trained, tmp_path, capsys):
    argv = command(trained, tmp_path, "--per-proc-batch-size", 4)
    assert "24 images need 0.00 GiB" in refused(run_script(sys.executable, *argv, **limited(8000)))
    assert not list(tmp_path.rglob("*.partial"))
    kill_after(argv, tmp_path, 4)
    before = finished_in(tmp_path)
    room = limited(16 * 16 * 3 * (before + 6))  # the limit falls into the second batch
    assert "File too large" in refused(run_script(sys.executable, *argv, **room))
    assert finished_in(tmp_path) == before + 4
    image_generator_ddp.main(argv[1:])
    assert equal(samples(capsys.readouterr().out)[0], whole[0])
    message = refused(run_script(sys.executable, *argv, "--png", **limited(60)))
    assert "make room" in message and not list(tmp_path.rglob("*.png"))
    image_generator_ddp.main([*argv[1:], "--png"])
    images, _, _ = samples(capsys.readouterr().out)
    pngs = sorted(tmp_path.rglob("*.png"))
    assert [path.name for path in pngs] == [f"{i:06d}.png" for i in range(COUNT)]
    assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in pngs]), images)


@pytest.mark.slow
def test_a_thousand_images_are_sampled_written_and_evaluated(trained, image_folder, tmp_path):
    argv = command(
        trained,
        tmp_path,
        "--num-images",
        1000,
        "--num-sampling-steps",
        5,
        "--solver",
        "unipc",
        "--png",
        "--labels",
        "balanced",
        "--per-proc-batch-size",
        128,
    )
    path = Path(finish(argv).strip().splitlines()[-1])
    assert path.name == "samples_1000x16x16x3.npz" and np.load(path)["arr_0"].shape == (
        1000,
        16,
        16,
        3,
    )
    assert {
        file.name for file in path.parent.iterdir() if file.suffix not in (".png", ".lock")
    } == {path.name, "labels.npy", "recipe.json"}
    assert len(list(path.parent.glob("*.png"))) == 1000
    assert np.bincount(np.load(path.parent / "labels.npy")).tolist() == [334, 333, 333]
    report = tmp_path / "scores.json"
    printed = finish(["evaluator.py", image_folder, path, "--features", "pixels", "--json", report])
    assert "Pixel-space Frechet distance" in printed and '"count": 1000' in report.read_text()

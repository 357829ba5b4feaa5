"""Runs that are killed, starved and restarted end where uninterrupted ones do. Real processes."""

import json
import os
import random
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
from conftest import ROOT, TRAIN, limited, run_script, update_manifest
from safetensors.torch import load_file, save_file

import train_mask_adan
from edt.checkpoints.folder import list_checkpoints, newest_checkpoint
from edt.diffusion import LossSecondMomentSampler
from edt.training.run_dir import lock_run_dir
from edt.utils.files import read_json

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
KINDS = ("model", "ema", "optimizer", "sampler")


def command(features: Path, run: Path, steps: int, *more, launcher=(sys.executable,)) -> list[str]:
    return [
        str(part)
        for part in (
            *launcher,
            "train_mask_adan.py",
            *TRAIN,
            "--global-batch-size",
            12,
            "--feature-path",
            features,
            "--run-dir",
            run,
            "--max-steps",
            steps,
            *more,
        )
    ]


def train(features: Path, run: Path, steps: int, *more) -> int:
    return train_mask_adan.main(command(features, run, steps, *more)[2:])


def final(run: Path) -> dict[str, torch.Tensor]:
    folder = list_checkpoints(run / "checkpoints")[-1]
    return {
        f"{kind}/{name}": value
        for kind in KINDS
        for name, value in load_file(folder / f"{kind}.safetensors").items()
    }


def assert_same(run: Path, reference: Path) -> None:
    """Every tensor of the newest checkpoints, and the logged losses."""
    assert read_json(list_checkpoints(run / "checkpoints")[-1] / "state.json") == read_json(
        list_checkpoints(reference / "checkpoints")[-1] / "state.json"
    )
    found, expected = final(run), final(reference)
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []
    rows = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, reference)
    ]
    assert [(row["step"], row["loss"], row["grad_norm"]) for row in rows[0]] == [
        (row["step"], row["loss"], row["grad_norm"]) for row in rows[1]
    ]


def warm_up(run: Path) -> None:
    """Give the checkpoint of a run a timestep sampler that is past its uniform beginning."""
    folder = list_checkpoints(run / "checkpoints")[-1]
    sampler = LossSecondMomentSampler()
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        sampler.update(
            torch.arange(1000), torch.rand(1000, generator=generator) * torch.linspace(2, 0.1, 1000)
        )
    save_file(sampler.state_dict(), folder / "sampler.safetensors")
    update_manifest(folder)


def test_two_uninterrupted_runs_are_equal(features, tmp_path):
    for name in "ab":
        assert train(features, tmp_path / name, 4) == 0
    assert_same(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    "stop", [2, 3, 4], ids=["mid-epoch", "at the epoch's end", "in the second epoch"]
)
def test_a_warm_run_continued_equals_one_uninterrupted(stop, features, tmp_path):
    train(features, tmp_path / "whole", 1)
    warm_up(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    train(features, tmp_path / "whole", 6)
    train(features, tmp_path / "parts", stop)
    train(features, tmp_path / "parts", 6)
    sampler = load_file(
        list_checkpoints(tmp_path / "parts" / "checkpoints")[-1] / "sampler.safetensors"
    )
    assert sampler["counts"].sum() == 12_000 + 5 * 12
    assert_same(tmp_path / "parts", tmp_path / "whole")


def test_what_is_left_out_of_a_checkpoint_is_noticed(features, tmp_path):
    """The comparison above can fail: without any one part of the state the continued run ends
    elsewhere.
    """
    train(features, tmp_path / "whole", 3)
    train(features, tmp_path / "half", 2)
    for kind in ("ema", "optimizer"):
        broken = shutil.copytree(tmp_path / "half", tmp_path / kind)
        file = list_checkpoints(broken / "checkpoints")[-1] / f"{kind}.safetensors"
        save_file({name: torch.zeros_like(value) for name, value in load_file(file).items()}, file)
        (file.parent / "manifest.json").write_text("{}")
        train(features, broken, 3)
        with pytest.raises(AssertionError):
            assert_same(broken, tmp_path / "whole")


def test_two_processes_killed_continue_bit_for_bit(features, tmp_path):
    for name, steps in (("whole", 5), ("parts", 2), ("parts", 5)):
        done = run_script(*command(features, tmp_path / name, steps, launcher=TORCHRUN))
        assert (tmp_path / name / "checkpoints" / f"{steps:07d}").is_dir(), done.stderr
    assert_same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize(
    "sampler", [pytest.param("uniform", marks=pytest.mark.slow), "loss-second-moment"]
)
def test_one_process_and_two_see_the_same(sampler, features, tmp_path):
    """Losses over 20 steps to 1e-5, and the sampler's history in global order."""
    flags = ("--schedule-sampler", sampler, "--global-batch-size", 8)
    train(features, tmp_path / "one", 1, *flags)
    if sampler == "loss-second-moment":
        warm_up(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    train(features, tmp_path / "one", 21, *flags)
    done = run_script(*command(features, tmp_path / "two", 21, *flags, launcher=TORCHRUN))
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert len(rows[0]) == len(rows[1]) == 21, done.stderr
    for a, b in zip(*rows, strict=True):
        for name in ("loss_full", "loss_masked"):
            assert b[name] == pytest.approx(a[name], rel=1e-5), a["step"]
    one, two = (final(tmp_path / name) for name in ("one", "two"))
    for name in one:
        if name.startswith("sampler/"):
            torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6)


def crash(features: Path, run: Path, reference: Path, kills: int, rng: random.Random) -> int:
    """Kill -9 a training run at random moments until ``kills`` were survived; returns how many hit
    a checkpoint's writing.
    """
    steps, torn = len((reference / "metrics.jsonl").read_text().splitlines()), 0
    full_command = command(
        features, run, steps, "--ckpt-every", 1, "--keep-last", 2, "--keep-every", 10**6
    )
    for _ in range(kills):
        process = subprocess.Popen(
            full_command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        metrics = run / "metrics.jsonl"
        seen, deadline = metrics.stat().st_size if metrics.exists() else 0, time.monotonic() + 120
        while (
            process.poll() is None and time.monotonic() < deadline
        ):  # until it trains: a kill before is no test
            if metrics.exists() and metrics.stat().st_size > seen:
                break
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.25))
        process.kill()
        process.wait()
        torn += bool(list((run / "checkpoints").glob(".*")))
    done = run_script(*full_command)
    assert done.returncode == 0, done.stderr
    assert_same(run, reference)
    return torn


def test_kill_9_at_random_moments(features, tmp_path):
    assert (
        run_script(*command(features, tmp_path / "reference", 12)).returncode == 0
    )  # as many threads as the others
    crash(features, tmp_path / "run", tmp_path / "reference", kills=2, rng=random.Random(0))


@pytest.mark.slow
def test_kill_9_at_20_random_moments(features, tmp_path):
    """20 runs, each killed once at a random moment and continued."""
    assert run_script(*command(features, tmp_path / "reference", 8)).returncode == 0
    rng = random.Random(1)
    torn = sum(
        crash(features, tmp_path / f"run{i}", tmp_path / "reference", kills=1, rng=rng)
        for i in range(20)
    )
    assert torn >= 1  # kills that hit a checkpoint while it was written


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_a_signal_finishes_the_step_saves_and_ends(number, code, features, tmp_path):
    process = subprocess.Popen(
        command(features, tmp_path / "run", 10**6, "--num-workers", 1),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert int(newest.name) == len(metrics.read_text().splitlines()) > 0


def test_a_second_run_in_the_folder_is_refused(features, tmp_path, capsys):
    with lock_run_dir(tmp_path / "run"):
        done = run_script(*command(features, tmp_path / "run", 1))
    assert done.returncode == 2 and done.stderr.strip().endswith(
        "stop it or give another --run-dir"
    )
    assert train(features, tmp_path / "run", 1) == 0


def test_a_full_disk_keeps_the_checkpoint_before(features, tmp_path):
    """A limit on the size of files stands in for the disk: it bites in the largest file of the
    checkpoint.
    """
    train(features, tmp_path / "run", 2)
    size = max(
        path.stat().st_size for path in (tmp_path / "run" / "checkpoints" / "0000002").iterdir()
    )

    done = run_script(
        *command(features, tmp_path / "run", 4, "--ckpt-every", 1), **limited(size // 2)
    )
    assert done.returncode == 2
    assert (
        "cannot write the checkpoint" in done.stderr.strip().splitlines()[-1]
        and "training goes on" in done.stderr
    )
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["0000002"]
    train(features, tmp_path / "run", 4)
    train(features, tmp_path / "whole", 4)
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_disk_without_any_room_costs_what_was_to_be_written_only(features, tmp_path):
    """No file grows beyond 2000 bytes: not log, metrics, pictures or checkpoints. Training goes on
    to its end.
    """
    run = tmp_path / "run"
    train(features, run, 2)
    before = (run / "metrics.jsonl").read_bytes()
    done = run_script(
        *command(features, run, 8, "--ckpt-every", 4, "--sample-every", 5), **limited(2000)
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith(
        f"error: cannot write the checkpoint {run / 'checkpoints' / '0000008'}"
    )
    for what in ("metrics", "samples", "checkpoint"):
        assert re.search(f"{what}: .*; training goes on", done.stderr), done.stderr
    assert "Traceback" not in done.stderr and os.listdir(run / "checkpoints") == ["0000002"]
    after = (run / "metrics.jsonl").read_bytes()
    assert after.startswith(before) and len(before) < len(after) <= 2000
    assert [json.loads(line)["step"] for line in after.splitlines()][:3] == [1, 2, 3]


def test_a_console_that_takes_nothing_stops_no_run(features, tmp_path):
    silenced = ("sh", "-c", 'exec "$@" > /dev/full 2>&1', "sh")  # its output on a full disk
    assert run_script(*silenced, *command(features, tmp_path / "run", 3)).returncode == 0
    assert newest_checkpoint(tmp_path / "run" / "checkpoints").name == "0000003"
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    assert (
        run_script(*silenced, *command(features, tmp_path / "run", 4, "--init-lr", 1)).returncode
        == 2
    )


def test_a_truncated_checkpoint_is_passed_over(features, tmp_path, caplog):
    train(features, tmp_path / "run", 3, "--ckpt-every", 1)
    train(features, tmp_path / "whole", 4)
    os.truncate(tmp_path / "run" / "checkpoints" / "0000003" / "optimizer.safetensors", 1000)
    train(features, tmp_path / "run", 4)
    assert "skipping checkpoint 0000003" in (tmp_path / "run" / "log.txt").read_text()
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_nan_in_the_data_is_survived_and_too_many_are_not(features, tmp_path, capsys):
    poisoned = shutil.copytree(features, tmp_path / "features")
    latents = np.load(poisoned / "shard-00000.npy")
    latents[5] = np.nan
    np.save(poisoned / "shard-00000.npy", latents)
    assert train(poisoned, tmp_path / "run", 6) == 0  # two epochs: image 5 in at most two batches
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert (
        rows[-1]["skipped_steps"] in (1, 2)
        and sum(row["loss"] is None for row in rows) == rows[-1]["skipped_steps"]
    )
    assert all(value.isfinite().all() for value in final(tmp_path / "run").values())
    latents[:] = np.nan
    np.save(poisoned / "shard-00000.npy", latents)
    with pytest.raises(SystemExit):
        train(poisoned, tmp_path / "run", 20, "--max-skipped-steps", 3)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "3 steps in a row were not finite" in last and "checkpoints/0000006" in last

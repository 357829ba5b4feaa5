"""Runs that are killed, starved and restarted end where uninterrupted ones do. Real processes."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TRAIN, limited, run_script, update_manifest
from safetensors.torch import load_file, save_file

import train_mask_adan
from edt.checkpoints.folder import TENSOR_FILES, list_checkpoints, newest_checkpoint
from edt.diffusion import LossSecondMomentSampler
from edt.training.run_dir import lock_run_dir
from edt.utils.files import read_json

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def command(
    features: Path,
    run: Path,
    steps: int,
    *flags: object,
    launcher: Sequence[str] = (sys.executable,),
) -> list[str]:
    """The command that trains a run up to ``steps`` steps."""
    paths = ("--feature-path", features, "--run-dir", run)
    parts = (*launcher, "train_mask_adan.py", *TRAIN, "--global-batch-size", 12, *paths)
    return [str(part) for part in (*parts, "--max-steps", steps, *flags)]


def train(features: Path, run: Path, steps: int, *flags: object) -> int:
    """Train in this process; returns the exit code."""
    return train_mask_adan.main(command(features, run, steps, *flags)[2:])


def newest(run: Path) -> Path:
    return list_checkpoints(run / "checkpoints")[-1]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint, as "file/name"."""
    return {
        f"{file}/{name}": value
        for file in TENSOR_FILES
        for name, value in load_file(newest(run) / f"{file}.safetensors").items()
    }


def assert_same(run: Path, reference: Path) -> None:
    """Compare every tensor of the newest checkpoints, their step counts, and the logged losses."""
    assert read_json(newest(run) / "state.json") == read_json(newest(reference) / "state.json")
    actual, expected = tensors(run), tensors(reference)
    assert actual.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, actual[name])] == []
    rows, expected_rows = (
        [(row["step"], row["loss"], row["grad_norm"]) for row in metrics(folder)]
        for folder in (run, reference)
    )
    assert rows == expected_rows


def warm_up(run: Path) -> None:
    """Give the checkpoint of a run a timestep sampler that is past its uniform beginning."""
    sampler = LossSecondMomentSampler()
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        losses = torch.rand(1000, generator=generator) * torch.linspace(2, 0.1, 1000)
        sampler.update(torch.arange(1000), losses)
    save_file(sampler.state_dict(), newest(run) / "sampler.safetensors")
    update_manifest(newest(run))


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
    sampler = load_file(newest(tmp_path / "parts") / "sampler.safetensors")
    assert sampler["counts"].sum() == 12_000 + 5 * 12
    assert_same(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("file", ["ema", "optimizer"])
def test_the_comparison_notices_a_part_of_the_state_that_was_lost(file, features, tmp_path):
    """Without EMA or optimizer state, a continued run ends elsewhere."""
    train(features, tmp_path / "whole", 3)
    train(features, tmp_path / "parts", 2)
    path = newest(tmp_path / "parts") / f"{file}.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in load_file(path).items()}, path)
    update_manifest(path.parent)
    assert train(features, tmp_path / "parts", 3) == 0
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "parts", tmp_path / "whole")


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
    rows, rows_of_two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(rows) == 21
    assert len(rows_of_two) == 21, done.stderr
    for row, row_of_two in zip(rows, rows_of_two, strict=True):
        for name in ("loss_full", "loss_masked"):
            assert row_of_two[name] == pytest.approx(row[name], rel=1e-5), row["step"]
    actual, expected = tensors(tmp_path / "two"), tensors(tmp_path / "one")
    for name in expected:
        if name.startswith("sampler/"):
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-6)


def start(arguments: list[str], **options: Any) -> subprocess.Popen:
    """Start a training command from the project's root."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(arguments, cwd=ROOT, env=environment, **options)


def wait_for_a_step(process: subprocess.Popen, run: Path, size: int = 0) -> None:
    """Wait until metrics.jsonl is larger than ``size`` bytes, or the process has ended."""
    file, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if file.exists() and file.stat().st_size > size:
            return
        time.sleep(0.005)


def crash(features: Path, run: Path, reference: Path, kills: int, rng: random.Random) -> int:
    """Kill a training run with signal 9 at random moments, continue it, and compare its end.

    Returns:
        how many kills hit a checkpoint while it was written.
    """
    torn = 0
    flags = ("--ckpt-every", 1, "--keep-last", 2, "--keep-every", 10**6)
    arguments = command(features, run, len(metrics(reference)), *flags)
    for _ in range(kills):
        file = run / "metrics.jsonl"
        size = file.stat().st_size if file.exists() else 0
        process = start(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_a_step(process, run, size)  # a kill before the first step tests nothing
        time.sleep(rng.uniform(0, 0.25))
        process.kill()
        process.wait()
        torn += bool(list((run / "checkpoints").glob(".*")))
    done = run_script(*arguments)
    assert done.returncode == 0, done.stderr
    assert_same(run, reference)
    return torn


def test_kill_9_at_random_moments(features, tmp_path):
    # In a process of its own: with as many threads as the killed ones.
    assert run_script(*command(features, tmp_path / "reference", 12)).returncode == 0
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
    ("number", "code"),
    [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGUSR1, 0)],
    ids=["SIGTERM", "SIGINT", "SIGUSR1"],
)
def test_a_signal_finishes_the_step_saves_and_ends(number, code, features, tmp_path):
    """The signal reaches every process of the run, the reader too, as from SLURM or a terminal."""
    run = tmp_path / "run"
    arguments = command(features, run, 10**6, "--num-workers", 1)
    process = start(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for_a_step(process, run)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    steps = len(metrics(run))
    assert steps > 0
    assert int(newest_checkpoint(run / "checkpoints").name) == steps


def steps(run: Path) -> list[int]:
    return [int(path.name) for path in list_checkpoints(run / "checkpoints")]


def test_going_back_sets_the_later_checkpoints_aside(features, tmp_path):
    run, aside = tmp_path / "run", tmp_path / "run" / "set-aside-1"
    often = ("--ckpt-every", 1, "--keep-last", 2)
    train(features, run, 4, *often)
    (run / "samples").mkdir()
    for name in ("0000003.png", "0000004.png"):
        (run / "samples" / name).write_text(name)
    last = newest(run).joinpath("manifest.json").read_bytes()
    train(features, run, 5, *often, "--resume-step", 3, "--init-lr", 0.01, "--allow-config-change")
    assert steps(run) == [3, 4, 5]
    assert newest(run).parent.joinpath("0000004", "manifest.json").read_bytes() != last
    assert [path.name for path in (run / "samples").iterdir()] == ["0000003.png"]
    assert [path.name for path in (aside / "samples").iterdir()] == ["0000004.png"]
    assert steps(aside) == [4]
    assert newest(aside).joinpath("manifest.json").read_bytes() == last
    assert [row["step"] for row in metrics(aside)] == [1, 2, 3, 4]
    assert f"everything after it is now in {aside}" in (run / "log.txt").read_text()
    # The next start continues the new branch, and the old one can be continued where it is.
    train(features, run, 6, "--init-lr", 0.01)
    assert "0000005 at step 5" in (run / "log.txt").read_text()
    train(features, aside, 5)
    train(features, tmp_path / "whole", 5)
    assert_same(aside, tmp_path / "whole")


def test_going_back_with_nothing_to_do_moves_nothing(features, tmp_path):
    run = tmp_path / "run"
    train(features, run, 3, "--ckpt-every", 1)
    assert train(features, run, 1, "--resume-step", 2) == 0
    assert "0000002 is finished: it is at step 2" in (run / "log.txt").read_text()
    assert steps(run) == [1, 2, 3]
    assert [row["step"] for row in metrics(run)] == [1, 2, 3]
    assert not (run / "set-aside-1").exists()


def test_the_checkpoint_of_another_run_sets_the_folders_own_aside(features, tmp_path):
    run, aside = tmp_path / "run", tmp_path / "run" / "set-aside-1"
    train(features, tmp_path / "other", 2)
    train(features, run, 3, "--ckpt-every", 1)
    train(features, run, 4, "--resume", newest(tmp_path / "other"))
    assert steps(run) == [4]
    assert [row["step"] for row in metrics(run)] == [3, 4]
    assert steps(aside) == [1, 2, 3]
    assert [row["step"] for row in metrics(aside)] == [1, 2, 3]
    assert f"the earlier run in {run} is now in {aside}" in (run / "log.txt").read_text()


def test_what_was_saved_or_resumed_from_outlives_a_later_damaged_checkpoint(features, tmp_path):
    run = tmp_path / "run"
    train(features, run, 1)
    shutil.copytree(newest(run), run / "checkpoints" / "0000009")
    (newest(run) / "state.json").unlink()
    train(features, run, 2, "--keep-last", 1)
    assert steps(run) == [1, 2]
    assert steps(run / "set-aside-1") == [9]
    train(features, run, 3, "--keep-last", 1)
    assert steps(run) == [2, 3]


def test_what_a_killed_run_left_is_swept(features, run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    half = run / "checkpoints" / ".0000009.tmp"
    half.mkdir()
    (half / "model.safetensors").write_text("half")
    (run / "samples").mkdir()
    for file in (run / ".metrics.jsonl.7.tmp", run / "samples" / ".0000001.png.7.tmp"):
        file.write_text("half")
    train(features, run, 2, "--global-batch-size", 4)
    assert os.listdir(run / "checkpoints") == ["0000002"]
    assert os.listdir(run / "samples") == []
    assert not list(run.glob(".*.tmp"))


NODE = """
import os, sys
os.chdir(os.path.join(os.path.dirname(__file__), f"node{os.environ['RANK']}"))
import train_mask_adan
train_mask_adan.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (0, "process 0 sees run/checkpoints/0000002 .*, process 1 sees no run/checkpoints/"),
        (1, "process 0 sees no checkpoint, process 1 sees the checkpoints 0000002"),
    ],
)
def test_nodes_without_a_shared_folder_are_refused(node, message, features, run_folder, tmp_path):
    """A process in a folder of its own stands for a node with a disk of its own."""
    for name in ("node0", "node1"):
        (tmp_path / name).mkdir()
    shutil.copytree(run_folder, tmp_path / f"node{node}" / "run")
    script = tmp_path / "node.py"
    script.write_text(NODE)
    arguments = command(features, Path("run"), 4, "--global-batch-size", 4)[2:]
    done = run_script(*TORCHRUN, script, *arguments)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors, done.stderr
    for error in errors:
        assert re.match(f"error: the run folder run must be shared by all nodes: {message}", error)
    assert re.search(r"exitcode  : 2 ", done.stderr)


UNREADABLE = """
import errno, os, sys
import train_mask_adan
from edt.data.features import PackedFeatures

def read(self, indices, flips, read=PackedFeatures._read, calls=[]):
    calls.append(indices)
    if os.environ["RANK"] == "1" and len(calls) == 3:
        raise OSError(errno.EIO, "Input/output error")
    return read(self, indices, flips)

PackedFeatures._read = read
train_mask_adan.main(sys.argv[1:])
"""


def test_a_read_error_of_one_process_saves_the_steps_of_both(features, tmp_path):
    script = tmp_path / "unreadable.py"
    script.write_text(UNREADABLE)
    done = run_script(*TORCHRUN, script, *command(features, tmp_path / "run", 9)[2:])
    assert done.returncode == 1
    assert "OSError: [Errno 5] Input/output error" in done.stderr
    assert "error: another process of this run failed" in done.stderr
    train(features, tmp_path / "whole", 2)
    assert steps(tmp_path / "run") == [2]
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2]


RESTARTED = """
import os, signal
from torch.distributed.distributed_c10d import _get_default_store
from edt.training.accelerator import create_accelerator

accelerator = create_accelerator()
assert not _get_default_store().check(["address"]), "this is the address of a killed process"
accelerator.wait_for_everyone()
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    _get_default_store().set("address", "old")
    accelerator.wait_for_everyone()
    os.kill(os.getpid(), signal.SIGKILL)
print(f"process {accelerator.process_index} has come together with the others")
"""


def test_torchrun_restarts_a_run_with_a_static_rendezvous(tmp_path):
    """Restarted processes read no addresses of the killed ones, which half of the time fails."""
    script = tmp_path / "restarted.py"
    script.write_text(RESTARTED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [*TORCHRUN, "--max-restarts", "1", "--master_port", port]
    launcher.remove("--standalone")
    done = run_script(*launcher, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("has come together") == 2


def test_a_second_run_in_the_folder_is_refused(features, tmp_path):
    with lock_run_dir(tmp_path / "run"):
        done = run_script(*command(features, tmp_path / "run", 1))
    assert done.returncode == 2
    assert done.stderr.strip().endswith("stop it or give another --run-dir")
    assert train(features, tmp_path / "run", 1) == 0


def test_a_full_disk_keeps_the_checkpoint_before(features, tmp_path):
    """A limit on the size of files stands for the disk; the largest file exceeds it."""
    train(features, tmp_path / "run", 2)
    checkpoint = tmp_path / "run" / "checkpoints" / "0000002"
    size = max(path.stat().st_size for path in checkpoint.iterdir())
    arguments = command(features, tmp_path / "run", 4, "--ckpt-every", 1)
    done = run_script(*arguments, **limited(size // 2))
    assert done.returncode == 2
    assert "cannot write the checkpoint" in done.stderr.strip().splitlines()[-1]
    assert "training goes on" in done.stderr
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["0000002"]
    train(features, tmp_path / "run", 4)
    train(features, tmp_path / "whole", 4)
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_training_goes_on_without_any_room_on_the_disk(features, tmp_path):
    """No file grows beyond 2000 bytes: not log, metrics, samples or checkpoints."""
    run = tmp_path / "run"
    train(features, run, 2)
    before = (run / "metrics.jsonl").read_bytes()
    arguments = command(features, run, 8, "--ckpt-every", 4, "--sample-every", 5)
    done = run_script(*arguments, **limited(2000))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    message = f"error: cannot write the checkpoint {run / 'checkpoints' / '0000008'}"
    assert done.stderr.strip().splitlines()[-1].startswith(message)
    for what in ("metrics", "samples", "checkpoint"):
        assert re.search(f"{what}: .*; training goes on", done.stderr), done.stderr
    assert os.listdir(run / "checkpoints") == ["0000002"]
    after = (run / "metrics.jsonl").read_bytes()
    assert after.startswith(before)
    assert len(before) < len(after) <= 2000
    assert [row["step"] for row in metrics(run)][:3] == [1, 2, 3]


def test_a_console_that_takes_nothing_stops_no_run(features, tmp_path):
    run = tmp_path / "run"
    silenced = ("sh", "-c", 'exec "$@" > /dev/full 2>&1', "sh")  # its output on a full disk
    assert run_script(*silenced, *command(features, run, 3)).returncode == 0
    assert newest_checkpoint(run / "checkpoints").name == "0000003"
    assert len(metrics(run)) == 3
    assert run_script(*silenced, *command(features, run, 4, "--init-lr", 1)).returncode == 2


def test_a_truncated_checkpoint_is_passed_over(features, tmp_path):
    train(features, tmp_path / "run", 3, "--ckpt-every", 1)
    train(features, tmp_path / "whole", 4)
    os.truncate(tmp_path / "run" / "checkpoints" / "0000003" / "optimizer.safetensors", 1000)
    train(features, tmp_path / "run", 4)
    assert "skipping checkpoint 0000003" in (tmp_path / "run" / "log.txt").read_text()
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_nan_in_the_data_is_survived_and_too_many_are_not(features, tmp_path, capsys):
    run = tmp_path / "run"
    poisoned = shutil.copytree(features, tmp_path / "features")
    latents = np.load(poisoned / "shard-00000.npy")
    latents[5] = np.nan
    np.save(poisoned / "shard-00000.npy", latents)
    assert train(poisoned, run, 6) == 0  # two epochs: image 5 is in at most two batches
    skipped_steps = metrics(run)[-1]["skipped_steps"]
    assert skipped_steps in (1, 2)
    assert sum(row["loss"] is None for row in metrics(run)) == skipped_steps
    log = (run / "log.txt").read_text()
    image = "1 of its 12 images were not finite: image 5 (shard-00000.npy, row 5)"
    for row in metrics(run):
        if row["loss"] is None:
            assert f"step {row['step']} was skipped: the losses of {image}\n" in log
    assert log.count(image) == skipped_steps
    assert f"skipped {skipped_steps}  " in log.splitlines()[-2]  # the console's last line
    assert all(value.isfinite().all() for value in tensors(run).values())
    latents[:] = np.nan
    np.save(poisoned / "shard-00000.npy", latents)
    with pytest.raises(SystemExit):
        train(poisoned, run, 20, "--max-skipped-steps", 3)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "3 steps in a row were not finite" in message
    assert "the last good checkpoint is" in message
    assert "checkpoints/0000006" in message
    with pytest.raises(SystemExit):
        train(poisoned, tmp_path / "new", 20, "--max-skipped-steps", 3)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "3 steps in a row were not finite; no checkpoint was saved before" in message
    log = (tmp_path / "new" / "log.txt").read_text()
    assert log.count("the losses of 12 of its 12 images were not finite: image ") == 3

"""Which folder a run writes to, which checkpoint it continues, and runs of version 0.1."""

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TRAIN, update_manifest

import train_mask_adan
from edt.checkpoints.folder import list_checkpoints
from edt.checkpoints.loading import load_model
from edt.cli.train import parser, resolve_run_dir
from edt.training.run_dir import lock_run_dir, new_run_dir, newest_run_dir, resolve_resume
from edt.utils.errors import UserError
from edt.utils.files import read_json

# ---------------------------------------------------------------------------------------------
# Numbered folders


@pytest.mark.parametrize(
    ("existing", "expected"),
    [
        ((), "000-EDT-S-2"),
        (("000-EDT-S-2",), "001-EDT-S-2"),
        (("000-EDT-S-2", "009-EDT-S-2"), "010-EDT-S-2"),
        (("999-EDT-S-2",), "1000-EDT-S-2"),
        (("999-EDT-S-2", "1000-EDT-S-2"), "1001-EDT-S-2"),
        (("002-EDT-S-2", "007-EDT-S-2"), "008-EDT-S-2"),  # a gap stays free
        (("004-EDT-XL-2", "001-EDT-S-2"), "005-EDT-S-2"),  # all models count together
        (("notes", "12-EDT-S-2", "2024", "000-EDT-S-2"), "001-EDT-S-2"),  # not runs
    ],
)
def test_a_new_run_counts_on(existing, expected, tmp_path):
    for name in existing:
        (tmp_path / name).mkdir()
    assert new_run_dir(tmp_path, "EDT-S-2") == tmp_path / expected


def test_a_new_run_needs_no_results_folder(tmp_path):
    assert new_run_dir(tmp_path / "results", "EDT-S-2") == tmp_path / "results" / "000-EDT-S-2"


def test_the_newest_run_has_the_largest_number(tmp_path):
    for name in ("002-EDT-S-2", "999-EDT-S-2", "1000-EDT-S-2", "1001-EDT-XL-2"):
        (tmp_path / name).mkdir()
    assert newest_run_dir(tmp_path, "EDT-S/2") == tmp_path / "1000-EDT-S-2"
    assert newest_run_dir(tmp_path, "EDT-XL/2") == tmp_path / "1001-EDT-XL-2"
    with pytest.raises(UserError, match="no run of EDT-B/2"):
        newest_run_dir(tmp_path, "EDT-B/2")


# ---------------------------------------------------------------------------------------------
# The checkpoint to continue from


@pytest.fixture
def run_of_two(run_folder: Path, tmp_path: Path) -> Path:
    """A run with checkpoints of the steps 2 and 4."""
    run = tmp_path / "run"
    for name in ("0000002", "0000004"):
        shutil.copytree(run_folder / "checkpoints" / "0000002", run / "checkpoints" / name)
    return run


def damage(checkpoint: Path) -> None:
    (checkpoint / "state.json").write_text("{}")


def test_a_run_with_a_checkpoint_is_continued(run_of_two, tmp_path):
    assert resolve_resume(run_of_two, None) == run_of_two / "checkpoints" / "0000004"
    damage(run_of_two / "checkpoints" / "0000004")
    assert resolve_resume(run_of_two, None) == run_of_two / "checkpoints" / "0000002"
    assert resolve_resume(tmp_path / "new", None) is None


def test_resume_demands_a_checkpoint(run_of_two, tmp_path):
    new, checkpoints = tmp_path / "new", run_of_two / "checkpoints"
    assert resolve_resume(new, run_of_two) == checkpoints / "0000004"
    assert resolve_resume(new, checkpoints / "0000002") == checkpoints / "0000002"
    with pytest.raises(UserError, match="no complete checkpoint in .*new/checkpoints"):
        resolve_resume(new, new)
    with pytest.raises(UserError, match="cannot resume from the file .*state.json"):
        resolve_resume(new, checkpoints / "0000002" / "state.json")
    damage(checkpoints / "0000004")  # a named checkpoint is not replaced by the one before
    with pytest.raises(UserError, match="0000004/state.json is damaged"):
        resolve_resume(new, checkpoints / "0000004")


def test_the_checkpoints_of_a_run_stand_for_the_run(run_of_two, tmp_path):
    argv = ["--results-dir", str(tmp_path), "--resume", str(run_of_two / "checkpoints")]
    folder, resume = resolve_run_dir(parser().parse_args(argv))
    assert folder == run_of_two
    assert resolve_resume(folder, resume) == run_of_two / "checkpoints" / "0000004"
    named = run_of_two.rename(tmp_path / "checkpoints")  # a run of this name
    folder, resume = resolve_run_dir(parser().parse_args(["--resume", str(named)]))
    assert folder == resume == named


def test_a_step_demands_its_checkpoint(run_of_two):
    assert resolve_resume(run_of_two, None, step=2) == run_of_two / "checkpoints" / "0000002"
    with pytest.raises(UserError, match="no checkpoint of step 3 in .*; its steps: 2, 4"):
        resolve_resume(run_of_two, None, step=3)
    damage(run_of_two / "checkpoints" / "0000002")
    with pytest.raises(UserError, match="0000002/state.json is damaged"):
        resolve_resume(run_of_two, None, step=2)


def test_a_run_with_damaged_checkpoints_only_is_refused(run_of_two):
    for checkpoint in list_checkpoints(run_of_two / "checkpoints"):
        damage(checkpoint)
    with pytest.raises(UserError, match="every checkpoint in .* is damaged; .* --run-dir"):
        resolve_resume(run_of_two, None)
    with pytest.raises(UserError, match="no complete checkpoint in .* to resume from"):
        resolve_resume(run_of_two, run_of_two)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_run_needs_no_locks(code, tmp_path, monkeypatch, caplog):
    def flock(file: object, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock_run_dir(tmp_path / "run"):
        assert f"cannot lock {tmp_path / 'run'} ({os.strerror(code)})" in caplog.text


# ---------------------------------------------------------------------------------------------
# Runs of version 0.1


def rewrite(file: Path, change: Callable[[dict], None]) -> None:
    values = read_json(file)
    change(values)
    file.write_text(json.dumps(values))


def old_state(values: dict) -> None:
    """state.json as version 0.1 wrote it."""
    config = values["config"]
    config["clip"] = config.pop("max_grad_norm")
    del config["final_lr"], config["min_snr_gamma"]
    assert values.pop("skipped_steps") == 0
    values["bad_steps"] = 3
    assert values.pop("images_seen") == 2 * 4
    assert values.pop("epoch") == "1/5"


def old_config(values: dict) -> None:
    """config.json as version 0.1 wrote it."""
    model = values["model"]
    model["heads"] = model.pop("num_heads")
    assert model.pop("image_size") == 16


@pytest.fixture
def old_run(run_folder: Path, tmp_path: Path) -> Path:
    """The run, two steps long, with the files of version 0.1 and three skipped steps."""
    run = shutil.copytree(run_folder, tmp_path / "old")
    checkpoint = run / "checkpoints" / "0000002"
    rewrite(checkpoint / "state.json", old_state)
    rewrite(checkpoint / "config.json", old_config)
    update_manifest(checkpoint)
    return run


def test_a_run_of_version_0_1_is_continued(old_run, run_folder, features, tmp_path):
    new = shutil.copytree(run_folder, tmp_path / "new")
    for run in (old_run, new):
        paths = ["--feature-path", str(features), "--run-dir", str(run)]
        assert train_mask_adan.main([*TRAIN, *paths, "--max-steps", "3"]) == 0
        assert re.search("resumed .*0000002 at step 2", (run / "log.txt").read_text())
    for name in ("model", "ema", "optimizer", "sampler"):
        files = [run / "checkpoints" / "0000003" / f"{name}.safetensors" for run in (old_run, new)]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    states = [read_json(run / "checkpoints" / "0000003" / "state.json") for run in (old_run, new)]
    assert states[0].pop("skipped_steps") == 3
    assert states[1].pop("skipped_steps") == 0
    assert states[0] == states[1]
    assert (states[0]["images_seen"], states[0]["epoch"]) == (3 * 4, "3/10")


def test_a_run_of_version_0_1_with_other_flags_is_refused(old_run, features, capsys):
    paths = ["--feature-path", str(features), "--run-dir", str(old_run)]
    with pytest.raises(SystemExit):
        train_mask_adan.main([*TRAIN, *paths, "--max-steps", "3", "--clip", "0.5"])
    assert "max_grad_norm: None -> 0.5" in capsys.readouterr().err


def test_a_model_of_version_0_1_is_loaded(old_run, run_folder):
    old, new = load_model(old_run)[0], load_model(run_folder)[0]
    assert old.config == new.config
    assert old.config.image_size == 16
    for name, value in new.state_dict().items():
        assert value.equal(old.state_dict()[name]), name


# ---------------------------------------------------------------------------------------------
# What the log says


def test_without_a_run_folder_the_unfinished_run_is_named(features, tmp_path):
    def log(results: Path, *flags: str) -> str:
        argv = [*TRAIN, "--feature-path", str(features), "--results-dir", str(results), *flags]
        assert train_mask_adan.main(argv) == 0
        newest = max(results.glob("*-EDT-Tiny-2"))
        return (newest / "log.txt").read_text()

    assert "unfinished" not in log(tmp_path, "--max-steps", "2")
    unfinished = (tmp_path / "000-EDT-Tiny-2").rename(tmp_path / "mine")
    text = log(tmp_path, "--max-steps", "3")
    assert f"{unfinished} holds an unfinished run of the same settings, at step 2 of 3" in text
    assert f"--run-dir {unfinished} continues the unfinished one" in text
    assert "unfinished" not in log(tmp_path, "--max-steps", "2")
    assert "unfinished" not in log(tmp_path, "--max-steps", "3", "--init-lr", "0.01")
    for checkpoint in tmp_path.glob("*/checkpoints/0000002"):
        shutil.rmtree(checkpoint)
    assert "unfinished" not in log(tmp_path, "--max-steps", "3")  # nothing to continue


def test_a_finished_run_is_called_finished(run_folder, features, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    argv = [*TRAIN, "--feature-path", str(features), "--run-dir", str(run)]
    for max_steps in ("2", "1"):
        (run / "log.txt").unlink()
        assert train_mask_adan.main([*argv, "--max-steps", max_steps]) == 0
        text = (run / "log.txt").read_text()
        assert "0000002 is finished: it is at step 2, epoch 0.20, and" in text
        assert f"training ends at step {max_steps};" in text
        assert "resumed" not in text


def test_epochs_and_images_are_counted_across_batch_sizes(features, tmp_path):
    argv = [*TRAIN, "--feature-path", str(features), "--run-dir", str(tmp_path / "run")]
    assert train_mask_adan.main([*argv, "--global-batch-size", "20", "--epochs", "3"]) == 0
    argv += ["--allow-config-change", "--epochs"]
    assert train_mask_adan.main([*argv, "4", "--global-batch-size", "12"]) == 0
    assert train_mask_adan.main([*argv, "5", "--global-batch-size", "40"]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(1, 11))
    images = [20, 40, 60, 80, 100, 120, 132, 144, 156, 196]
    assert [row["images_seen"] for row in rows] == images
    epochs = [0.5, 1, 1.5, 2, 2.5, 3, 10 / 3, 11 / 3, 4, 5]
    assert [row["epoch"] for row in rows] == epochs

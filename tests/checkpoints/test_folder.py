"""Checkpoint folders: written completely or not at all, verified, pruned."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from edt.checkpoints.folder import (
    TrainingState,
    list_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    save_checkpoint,
    sweep_checkpoints,
    verify_checkpoint,
)
from edt.utils.errors import UserError


def save(folder: Path, value: float = 0.0, **fields) -> TrainingState:
    """Write a small checkpoint of the step that its folder's name gives."""
    tensors = {
        name: {"x": torch.full((100,), value + i)}
        for i, name in enumerate(("model", "ema", "optimizer", "sampler"))
    }
    values = {"skipped_steps": 3, "config": {"seed": 1}, "optimizer": {"step": 7}, **fields}
    state = TrainingState(step=int(folder.name), tensors=tensors, **values)
    save_checkpoint(folder, state, {"name": "EDT-S/2"})
    return state


def test_a_checkpoint_is_read_as_it_was_saved(tmp_path):
    expected = save(tmp_path / "0000005", 2.0)
    state = read_checkpoint(tmp_path / "0000005")
    for name in ("step", "skipped_steps", "config", "optimizer"):
        assert getattr(state, name) == getattr(expected, name), name
    assert state.tensors.keys() == expected.tensors.keys()
    for name, tensors in expected.tensors.items():
        assert torch.equal(state.tensors[name]["x"], tensors["x"]), name
    assert json.loads((tmp_path / "0000005" / "config.json").read_text()) == {"name": "EDT-S/2"}


def test_damage_is_seen_and_passed_over(tmp_path, caplog):
    for step in (5, 10, 20):
        save(tmp_path / f"{step:07d}", step)
    assert newest_checkpoint(tmp_path).name == "0000020"
    file = tmp_path / "0000020" / "ema.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1  # one bit
    file.write_bytes(content)
    assert newest_checkpoint(tmp_path).name == "0000010"
    assert f"skipping checkpoint 0000020: {file} is damaged" in caplog.text
    (tmp_path / "0000010" / "state.json").unlink()
    assert newest_checkpoint(tmp_path).name == "0000005"
    (tmp_path / "0000005" / "manifest.json").write_text("{")
    assert newest_checkpoint(tmp_path) is None


def test_a_missing_file_and_a_damaged_one_are_named(tmp_path):
    save(tmp_path / "0000005")
    verify_checkpoint(tmp_path / "0000005")
    (tmp_path / "0000005" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="state.json is damaged"):
        verify_checkpoint(tmp_path / "0000005")
    (tmp_path / "0000005" / "state.json").unlink()
    with pytest.raises(UserError, match="state.json is missing"):
        verify_checkpoint(tmp_path / "0000005")


def test_a_failed_write_leaves_the_old_checkpoint_and_nothing_else(tmp_path):
    save(tmp_path / "0000005", 1.0)
    with pytest.raises(TypeError):
        save(tmp_path / "0000010", config={"bad": object()})
    assert os.listdir(tmp_path) == ["0000005"]
    assert newest_checkpoint(tmp_path).name == "0000005"


def test_pruning_keeps_the_last_and_every_nth(tmp_path):
    for step in range(10, 101, 10):
        save(tmp_path / f"{step:07d}")
    prune_checkpoints(tmp_path, keep_last=2, keep_every=40)
    assert [int(path.name) for path in list_checkpoints(tmp_path)] == [40, 80, 90, 100]
    assert sorted(os.listdir(tmp_path)) == ["0000040", "0000080", "0000090", "0000100"]
    prune_checkpoints(tmp_path, keep_last=1, keep_every=1000, keep_steps=(80, None))
    assert [int(path.name) for path in list_checkpoints(tmp_path)] == [80, 100]


def test_a_checkpoint_stays_until_the_new_one_is_in_its_place(tmp_path, monkeypatch):
    save(tmp_path / "0000005", 1.0)

    def disk_fails(rename):
        def renamed(source, target):
            if Path(source).name == ".0000005.tmp":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return rename(source, target)

        return renamed

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, disk_fails(getattr(os, name)))
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        save(tmp_path / "0000005", 2.0)
    assert os.listdir(tmp_path) == ["0000005"]
    assert read_checkpoint(tmp_path / "0000005").tensors["model"]["x"][0] == 1
    monkeypatch.undo()
    save(tmp_path / "0000005", 2.0)
    assert os.listdir(tmp_path) == ["0000005"]
    assert read_checkpoint(tmp_path / "0000005").tensors["model"]["x"][0] == 2


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match="cannot write the checkpoint .*0000005"):
        save(tmp_path / "checkpoints" / "0000005")


def test_what_killed_processes_left_is_swept(tmp_path):
    for step in (5, 10, 20, 30):
        save(tmp_path / f"{step:07d}", step)
    (tmp_path / "0000005").rename(tmp_path / ".0000005.old")  # killed before the new one came
    (tmp_path / "0000010").rename(tmp_path / ".0000010.old")  # killed while it was removed
    (tmp_path / ".0000010.old" / "state.json").unlink()
    (tmp_path / "0000020").rename(tmp_path / ".0000020.old")  # killed after the new one came
    save(tmp_path / "0000020", 21.0)
    (tmp_path / "0000030").rename(tmp_path / ".0000030.tmp")  # killed while it was written
    (tmp_path / ".notes").mkdir()
    sweep_checkpoints(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".notes", "0000005", "0000020"]
    verify_checkpoint(tmp_path / "0000005")
    assert read_checkpoint(tmp_path / "0000020").tensors["model"]["x"][0] == 21

"""The 50,000-image script: labels, names of folders, and the bar of one process among many."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import SAMPLE, fails, with_classes

import image_generator_ddp


@pytest.fixture
def sample(trained, tmp_path, capsys):
    """A function that samples 7 images of a checkpoint and returns the path of the .npz."""

    def run(*more: object, checkpoint: Path = trained) -> Path:
        argv = [*SAMPLE, "--ckpt", checkpoint, "--output-dir", tmp_path / "out", *more]
        assert image_generator_ddp.main([str(part) for part in argv]) == 0
        return Path(capsys.readouterr().out.splitlines()[-1])

    return run


def labels_of(path: Path) -> list[int]:
    return np.load(path.with_suffix(".labels.npy")).tolist()


def test_labels_belong_to_their_npz(sample):
    seven, five = sample(), sample("--num-images", 5)
    assert seven.parent == five.parent
    for path, count in ((seven, 7), (five, 5)):
        assert len(np.load(path)["arr_0"]) == count
        assert len(labels_of(path)) == count
    assert labels_of(seven)[:5] == labels_of(five)


def test_labels_by_name(sample, trained, tmp_path, capsys):
    checkpoint = with_classes(trained, tmp_path / "checkpoint", ["2", "1", "café"])
    by_name = sample("--labels", "CAFÉ,1,name:2", checkpoint=checkpoint)
    assert labels_of(by_name) == [2, 1, 0, 2, 1, 0, 2]
    assert json.loads((by_name.parent / "recipe.json").read_text())["labels"] == "2,1,0"
    # The classes by number, into the same folder.
    by_number = sample("--labels", "index:2,1,index:0", "--num-images", 5, checkpoint=checkpoint)
    assert by_number.parent == by_name.parent
    argv = ["--ckpt", checkpoint, *SAMPLE, "--output-dir", tmp_path / "refused"]
    for labels, message in (
        ("1,2", "class '2' is ambiguous: 'café' has this number and class 0 has this name"),
        ("cafe", "did you mean café?"),
        ("1,,2", "cannot read labels"),
    ):
        assert message in fails(image_generator_ddp.main, [*argv, "--labels", labels], capsys)
    assert not (tmp_path / "refused").exists()


def test_a_list_of_numbers_is_recorded_as_it_was_given(sample):
    """A folder of an earlier version holds it so, and must be found equal."""
    path = sample("--labels", "2, 00")
    assert labels_of(path) == [2, 0, 2, 0, 2, 0, 2]
    assert json.loads((path.parent / "recipe.json").read_text())["labels"] == "2, 00"


def test_labels_null_sample_without_classes(sample):
    path = sample("--labels", "null", "--cfg-scale", 1)
    assert labels_of(path) == [3] * 7
    images = np.load(path)["arr_0"]
    assert not any(
        np.array_equal(
            images, np.load(sample("--labels", i, "--output-dir", path.parent / i))["arr_0"]
        )
        for i in "012"
    )


def test_a_long_name_of_a_checkpoint_is_shortened(sample, trained, tmp_path):
    folders = []
    for name in ("x" * 240, "x" * 239 + "y", "é" * 110):
        checkpoint = shutil.copytree(trained, tmp_path / name)
        path = sample("--amm", checkpoint=checkpoint)
        assert len(os.fsencode(path.parent.name)) <= 255
        assert path.parent.name.endswith("-amm-4-6")
        folders.append(path.parent)
    assert len(set(folders)) == 3
    assert sample("--amm", checkpoint=tmp_path / ("x" * 240)).parent == folders[0]


def test_the_bar_of_one_process_among_two_ends_full(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    argv = [*SAMPLE, "--ckpt", trained, "--output-dir", tmp_path, "--per-proc-batch-size", 2]
    printed = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert image_generator_ddp.main([str(part) for part in argv]) == 0
        printed.append(capsys.readouterr())
    last_bar = printed[0].err.splitlines()[-1].rpartition("\r")[2]
    assert last_bar.startswith("process 1 of 2: 100%|")
    assert "| 4/4 [" in last_bar
    assert "4 of 7 by all]" in last_bar
    assert printed[0].out == ""
    assert printed[1].err == ""
    assert len(labels_of(Path(printed[1].out.strip()))) == 7

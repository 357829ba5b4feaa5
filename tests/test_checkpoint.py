import argparse
import json
import os
import shutil

import golden_rule
import pytest
import torch

from edt.checkpoints.folder import (
    build,
    list_checkpoints,
    load_model,
    newest_checkpoint,
    prune_checkpoints,
    read_release,
    save_checkpoint,
)
from edt.utils.errors import UserError


@pytest.fixture
def tiny():
    return golden_rule.fill(build("EDT-Tiny/2", input_size=16, num_classes=5)).eval()


def save_release(path, model, args=None, prefix=""):
    weights = {prefix + name: value for name, value in model.state_dict().items()}
    half = {name: value / 2 for name, value in weights.items()}
    torch.save(
        {
            "model": half,
            "ema": weights,
            "opt": {},
            "args": args or argparse.Namespace(model="EDT", lr=1e-3),
        },
        path,
    )


def same(a, b) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_released_files_load(tmp_path, tiny, prefix):
    save_release(tmp_path / "full.pt", tiny, prefix=prefix)
    model, notes = load_model(tmp_path / "full.pt", "EDT-Tiny/2")
    assert same(model, tiny) and notes == {} and not model.training
    assert model.config == tiny.config
    assert not same(load_model(tmp_path / "full.pt", which="model")[0], tiny)
    torch.save(
        {prefix + name: value for name, value in tiny.state_dict().items()}, tmp_path / "bare.pt"
    )
    assert same(load_model(tmp_path / "bare.pt")[0], tiny)


def test_the_layout_is_read_off_the_tensors(tmp_path):
    other = build("EDT-Tiny/2", input_size=16, depths=(2, 1, 3, 1, 1))
    save_release(tmp_path / "a.pt", other)
    assert load_model(tmp_path / "a.pt", "EDT-Tiny/2")[0].config.depths == (2, 1, 3, 1, 1)


def test_the_wrong_model_is_named_with_both_shapes(tmp_path, tiny):
    save_release(tmp_path / "a.pt", tiny)
    with pytest.raises(UserError, match=r"pos_embed is \(1, 64, 104\), not \(1, 64, 312\)"):
        load_model(tmp_path / "a.pt", "EDT-S/2")
    with pytest.raises(UserError, match=r"embedding_table.weight is \(6, 104\), not \(1001, 104\)"):
        load_model(tmp_path / "a.pt", num_classes=1000)
    with pytest.raises(UserError, match="unknown model 'EDT-M/2'"):
        load_model(tmp_path / "a.pt", "EDT-M/2")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "b.pt")
    with pytest.raises(UserError, match="not an EDT"):
        load_model(tmp_path / "b.pt")
    broken = tiny.state_dict()
    del broken["final_layer.linear.bias"]
    torch.save(broken, tmp_path / "c.pt")
    with pytest.raises(UserError, match="final_layer.linear.bias is absent"):
        load_model(tmp_path / "c.pt")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_hostile_files_run_nothing(tmp_path, tiny):
    torch.save({"model": Hostile(tmp_path / "ran")}, tmp_path / "a.pt")
    save_release(tmp_path / "b.pt", tiny, argparse.Namespace(model=Hostile(tmp_path / "ran")))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(UserError, match="more than tensors"):
            load_model(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"not a checkpoint")
    (tmp_path / "empty").mkdir()
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("a.pt", "empty", "list.pt", "absent"):
        with pytest.raises(UserError, match=name):
            load_model(tmp_path / name)
    with pytest.raises(UserError, match="holds a list"):
        read_release(tmp_path / "list.pt")


def checkpoint(folder, value: float):
    save_checkpoint(
        folder, {"ema": {"x": torch.full((100,), value)}}, {"state": {"step": int(folder.name)}}
    )


def test_damage_is_seen_and_passed_over(tmp_path, caplog):
    for step in (5, 10, 20):
        checkpoint(tmp_path / f"{step:07d}", step)
    assert newest_checkpoint(tmp_path).name == "0000020"
    file = tmp_path / "0000020" / "ema.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1  # one bit
    file.write_bytes(content)
    assert newest_checkpoint(tmp_path).name == "0000010"
    assert "0000020" in caplog.text
    (tmp_path / "0000010" / "state.json").unlink()
    assert newest_checkpoint(tmp_path).name == "0000005"
    (tmp_path / "0000005" / "manifest.json").write_text("{")
    assert newest_checkpoint(tmp_path) is None


def test_a_failed_write_leaves_the_old_checkpoint_and_nothing_else(tmp_path):
    checkpoint(tmp_path / "0000005", 1.0)
    with pytest.raises(TypeError):
        save_checkpoint(
            tmp_path / "0000010", {"ema": {"x": torch.zeros(2)}}, {"state": {"bad": object()}}
        )
    assert os.listdir(tmp_path) == ["0000005"]
    assert newest_checkpoint(tmp_path).name == "0000005"


def test_pruning_keeps_the_last_and_every_nth(tmp_path):
    for step in range(10, 101, 10):
        checkpoint(tmp_path / f"{step:07d}", 0.0)
    prune_checkpoints(tmp_path, keep_last=2, keep_every=40)
    assert [int(path.name) for path in list_checkpoints(tmp_path)] == [40, 80, 90, 100]
    assert sorted(os.listdir(tmp_path)) == ["0000040", "0000080", "0000090", "0000100"]


def test_a_run_folder_gives_its_newest_weights(run_folder, tmp_path):
    model, notes = load_model(run_folder)
    assert same(model, load_model(run_folder / "checkpoints" / "0000002")[0])
    assert (
        notes["features"]["classes"] == ["ant", "bee", "cat"]
        and notes["features"]["vae"] == "pixels"
    )
    copied = shutil.copytree(
        run_folder / "checkpoints" / "0000002", tmp_path / "shared"
    )  # no training state needed
    for name in (
        "optimizer.safetensors",
        "sampler.safetensors",
        "state.json",
        "model.safetensors",
        "manifest.json",
    ):
        (copied / name).unlink()
    assert same(load_model(copied)[0], model) and same(
        load_model(copied / "ema.safetensors")[0], model
    )
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(
        json.dumps({**config, "model": {**config["model"], "colour": 3}})
    )
    with pytest.raises(UserError, match="unknown model configuration colour"):
        load_model(copied)

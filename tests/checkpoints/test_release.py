"""The release's .pt files load, and hostile or unreadable ones are refused."""

import argparse
import os

import golden_rule
import pytest
import torch

from edt.checkpoints.loading import load_model
from edt.checkpoints.release import read_release
from edt.registry import create_model
from edt.utils.errors import UserError


@pytest.fixture
def tiny():
    return golden_rule.fill(create_model("EDT-Tiny/2", input_size=16, num_classes=5)).eval()


def save_release(path, model, args=None, prefix=""):
    """Write a file as the release does. Its EMA is the model; its model is half of that."""
    weights = {prefix + name: value for name, value in model.state_dict().items()}
    half = {name: value / 2 for name, value in weights.items()}
    args = args or argparse.Namespace(model="EDT", lr=1e-3)
    torch.save({"model": half, "ema": weights, "opt": {}, "args": args}, path)


def same(a, b) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_released_files_load(tmp_path, tiny, prefix):
    save_release(tmp_path / "full.pt", tiny, prefix=prefix)
    model, info = load_model(tmp_path / "full.pt", "EDT-Tiny/2")
    assert same(model, tiny)
    assert not model.training
    assert model.config == tiny.config
    assert info.weights_file == tmp_path / "full.pt"
    assert info.name is None
    assert info.features.to_dict() == {}
    assert not same(load_model(tmp_path / "full.pt", weights="model")[0], tiny)
    bare = {prefix + name: value for name, value in tiny.state_dict().items()}
    torch.save(bare, tmp_path / "bare.pt")
    assert same(load_model(tmp_path / "bare.pt")[0], tiny)


def test_the_layout_is_read_off_the_tensors(tmp_path):
    other = create_model("EDT-Tiny/2", input_size=16, depths=(2, 1, 3, 1, 1))
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
    """Makes a folder when it is unpickled."""

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

"""Models from run folders and checkpoint folders: which file is read, and what is verified."""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_script, update_manifest
from safetensors.torch import load_file, save_file

from edt.checkpoints.loading import load_model, read_weights
from edt.utils.errors import UserError

# The bytes that load_model reads. The model is loaded once before, so that its imports are done.
READ_BYTES = """
import sys
from edt.checkpoints.loading import load_model

def read_bytes():
    return int(open("/proc/self/io").readline().split()[1])  # rchar

load_model(sys.argv[2])
before = read_bytes()
load_model(sys.argv[1])
print(read_bytes() - before)
"""


def same(a, b) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def damage(file: Path) -> None:
    """Change one bit of the last tensor."""
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


@pytest.fixture
def run_of_two(run_folder: Path, tmp_path: Path) -> Path:
    """A run with the checkpoints 2 and 4; in checkpoint 4, every EMA weight is larger by 1."""
    run = tmp_path / "run"
    for step in (2, 4):
        shutil.copytree(run_folder / "checkpoints" / "0000002", run / "checkpoints" / f"{step:07d}")
    newest = run / "checkpoints" / "0000004"
    weights = load_file(newest / "ema.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, newest / "ema.safetensors")
    update_manifest(newest)
    return run


def test_a_run_folder_gives_its_newest_weights(run_of_two):
    model, info = load_model(run_of_two)
    newest = run_of_two / "checkpoints" / "0000004"
    assert info.weights_file == newest / "ema.safetensors"
    assert (
        info.weights_sha256
        == json.loads((newest / "manifest.json").read_text())["ema.safetensors"][1]
    )
    assert info.name == "EDT-Tiny/2"
    assert info.features.classes == ["ant", "bee", "cat"]
    assert info.features.vae == "pixels"
    assert same(model, load_model(newest)[0])
    assert not same(model, load_model(run_of_two / "checkpoints" / "0000002")[0])


def test_sampling_needs_no_training_state(run_folder, tmp_path):
    checkpoint = run_folder / "checkpoints" / "0000002"
    copied = shutil.copytree(checkpoint, tmp_path / "shared")
    for name in ("optimizer.safetensors", "sampler.safetensors", "state.json"):
        (copied / name).unlink()
    for name in ("model.safetensors", "manifest.json"):
        (copied / name).unlink()
    model = load_model(checkpoint)[0]
    assert same(load_model(copied)[0], model)
    assert same(load_model(copied / "ema.safetensors")[0], model)


def test_an_unknown_key_of_the_configuration_is_named(run_folder, tmp_path):
    copied = shutil.copytree(run_folder / "checkpoints" / "0000002", tmp_path / "shared")
    config = json.loads((copied / "config.json").read_text())
    config["model"]["colour"] = 3
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="unknown model configuration colour"):
        load_model(copied)


def test_loading_a_run_reads_one_file_once_and_maps_it(run_of_two):
    """The file is hashed, which reads it once; the tensors come through a memory map."""
    file = run_of_two / "checkpoints" / "0000004" / "ema.safetensors"
    other = run_of_two / "checkpoints" / "0000002"
    done = run_script(sys.executable, "-c", READ_BYTES, run_of_two, other)
    assert done.returncode == 0, done.stderr
    size, read_bytes = os.path.getsize(file), int(done.stdout)
    assert size <= read_bytes <= 1.2 * size + 1_000_000


def test_a_damaged_ema_gives_way_to_the_checkpoint_before(run_of_two, caplog):
    file = run_of_two / "checkpoints" / "0000004" / "ema.safetensors"
    damage(file)
    model, info = load_model(run_of_two)
    before = run_of_two / "checkpoints" / "0000002"
    assert info.weights_file == before / "ema.safetensors"
    assert same(model, load_model(before)[0])
    assert f"skipping checkpoint 0000004: {file} is damaged" in caplog.text
    damage(before / "ema.safetensors")
    with pytest.raises(UserError, match="every checkpoint in .* is damaged"):
        load_model(run_of_two)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_that_are_not_finite_are_named_at_loading(value, suffix, run_folder, tmp_path):
    weights = load_file(run_folder / "checkpoints" / "0000002" / "ema.safetensors")
    for name in ("x_embedder.proj.weight", "blocks.1.mlp.fc1.bias"):
        weights[name].view(-1)[-1] = value
    file = tmp_path / f"broken{suffix}"
    if suffix == ".pt":
        torch.save({"ema": weights}, file)
    else:
        save_file(weights, file)
    message = rf"{file}: 2 of {len(weights)} tensors hold NaN or infinity, .*(x_emb|blocks\.1)"
    with pytest.raises(UserError, match=message):
        load_model(file)
    with pytest.raises(UserError, match=message):
        read_weights(file)  # what --init-from reads


def test_a_damaged_optimizer_does_not_matter_for_sampling(run_of_two, caplog):
    damage(run_of_two / "checkpoints" / "0000004" / "optimizer.safetensors")
    info = load_model(run_of_two)[1]
    assert info.weights_file == run_of_two / "checkpoints" / "0000004" / "ema.safetensors"
    assert caplog.text == ""


def test_a_named_checkpoint_that_was_changed_is_a_warning(run_of_two, caplog):
    """Users edit a file that they name on purpose; it is loaded as it is."""
    checkpoint = run_of_two / "checkpoints" / "0000004"
    expected = load_model(checkpoint)[0]
    assert caplog.text == ""
    damage(checkpoint / "ema.safetensors")
    model, info = load_model(checkpoint)
    assert info.weights_file == checkpoint / "ema.safetensors"
    assert not same(model, expected)
    assert f"{checkpoint / 'ema.safetensors'} differs from its manifest.json" in caplog.text


# ---------------------------------------------------------------------------------------------
# Files that users name


def test_what_was_read_is_recorded(run_of_two, caplog):
    """``--weights`` chooses in a folder. A file that is named holds what it holds."""
    checkpoint = run_of_two / "checkpoints" / "0000004"
    for path, asked, read in (
        (run_of_two, "model", "model"),
        (checkpoint, "ema", "ema"),
        (checkpoint / "model.safetensors", "ema", "model"),
        (checkpoint / "ema.safetensors", "model", "ema"),
    ):
        info = read_weights(path, asked).info
        assert info.weights == read
        assert info.weights_file == checkpoint / f"{read}.safetensors"
    assert "ema.safetensors holds EMA weights; --weights model is ignored" in caplog.text
    renamed = shutil.copy(checkpoint / "ema.safetensors", checkpoint / "EDT-Tiny.safetensors")
    assert read_weights(renamed).info.weights == "EDT-Tiny.safetensors"


def test_a_file_of_the_other_suffix_loads_or_says_so(run_of_two, tmp_path):
    file = run_of_two / "checkpoints" / "0000004" / "ema.safetensors"
    tensors = read_weights(shutil.copy(file, tmp_path / "renamed.pt")).tensors
    assert tensors.keys() == load_file(file).keys()
    torch.save(load_file(file), tmp_path / "renamed.safetensors")
    with pytest.raises(UserError, match="was written by torch.save; rename it to renamed.pt"):
        load_model(tmp_path / "renamed.safetensors")


@pytest.fixture
def sharded(run_of_two: Path, tmp_path: Path) -> Path:
    """The index of the run's EMA weights in three shards, with its config.json."""
    checkpoint = run_of_two / "checkpoints" / "0000004"
    weights = load_file(checkpoint / "ema.safetensors")
    folder = tmp_path / "sharded"
    folder.mkdir()
    weight_map = {}
    for i in range(3):
        shard = f"weights-{i + 1:05d}-of-00003.safetensors"
        names = list(weights)[i::3]
        save_file({name: weights[name] for name in names}, folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    index = folder / "weights.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    shutil.copy(checkpoint / "config.json", folder)
    return index


def test_a_sharded_file_loads_through_its_index(sharded, run_of_two):
    model, info = load_model(sharded)
    assert same(model, load_model(run_of_two)[0])
    assert info.name == "EDT-Tiny/2"
    assert info.weights == sharded.name
    shard = sharded.with_name("weights-00002-of-00003.safetensors")
    weights = load_file(shard)
    save_file({name: value + 1 for name, value in weights.items()}, shard)
    assert read_weights(sharded).info.weights_sha256 != info.weights_sha256
    torch.save(weights, shard.with_suffix(".bin"))
    shard.unlink()
    text = sharded.read_text().replace(shard.name, shard.with_suffix(".bin").name)
    sharded.write_text(text)  # as pytorch_model.bin.index.json is
    assert read_weights(sharded).tensors.keys() == model.state_dict().keys()
    sharded.rename(sharded.with_name("ema.safetensors.index.json"))
    assert read_weights(sharded.parent).info.weights == "ema"


def test_one_shard_names_the_index(sharded):
    with pytest.raises(UserError, match=r"is shard 2 of 3, .*/weights.safetensors.index.json"):
        load_model(sharded.with_name("weights-00002-of-00003.safetensors"))


@pytest.mark.parametrize("name", ["../ema.safetensors", "weights.safetensors.index.json"])
def test_an_index_lists_files_of_weights_beside_it(name, sharded):
    shutil.copy(sharded.with_name("weights-00002-of-00003.safetensors"), sharded.parent.parent)
    sharded.write_text(json.dumps({"weight_map": {"pos_embed": name}}))
    with pytest.raises(UserError, match=f"{name}"):
        load_model(sharded)


def test_a_missing_shard_is_named(sharded):
    sharded.with_name("weights-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="lists 3 shards, and weights-00002-of-00003.safetensors"):
        load_model(sharded)


def test_a_shard_gives_only_what_the_index_lists_in_it(sharded, run_of_two):
    expected = load_model(run_of_two)[0]
    first, last = (sharded.with_name(f"weights-0000{i}-of-00003.safetensors") for i in (1, 3))
    weights = load_file(last)
    stray = {name: value + 1 for name, value in load_file(first).items()}
    save_file({**weights, **stray}, last)
    assert same(load_model(sharded)[0], expected)
    del weights["pos_embed" if "pos_embed" in weights else next(iter(weights))]
    save_file(weights, last)
    with pytest.raises(UserError, match=rf"{last} lacks \S+, which {sharded} lists"):
        load_model(sharded)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("features", None, "holds None in place of an object; is it damaged"),
        ("features", [1], r"holds \[1\] in place of an object"),
        ("features", {"image_size": "16"}, "its image_size is '16', of a wrong type"),
        ("input_size", "16", "its input_size is '16', of a wrong type; is it damaged"),
        ("num_heads", 1, "its num_heads is 1, of a wrong type"),
        ("depths", [2, "2", 2, 3, 3], "its depths is .*, of a wrong type"),
        ("num_classes", True, "its num_classes is True, of a wrong type"),
        ("amm", [[1], [2]], "is damaged"),
        ("family", ["EDT"], "is damaged"),
    ],
)
def test_a_damaged_config_is_named(key, value, message, run_folder, tmp_path):
    checkpoint = run_folder / "checkpoints" / "0000002"
    for name in ("ema.safetensors", "config.json"):
        shutil.copy(checkpoint / name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (config if key == "features" else config["model"])[key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"{tmp_path / 'config.json'}.*{message}"):
        load_model(tmp_path)


def test_a_path_that_is_not_utf8_is_refused(run_of_two, tmp_path):
    source = run_of_two / "checkpoints" / "0000004" / "ema.safetensors"
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    shutil.copy(source, folder / "a.safetensors")
    torch.save(load_file(source), folder / "b.pt")
    for name in ("a.safetensors", "b.pt"):
        with pytest.raises(UserError, match=f"{name} is not UTF-8, which files of weights need"):
            load_model(folder / name)

"""The release's .pt files load, and hostile or unreadable ones are refused."""

import argparse
import os
import pathlib
import re

import golden_rule
import pytest
import torch
from safetensors.torch import save_file

from edt.checkpoints.loading import load_model, read_weights
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


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
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


@pytest.mark.parametrize(
    "prefix",
    [
        "module._orig_mod.",
        "module.module.",
        "model.",
        "ema_model.module.",
        "model.module.",
        "net.",
        "_module.",
        "_forward_module.module.",
    ],
)
def test_prefixes_are_stripped_until_none_is_left(prefix, tmp_path, tiny):
    expected = tiny.state_dict()
    torch.save({prefix + name: value for name, value in expected.items()}, tmp_path / "a.pt")
    assert read_weights(tmp_path / "a.pt").tensors.keys() == expected.keys()


def test_wrappers_of_single_blocks_are_no_part_of_a_name(tmp_path, tiny):
    for wrapper in ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"):
        expected = tiny.state_dict()
        weights = {
            re.sub(r"^blocks\.(\d+)", rf"blocks.\1.{wrapper}", name): value
            for name, value in expected.items()
        }
        assert weights.keys() != expected.keys()
        torch.save(weights, tmp_path / "a.pt")
        assert read_weights(tmp_path / "a.pt").tensors.keys() == expected.keys()


@pytest.mark.parametrize("kind", ["entry.pt", "bare.pt", "bare.safetensors"])
def test_what_is_no_weight_is_left_out_and_named(kind, tmp_path, tiny, caplog):
    average = torch.optim.swa_utils.AveragedModel(tiny).state_dict()
    assert "n_averaged" in average
    average |= {"decay": torch.tensor(0.999), "num_updates": torch.tensor([7])}
    path = tmp_path / kind
    if kind == "bare.safetensors":
        save_file(average, path)
    else:
        average["decay"] = 0.999
        torch.save({"ema": average, "opt": {}} if kind == "entry.pt" else average, path)
    assert read_weights(path).tensors.keys() == tiny.state_dict().keys()
    (message,) = caplog.messages
    assert message.startswith(f"{path}: left out what is no weight: ")
    assert {*message.rpartition(": ")[2].split(", ")} == {"n_averaged", "decay", "num_updates"}


def test_two_sets_of_weights_in_one_are_refused(tmp_path, tiny):
    both = {f"{prefix}.pos_embed": torch.zeros(2) for prefix in ("model", "ema_model")}
    torch.save(both, tmp_path / "a.pt")
    with pytest.raises(UserError, match="holds pos_embed twice, once as ema_model.pos_embed"):
        load_model(tmp_path / "a.pt")


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


@pytest.mark.parametrize(
    ("name", "layout", "other"),
    [
        ("DiT-S/2", {"depth": 1}, "MDTv2-S/2"),
        ("MDTv2-S/2", {"depth": 3, "decode_layer": 1}, "EDT-S/2"),
    ],
)
def test_official_files_of_the_baselines_load(name, layout, other, tmp_path):
    """DiT and MDTv2 publish bare state dicts; their training scripts save model and ema."""
    torch.manual_seed(0)
    saved = create_model(name, input_size=8, num_classes=5, **layout)
    torch.save(saved.state_dict(), tmp_path / "bare.pt")
    save_release(tmp_path / "full.pt", saved)
    for file in ("bare.pt", "full.pt"):
        for model_name in (None, name):
            model, _ = load_model(tmp_path / file, model_name)
            assert same(model, saved)
            assert model.config == saved.config
    assert not same(load_model(tmp_path / "full.pt", weights="model")[0], saved)
    family = name.partition("-")[0]
    with pytest.raises(UserError, match=f"model of the family {family}, not {other}"):
        load_model(tmp_path / "bare.pt", other)
    with pytest.raises(UserError, match=r"not \(1, 16, 768\)"):
        load_model(tmp_path / "bare.pt", name.replace("S", "B"))
    with pytest.raises(UserError, match=r"embedding_table.weight is \(6, 384\)"):
        load_model(tmp_path / "bare.pt", num_classes=1000)


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_hostile_files_run_nothing(zipped, tmp_path, tiny):
    content = {"model": Hostile(tmp_path / "ran")}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    save_release(tmp_path / "b.pt", tiny, argparse.Namespace(model=Hostile(tmp_path / "ran")))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(UserError, match=r"more than tensors \(posix.mkdir\)"):
            load_model(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_another_class_is_named(tmp_path):
    torch.save({"model": {}, "args": {"path": pathlib.PurePosixPath("x")}}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"pathlib\.\S*PurePosixPath\) and is not loaded"):
        load_model(tmp_path / "a.pt")


def test_files_of_the_old_format_load(tmp_path, tiny):
    old = tmp_path / "old.pt"
    content = {"ema": tiny.state_dict(), "args": argparse.Namespace(lr=1e-3)}
    torch.save(content, old, _use_new_zipfile_serialization=False)
    model, info = load_model(old)
    assert same(model, tiny)
    assert info.weights == "ema"
    content = old.read_bytes()
    for size in (200, len(content) // 2, len(content) - 7):
        old.write_bytes(content[:size])
        with pytest.raises(UserError, match="old.pt is damaged or cut short"):
            load_model(old)


def test_what_was_read_is_recorded(tmp_path, tiny):
    save_release(tmp_path / "full.pt", tiny)
    assert load_model(tmp_path / "full.pt")[1].weights == "ema"
    assert load_model(tmp_path / "full.pt", weights="model")[1].weights == "model"
    torch.save(tiny.state_dict(), tmp_path / "ema.pt")
    assert load_model(tmp_path / "ema.pt")[1].weights == "ema.pt"


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"not a checkpoint")
    (tmp_path / "page.pt").write_text("<html>")
    (tmp_path / "empty").mkdir()
    torch.save([1, 2], tmp_path / "list.pt")
    for name, message in (
        ("a.pt", "a.pt was written neither by torch.save"),
        ("page.pt", "page.pt is an HTML page"),
        ("empty", "no ema.safetensors in .*empty"),
        ("list.pt", "list.pt is not a checkpoint: it holds a list"),
        ("absent", "no checkpoint at .*absent"),
    ):
        with pytest.raises(UserError, match=message):
            load_model(tmp_path / name)


def test_a_file_without_the_entry_says_what_it_holds(tmp_path):
    torch.save({"params": {"x": torch.zeros(2)}, "epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"no named tensors as ema \(it holds params, epoch\)"):
        load_model(tmp_path / "a.pt")


def test_the_only_state_dict_of_a_lightning_file_is_taken(tmp_path, tiny):
    weights = {f"model.{name}": value for name, value in tiny.state_dict().items()}
    content = {"state_dict": weights, "epoch": 3, "optimizer_states": [], "loops": {"x": 1}}
    torch.save(content, tmp_path / "a.pt")
    model, info = load_model(tmp_path / "a.pt")
    assert same(model, tiny)
    assert info.weights == "a.pt"
    torch.save({**content, "state_dict_ema": weights}, tmp_path / "b.pt")
    with pytest.raises(UserError, match="no named tensors as ema .it holds state_dict, epoch"):
        load_model(tmp_path / "b.pt")


@pytest.mark.filterwarnings("ignore")  # of torch, that quantized and sparse tensors are on the way
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: (100 * x).to(torch.int8), "is torch.int8; quantized weights are not supported"),
        (lambda x: x > 0, "is torch.bool; .*; export float ones"),
        (lambda x: x.to(torch.complex64), "is torch.complex64"),
        (lambda x: torch.quantize_per_tensor(x, 0.01, 0, torch.qint8), "is torch.qint8"),
        (lambda x: x.to("meta"), "is on the meta device"),
        (lambda x: x.to_sparse(), r"is no dense tensor \(torch.sparse_coo\)"),
    ],
)
def test_weights_that_are_no_plain_numbers_are_refused(change, message, tmp_path, tiny):
    file, weights = tmp_path / "a.pt", tiny.state_dict()
    weights["x_embedder.proj.bias"] = change(weights["x_embedder.proj.bias"])
    torch.save({"ema": weights}, file)
    with pytest.raises(UserError, match=f"{file}: x_embedder.proj.bias {message}"):
        read_weights(file)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_every_float_type_loads_as_its_own_numbers(dtype, suffix, tmp_path, tiny):
    rounded = {name: value.to(dtype) for name, value in tiny.state_dict().items()}
    file = tmp_path / f"a{suffix}"
    save_file(rounded, file) if suffix == ".safetensors" else torch.save(rounded, file)
    loaded = load_model(file)[0].state_dict()
    assert all(torch.equal(loaded[name], value.float()) for name, value in rounded.items())
    if dtype.itemsize == 1:
        scaled = {**rounded, "pos_embed_scale": torch.ones(1)}
        save_file(scaled, file) if suffix == ".safetensors" else torch.save(scaled, file)
        with pytest.raises(UserError, match="8-bit weights with scales, such as pos_embed_scale"):
            load_model(file)
    integers = {**rounded, "pos_embed": rounded["pos_embed"].to(torch.int32)}
    save_file(integers, file) if suffix == ".safetensors" else torch.save(integers, file)
    with pytest.raises(UserError, match=f"{file}: pos_embed is torch.int32"):
        load_model(file)


def test_a_key_that_is_no_name_is_refused(tmp_path, tiny):
    torch.save({**tiny.state_dict(), 0: torch.zeros(2, 2)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="a.pt is no state dict: its key 0 is no name"):
        load_model(tmp_path / "a.pt")


def test_tensors_of_no_model_are_named(tmp_path):
    weights = {f"denoiser.{name}": torch.zeros(2, 2) for name in "abcd"}
    torch.save(weights, tmp_path / "a.pt")
    message = f"{tmp_path / 'a.pt'}: the checkpoint is not an EDT.*denoiser.a, denoiser.b, denoi"
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "a.pt")


def test_changed_bytes_are_noticed(tmp_path, tiny):
    """A file of full length, whose archive has a checksum of each tensor."""
    file = tmp_path / "a.pt"
    torch.save(tiny.state_dict(), file)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="a.pt is damaged .Bad CRC-32"):
        load_model(file)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tiny.state_dict(), file)
    finally:
        torch.serialization.set_crc32_options(before)
    assert same(load_model(file)[0], tiny)

"""Files that are no weights say what they are."""

import json
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from edt.utils.errors import UserError
from edt.utils.weights_format import weights_format

TENSORS = {"x": torch.arange(1000.0)}


def write(name: str, path: Path) -> None:
    """Write one of the files that the tests below name."""
    legacy = {"_use_new_zipfile_serialization": False}
    texts = {
        "page": "\n<!DOCTYPE html><title>Sign in</title>",
        "pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "json": '{"error": "not found"}',
        "text": "weights",
        "index": json.dumps({"weight_map": {"x": "a.safetensors"}}),
        "empty": "",
    }
    if name in texts:
        path.write_text(texts[name])
    elif name in ("npz", "script"):
        members = {"npz": ["arr_0.npy"], "script": ["a/data.pkl", "a/constants.pkl"]}[name]
        with zipfile.ZipFile(path, "w") as archive:
            for member in members:
                archive.writestr(member, "")
    elif name == "tar":
        with tarfile.open(path, "w") as archive:
            archive.add(__file__, "a.py")
    elif name == "gzip":
        path.write_bytes(b"\x1f\x8b\x08\x00")
    elif name == "pickle":
        path.write_bytes(b"\x80\x04K\x01.")
    elif name == "safetensors":
        save_file(TENSORS, path)
    elif name == "damaged safetensors":
        save_file(TENSORS, path)
        content = bytearray(path.read_bytes())
        content[20] = 0
        path.write_bytes(content)
    else:
        torch.save(TENSORS, path, **(legacy if name == "old torch" else {}))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torch", "torch"),
        ("old torch", "torch"),
        ("safetensors", "safetensors"),
        ("index", "index"),
    ],
)
def test_weights_are_known_by_their_bytes(name, expected, tmp_path):
    write(name, tmp_path / "file")
    assert weights_format(tmp_path / "file") == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("page", "is an HTML page"),
        ("pointer", "is a Git LFS pointer, .* git lfs pull"),
        ("json", "is a JSON file and holds no weights"),
        ("text", "neither by torch.save nor as safetensors"),
        ("empty", "is empty; download it again"),
        ("npz", "is a zip archive, but not one of torch.save"),
        ("script", "is a TorchScript program"),
        ("tar", "is a tar archive; unpack it"),
        ("gzip", "is a gzip archive; unpack it"),
        ("pickle", "is a Python pickle, which could run code"),
        ("damaged safetensors", "is a damaged safetensors file"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_other_files_say_what_they_are(name, message, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    write(name, path)
    with pytest.raises(
        UserError, match=f"weights{suffix} {message}|weights{suffix} was .*{message}"
    ):
        weights_format(path)


@pytest.mark.parametrize("header_size", [0x180, 0x4B50, 0x8B1F])
def test_a_safetensors_file_may_begin_like_another_format(header_size, tmp_path):
    """The length of its header stands first: here with the bytes of a pickle, a zip and a gzip."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    content = header_size.to_bytes(8, "little") + header.ljust(header_size) + bytes(4)
    (tmp_path / "file").write_bytes(content)
    assert weights_format(tmp_path / "file") == "safetensors"


@pytest.mark.parametrize("name", ["torch", "safetensors"])
@pytest.mark.parametrize("part", [0.01, 0.5, 0.999])
def test_a_file_that_is_cut_short_says_so(name, part, tmp_path):
    write(name, tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(content[: int(part * len(content))])
    with pytest.raises(
        UserError, match=f"file is cut short after {int(part * len(content))} bytes"
    ):
        weights_format(tmp_path / "file")


def test_an_archive_whose_table_of_contents_is_damaged_is_not_whole(tmp_path):
    write("torch", tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(content[:1000] + b"PK\x05\x06" + bytes(range(1, 17)) + b"\0\0")
    with pytest.raises(UserError, match="is cut short"):
        weights_format(tmp_path / "file")


def test_a_folder_and_a_missing_file_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=f"cannot read {path}"):
            weights_format(path)

"""What a file of weights is, read off its bytes and not off its name."""

import json
import zipfile
from pathlib import Path
from typing import Literal

import torch

from edt.utils.errors import UserError

WeightsFormat = Literal["torch", "safetensors", "index"]

ARCHIVES = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7z"}
ZIP = b"PK\x03\x04"
PICKLE = b"\x80"  # then the protocol's number
LEGACY_TORCH = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # the number that torch.save before 1.6 writes first
LARGEST_HEADER = 100_000_000  # bytes; safetensors itself accepts no longer header

# Weights of these types are numbers. Others stand for numbers together with scales.
WEIGHT_TYPES = {
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
}


def weights_format(path: Path) -> WeightsFormat:
    """The format of a file of weights.

    Args:
        path: the file.

    Returns:
        "torch" (written by torch.save), "safetensors", or "index" (the JSON that lists the shards
        of a sharded file).

    Raises:
        UserError: the file is none of these, or it is cut short. The message says what it is.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); give another file") from None
    if not size:
        raise UserError(f"{path} is empty; download it again")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a Git LFS pointer, not the file itself; run git lfs pull in its folder"
        )
    # First, since the bytes of its length can be those that other formats begin with.
    header_size = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header_size < LARGEST_HEADER:
        return _check_safetensors(path, header_size, size)
    if head.startswith(ZIP):
        return _check_zip(path)
    if head.startswith(PICKLE):
        if LEGACY_TORCH in head[:32]:
            return "torch"
        raise UserError(
            f"{path} is a Python pickle, which could run code; save its weights with torch.save"
        )
    return _check_others(path, head)


def _check_zip(path: Path) -> WeightsFormat:
    """A zip archive, which torch.save writes."""
    try:  # its table of contents stands at the end
        with zipfile.ZipFile(path) as archive:
            members = {name.rpartition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise _cut_short(path) from None
    if "data.pkl" not in members:
        raise UserError(f"{path} is a zip archive, but not one of torch.save; unpack it")
    if "constants.pkl" in members:
        raise UserError(f"{path} is a TorchScript program; save its state dict with torch.save")
    return "torch"


def _check_safetensors(path: Path, header_size: int, size: int) -> WeightsFormat:
    """Eight bytes with the length of the header, the header in JSON, the tensors."""
    with open(path, "rb") as file:
        header = file.read(8 + header_size)[8:]
    if len(header) < header_size:
        raise _cut_short(path)
    try:
        tensors = [value for key, value in json.loads(header).items() if key != "__metadata__"]
        end = 8 + header_size + max((tensor["data_offsets"][1] for tensor in tensors), default=0)
    except (ValueError, KeyError, TypeError, IndexError):
        raise UserError(
            f"{path} is a damaged safetensors file: its header cannot be read; download it again"
        ) from None
    if size < end:
        raise _cut_short(path)
    return "safetensors"


def _check_others(path: Path, head: bytes) -> WeightsFormat:
    """JSON, and what is downloaded in place of weights by mistake."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"<"):
        raise UserError(
            f"{path} is an HTML page, not a file of weights; "
            "download the file itself, which may need another link or a login"
        )
    if text.startswith((b"{", b"[")):
        if read_index(path) is not None:
            return "index"
        raise UserError(f"{path} is a JSON file and holds no weights; give the file of weights")
    for magic, name in ARCHIVES.items():
        if head.startswith(magic):
            raise UserError(f"{path} is a {name} archive; unpack it")
    if head[257:262] == b"ustar":
        raise UserError(f"{path} is a tar archive; unpack it")
    raise UserError(
        f"{path} was written neither by torch.save nor as safetensors; "
        "give a checkpoint folder, a .safetensors file or a .pt file"
    )


def read_index(path: Path) -> dict[str, str] | None:
    """The shard of each tensor, from the index of a sharded file; None if it is not an index."""
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_map = isinstance(weight_map, dict) and all(
        isinstance(shard, str) for shard in weight_map.values()
    )
    return weight_map if is_map and weight_map else None


def _cut_short(path: Path) -> UserError:
    """The error for a file whose end is missing."""
    size = path.stat().st_size
    return UserError(
        f"{path} is cut short after {size} bytes: its download or its writing did not end; "
        "get it again"
    )


def check_is_plain(name: str, value: torch.Tensor, path: Path) -> None:
    """Check that the numbers of a tensor can be copied into a network.

    Args:
        name: the tensor's name.
        value: the tensor.
        path: the file that holds it.

    Raises:
        UserError: it has no numbers, it is not dense, or it stands for other numbers.
    """
    if value.is_meta:
        raise UserError(f"{path}: {name} is on the meta device, without numbers; save it again")
    if value.layout != torch.strided or value.is_nested:
        raise UserError(f"{path}: {name} is no dense tensor ({value.layout}); export dense ones")
    is_index = value.dtype == torch.int64 and name.endswith("_index")  # a table of MDTv2
    if value.dtype not in WEIGHT_TYPES and not is_index:
        remedy = "quantized weights are not supported; export float ones"
        raise UserError(f"{path}: {name} is {value.dtype}; {remedy}")


def check_is_utf8(path: Path) -> None:
    """Check a path that safetensors or torch's reader of zip archives is to open.

    Raises:
        UserError: the path is not UTF-8, which both require.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"the path {path} is not UTF-8, which files of weights need; rename it"
        ) from None

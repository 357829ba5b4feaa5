"""Many small .npy files, as the release writes them, checked without parsing each.

Files that begin with the same header and have the same size hold arrays of the same type and shape.
Comparing bytes takes a tenth of the time of parsing. Paths are strings, since making a million
``Path`` objects takes longer than reading the files.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edt.utils.errors import UserError


def npy_names(folder: Path) -> set[str]:
    """Names of the folder's .npy files without their ending. Hidden files are left out."""
    names = os.listdir(folder) if folder.is_dir() else []
    return {name[:-4] for name in names if name.endswith(".npy") and not name.startswith(".")}


def load_npy(file: str) -> np.ndarray:
    """Read a feature file.

    Raises:
        UserError: it cannot be read.
    """
    with _damage_named(file):
        array = np.load(file, allow_pickle=False)
        if not isinstance(array, np.ndarray):  # an .npz file by another name
            raise ValueError
        return array


@contextlib.contextmanager
def _damage_named(file: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, EOFError):
        raise UserError(
            f"cannot read the feature file {file}; it is damaged: "
            "delete it and run extract_features.py again"
        ) from None


def changes(files: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """The files whose type or shape may differ from those of the file before, with their arrays.

    Every other file holds a complete array of the type and shape of the file before.

    Raises:
        UserError: a file cannot be read.
    """
    header = None
    for file in files:
        if header is None or not header.is_of(file):
            header = _Header.read(file)
            yield file, load_npy(file)


def read_numbers(files: Iterable[str]) -> Iterator[Any]:
    """The one number of each file, as a value of Python.

    Raises:
        UserError: a file cannot be read, or holds more or less than one number.
    """
    header = None
    for file in files:
        content = _read(file)
        if header is None or not header.is_at_start_of(content):
            header, array = _Header.read(file), load_npy(file)
            if array.size != 1:
                raise UserError(
                    f"{file} has shape {array.shape}, and a label is one number; "
                    "delete it and run extract_features.py again"
                )
        yield np.frombuffer(content, header.dtype, count=1, offset=len(header.content)).item()


class _Header(NamedTuple):
    """What stands before the numbers of an .npy file."""

    content: bytes
    file_size: int  # bytes, header and numbers
    dtype: np.dtype

    @classmethod
    def read(cls, file: str) -> "_Header":
        array, content = load_npy(file), _read(file)
        # Magic string (6 bytes), version (2), and the length of the rest: 2 bytes in version 1,
        # 4 bytes in later ones.
        start = 10 if content[6] == 1 else 12
        end = start + int.from_bytes(content[8:start], "little")
        return cls(content[:end], len(content), array.dtype)

    def is_of(self, file: str) -> bool:
        with _damage_named(file), open(file, "rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            return size == self.file_size and stream.read(len(self.content)) == self.content

    def is_at_start_of(self, content: bytes) -> bool:
        return len(content) == self.file_size and content.startswith(self.content)


def _read(file: str) -> bytes:
    with _damage_named(file), open(file, "rb", buffering=0) as stream:
        return stream.read()

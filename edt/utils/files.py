"""Files that appear under their final name only when whole."""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from edt.utils.errors import UserError


@contextlib.contextmanager
def whole_file(path: str | Path, durable: bool = True) -> Iterator[Path]:
    """A temporary path to write to, beside ``path``; renamed to it on success, removed on failure.

    ``durable`` waits until the disk has it first; millions of small files do without.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> Path:
    """Make a folder and those above it, if they are not there.

    Raises:
        UserError: nothing can be written there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"cannot write to {path} ({error.strerror}); choose another place"
        ) from None
    return path


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: str | Path, value: object) -> None:
    """Write readable JSON, whole."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: str | Path) -> dict:
    """Read a JSON file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        value = json.loads(Path(path).read_text())
        if not isinstance(value, dict):
            raise TypeError
        return value
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {path} ({type(error).__name__}); is it damaged?") from None


def claim(path: str | Path, made_from: dict, remedy: str, notes: dict | None = None) -> None:
    """Record in a JSON file what the files beside it are made from; if it is recorded already, make
    sure that it is the same.

    Args:
        notes: recorded too, but free to differ.

    Raises:
        UserError: it is something else, naming the fields that differ and the ``remedy``.
    """
    path, made_from = Path(path), json.loads(json.dumps(made_from))  # as it will be read back
    if not path.exists():
        make_folder(path.parent)
        write_json(path, {**made_from, **(notes or {})})
        return
    found = read_json(path)
    differing = differences({name: found.get(name) for name in made_from}, made_from)
    if differing:
        raise UserError(f"{path.parent} was made otherwise ({differing}); {remedy}")


def differences(there: dict, here: dict) -> str:
    """ "name: there -> here" of the values that differ; "" if none do."""
    names = [name for name in there | here if there.get(name) != here.get(name)]
    return ", ".join(_difference(name, there.get(name), here.get(name)) for name in names)


def _difference(name: str, old: object, new: object) -> str:
    long = [isinstance(value, list | tuple) and len(value) > 8 for value in (old, new)]
    if all(long) and len(old) == len(new):
        i = next(i for i, pair in enumerate(zip(old, new, strict=True)) if pair[0] != pair[1])
        return _difference(f"{name}[{i}]", old[i], new[i])
    old, new = (
        f"{len(value)} values" if cut else value
        for value, cut in zip((old, new), long, strict=True)
    )
    return f"{name}: {old} -> {new}"

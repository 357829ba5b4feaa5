"""Files that appear under their final name only when whole."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from edt.errors import UserError


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


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({type(error).__name__}); is it damaged?") from None

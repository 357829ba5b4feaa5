"""Files that appear under their final name only when they are complete, and locks."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from edt.utils.errors import UserError

logger = logging.getLogger(__name__)
NOT_FILES = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


@contextlib.contextmanager
def atomic_write(path: str | Path, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, and rename it to ``path`` on success.

    On failure the temporary file is removed and ``path`` stays as it was. A link is followed: the
    file that it leads to is replaced, and the link stays.

    Args:
        path: the final path.
        durable: wait until the disk holds the content before renaming. Writers of millions of small
            files switch this off, since each wait takes milliseconds.

    Raises:
        UserError: ``path`` is a folder, a device or the like.
    """
    path = output_file(Path(path))
    # Shortened, so that every name that the disk can hold can be written.
    temporary = path.with_name(f".{shorten_name(path.name, 200)}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def output_file(path: Path) -> Path:
    """The file that a write to ``path`` makes or replaces; it differs where ``path`` is a link.

    Raises:
        UserError: what is there is no file, and must not be replaced by one.
    """
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        kind = stat.S_IFREG  # nothing is there
    if kind != stat.S_IFREG:
        what = NOT_FILES.get(kind, "a device")
        raise UserError(f"{path} is {what}, not a file; name a file")
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def make_folder(path: Path) -> Path:
    """Make a folder and its parents, if they do not exist.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):  # mkdir succeeds on an existing read-only folder
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"cannot write to {path} ({error.strerror}); choose another place"
        ) from None
    return path


def shorten_name(name: str, most_bytes: int) -> str:
    """A name of a file or folder that has at most so many bytes.

    A longer one is cut, and a hash of the whole name is added: different names stay different.
    """
    encoded = os.fsencode(name)
    if len(encoded) <= most_bytes:
        return name
    ending = "~" + hashlib.sha256(encoded).hexdigest()[:8]
    return encoded[: most_bytes - len(ending)].decode(errors="ignore") + ending


@contextlib.contextmanager
def file_lock(path: Path, refusal: str | None = None) -> Iterator[None]:
    """Hold an exclusive lock on a file. The lock ends with this process, however that ends.

    Some network file systems have no locks. There a warning says so, and the work goes on.

    Args:
        path: the file; created.
        refusal: the message if another process holds the lock; None waits for that process.

    Raises:
        UserError: another process holds the lock, or the file cannot be made.
    """
    try:
        lock = open(path, "w")
    except OSError as error:
        raise UserError(
            f"cannot write to {path} ({error.strerror}); choose another place"
        ) from None
    with lock:
        # A child process shares the lock. Without this, the readers of a killed run would hold it
        # until they notice, and the run could not be started again at once.
        os.register_at_fork(after_in_child=lock.close)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
        except OSError as error:
            # Any other error than "would block" means that there are no locks here.
            if refusal and isinstance(error, BlockingIOError):
                raise UserError(refusal) from None
            _warn_of_no_lock(path.parent, error.strerror)
        yield


@functools.cache
def _warn_of_no_lock(folder: Path, reason: str) -> None:
    """Log it once: samples take a lock several times."""
    logger.warning(
        "cannot lock %s (%s). The work goes on without a lock: start no second run there",
        folder,
        reason,
    )


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: str | Path, value: object) -> None:
    """Write indented JSON atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: str | Path) -> dict:
    """Read a JSON object from a file.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        value = json.loads(Path(path).read_text())
        if not isinstance(value, dict):
            raise TypeError
        return value
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read {path} ({type(error).__name__}); is it damaged?") from None


def write_or_check_settings(path: str | Path, settings: dict, remedy: str) -> None:
    """Record in a JSON file the settings that the files beside it were made with.

    If the file exists, compare it with these settings instead.

    Args:
        path: the JSON file.
        settings: what the files depend on.
        remedy: what the user should do where the settings differ; ends the message.

    Raises:
        UserError: the recorded settings differ; the message names the fields.
    """
    path = Path(path)
    if path.exists():
        check_settings(path.parent, read_json(path), settings, remedy)
        return
    make_folder(path.parent)
    write_json(path, settings)


def check_settings(folder: Path, recorded: dict, settings: dict, remedy: str) -> None:
    """Compare recorded settings with those that are asked for.

    Args:
        folder: holds the files that were made with the recorded settings.
        recorded: as read from JSON; further keys are ignored.
        settings: what is asked for.
        remedy: what the user should do where they differ; ends the message.

    Raises:
        UserError: they differ; the message names the fields.
    """
    settings = json.loads(json.dumps(settings))  # lists for tuples, as recorded
    recorded = {name: recorded.get(name) for name in settings}
    differing = differences(recorded, settings)
    if differing:
        raise UserError(f"{folder} was made with different settings ({differing}); {remedy}")


def differences(old: dict, new: dict) -> str:
    """Describe the values that differ as "name: old -> new, ..."; "" if none do.

    A hash decides over the name beside it: "vae" is the name of what has the hash "vae_sha256", and
    "id" of what has the hash "sha256". Where the hashes are the same, the names may differ.
    """
    names = [name for name in old | new if not _is_same(name, old, new)]
    return ", ".join(_difference(name, old.get(name), new.get(name)) for name in names)


def _is_same(name: str, old: dict, new: dict) -> bool:
    """Whether both have one value under this name, or the same hash for it."""
    hash_name = "sha256" if name == "id" else f"{name}_sha256"
    if old.get(hash_name) is not None and old.get(hash_name) == new.get(hash_name):
        return True
    old_value, new_value = old.get(name), new.get(name)
    if isinstance(old_value, dict) and isinstance(new_value, dict):
        return not differences(old_value, new_value)
    # Earlier versions did not record the configuration of a VAE.
    if name.endswith("config_sha256") and None in (old_value, new_value):
        return True
    return old_value == new_value


def _difference(name: str, old: object, new: object) -> str:
    """Describe one difference.

    Two long lists of equal length are described by their first differing entry.
    """
    long_old = isinstance(old, list | tuple) and len(old) > 8
    long_new = isinstance(new, list | tuple) and len(new) > 8
    if isinstance(old, list | tuple) and isinstance(new, list | tuple) and long_old and long_new:
        for i, (a, b) in enumerate(zip(old, new, strict=False)):
            if a != b and len(old) == len(new):
                return _difference(f"{name}[{i}]", a, b)
    old_text = f"{len(old)} values" if isinstance(old, list | tuple) and long_old else old
    new_text = f"{len(new)} values" if isinstance(new, list | tuple) and long_new else new
    return f"{name}: {old_text} -> {new_text}"

"""How a script ends: errors that a user can fix become one line and exit code 2."""

import contextlib
import errno
import io
import signal
import sys
from collections.abc import Iterator

from edt.utils.errors import UserError

INTERRUPTED = "interrupted; finished files are complete, and the same command continues from them"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of a path that a user gave, or that a user moved or locked while the script ran.
BAD_PATH = (
    *(errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
)


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print an error that the user can correct as one line, and exit with code 2.

    These are a :class:`UserError`, a full disk, and a path of the wrong kind.

    Ctrl-C prints one line, too. Its exit code is 130, as in shells.

    A script's ``main`` carries it as a decorator, ``@exit_on_user_error()``.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # The name of a file may be no text; it is printed with escapes.
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        return
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr, flush=True)
        raise SystemExit(128 + signal.SIGINT) from None
    except IsADirectoryError as error:
        # The second name is that of a file to replace.
        message = f"{error.filename2 or error.filename} is a folder, not a file; move it away"
    except OSError as error:
        if error.errno in DISK_FULL:
            remedy = "free some disk space and run the command again. Finished files are complete"
        elif error.errno in BAD_PATH and error.filename:
            remedy = "check this path and its permissions"
        else:
            raise  # no path is named, so the fault may be in the code
        message = f"{error.strerror} ({error.filename or 'while writing'}); {remedy}"
    with contextlib.suppress(OSError):  # stderr may be a file on the full disk
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)

"""How a script ends: errors that a user can fix become one line and exit code 2."""

import contextlib
import errno
import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from edt.utils.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def exit_on_user_error(main: Callable[P, R]) -> Callable[P, R]:
    """Print a :class:`UserError` of ``main``, or a full disk, as one line; exit with code 2."""

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            message = str(error)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            place = error.filename or "while writing"
            message = (
                f"{error.strerror} ({place}); free some disk space and run the command again. "
                "Finished files are complete"
            )
        with contextlib.suppress(OSError):  # stderr may be a file on the full disk
            print(f"error: {message}", file=sys.stderr, flush=True)
        raise SystemExit(2)

    return run

"""Train EDT on extracted features; see edt/cli/train.py."""

import sys

from edt.cli.main import exit_on_user_error

with exit_on_user_error():  # the imports take seconds, in which Ctrl-C can be pressed
    from edt.cli.train import main, parser

__all__ = ["main", "parser"]

if __name__ == "__main__":
    sys.exit(main())

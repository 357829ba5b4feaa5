"""Train EDT on extracted features; see edt/cli/train.py."""

import sys

from edt.cli.train import main, parser

__all__ = ["main", "parser"]

if __name__ == "__main__":
    sys.exit(main())

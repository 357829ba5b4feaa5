"""Draw images of chosen classes; see edt/cli/draw.py."""

import sys

from edt.cli.draw import main, parser

__all__ = ["main", "parser"]

if __name__ == "__main__":
    sys.exit(main())

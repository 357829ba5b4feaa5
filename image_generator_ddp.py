"""Sample many images into an .npz; see edt/cli/sample.py."""

import sys

from edt.cli.sample import main, parser

__all__ = ["main", "parser"]

if __name__ == "__main__":
    sys.exit(main())

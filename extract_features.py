"""Extract VAE features from a folder of images: see edt/cli/extract.py, or --help."""

import sys

from edt.cli.extract import main, parser

__all__ = ["main", "parser"]

if __name__ == "__main__":
    sys.exit(main())

"""Score generated images against a reference; the work is done in :mod:`edt.cli.evaluate`."""

from edt.cli.evaluate import main, parse

__all__ = ["main", "parse"]

if __name__ == "__main__":
    main()

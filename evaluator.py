"""Score generated images against a reference; the work is done in :mod:`edt.cli.evaluate`."""

from edt.cli.main import exit_on_user_error

with exit_on_user_error():  # the imports take seconds, in which Ctrl-C can be pressed
    from edt.cli.evaluate import main, parse

__all__ = ["main", "parse"]

if __name__ == "__main__":
    main()

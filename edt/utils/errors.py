"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """Something the user gave cannot be used. The message is one line: the thing, and the mend.

    Scripts print the message to stderr and exit with code 2
    (:func:`edt.cli.build.exit_on_user_error`)."""

    def __str__(self) -> str:
        # A data-loader worker hands its errors on inside a traceback's text, whose last line is the
        # message.
        return super().__str__().strip().rpartition("\n")[2].removeprefix(f"{__name__}.UserError: ")

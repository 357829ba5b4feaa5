"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """Something that the user gave cannot be used.

    The message is one line. It names the thing and says what to do. Scripts print it to stderr and
    exit with code 2 (:func:`edt.cli.main.exit_on_user_error`).
    """

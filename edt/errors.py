"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """Something the user gave cannot be used. The message is one line: the thing, and the mend.

    Scripts print the message to stderr and exit with code 2 (:func:`edt.cli.exit_on_user_error`).
    """

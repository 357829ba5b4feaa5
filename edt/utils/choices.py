"""Choices. Every set of named options is one ``Literal`` type, in the module that implements them.

The type checker reads the ``Literal``. :func:`choices` gives its values to argparse and to
messages, and the two checks below compare a value with them at run time.
"""

from typing import Any, Literal, get_args, get_origin, get_type_hints

from edt.utils.errors import UserError


def choices(literal: Any) -> tuple[str, ...]:
    """The values of a ``Literal`` type, in the order of its definition."""
    return get_args(literal)


def check_choice(name: str, value: object, literal: Any) -> None:
    """Compare a value with a ``Literal`` type.

    Args:
        name: what the value is called, for the message.
        value: what the user gave.
        literal: the ``Literal`` type.

    Raises:
        UserError: the value is not one of the type's.
    """
    if value not in get_args(literal):
        raise unknown_choice(name, value, literal)


def unknown_choice(name: str, value: object, literal: Any) -> UserError:
    """The error for a value that is not one of a ``Literal`` type's."""
    known = ", ".join(map(str, get_args(literal)))
    return UserError(f"unknown {name} {value!r}; choose one of {known}")


def check_fields(config: object) -> None:
    """Check every field of a dataclass whose annotation is a ``Literal``.

    Raises:
        UserError: a field holds a value that its annotation does not list.
    """
    for name, annotation in get_type_hints(type(config)).items():
        if get_origin(annotation) is Literal:
            check_choice(name, getattr(config, name), annotation)

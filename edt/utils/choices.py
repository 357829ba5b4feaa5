"""Choices. Every set of named options is one ``Literal`` type, in the module that implements them.

The type checker reads the ``Literal``. :func:`choices` gives its values to argparse and to
messages, and the checks below compare values with them, or with other annotations, at run time.
"""

from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

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


def check_json_fields(dataclass: Any, values: object) -> None:
    """Compare the types of a JSON object's values with the annotations of a dataclass.

    Args:
        dataclass: the class; an annotation is a class, ``tuple[X, ...]``, ``list[X]`` or a union.
        values: read from JSON; keys that are no field are not checked.

    Raises:
        UserError: it is no object, or a value has another type.
    """
    if not isinstance(values, dict):
        raise UserError(f"it holds {values!r} in place of an object; is it damaged?")
    for name, annotation in get_type_hints(dataclass).items():
        if name in values and not _is_json_of(values[name], annotation):
            raise UserError(f"its {name} is {values[name]!r}, of a wrong type; is it damaged?")


def _is_json_of(value: object, annotation: Any) -> bool:
    """Whether JSON writes values of an annotation so: a list for a tuple, 1 for a float."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return value in parts
    if origin in (UnionType, Union):
        return any(_is_json_of(value, part) for part in parts)
    if origin in (tuple, list):
        return isinstance(value, tuple | list) and all(_is_json_of(x, parts[0]) for x in value)
    if issubclass(annotation, tuple):  # a NamedTuple
        return isinstance(value, tuple | list)
    if isinstance(value, bool):
        return annotation is bool
    return isinstance(value, int | float if annotation is float else annotation)

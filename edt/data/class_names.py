"""Classes by index or by name."""

import difflib
import functools
import itertools
import unicodedata
from collections.abc import Sequence

from edt.utils.errors import UserError

FIRST_IMAGENET_FOLDER = "n01440764"  # WordNet id of class 0 of ImageNet-1k


def class_names(num_classes: int, folders: Sequence[str] | None) -> list[list[str]]:
    """The names of every class of a model.

    Args:
        num_classes: number of classes of the model. 0, an unconditional model, gives one class
            called "class 0".
        folders: the class folders that the model was trained on, in the order of the classes; None
            if they are unknown. A model of 1000 classes whose folders are unknown, or are WordNet
            ids, gets ImageNet's names from timm.

    Returns:
        one list of names per class. The first name is the one to show.
    """
    known = [[folder] for folder in folders or ()]
    if num_classes == 1000 and (not known or known[0][0] == FIRST_IMAGENET_FOLDER):
        known = _imagenet_names()
    # An unconditional model draws all its images with label 0.
    classes = range(max(num_classes, 1))
    return [known[i] if i < len(known) else [f"class {i}"] for i in classes]


def find_class(text: str, names: Sequence[Sequence[str]]) -> int:
    """The index of the class that ``text`` means.

    Folders may be named by numbers. A number that is the index of one class and the name of
    another is refused, since the user could mean either.

    Args:
        text: a class's index, or one of its names in any case. "index:2" is always an index,
            "name:2" always a name.
        names: the names of every class, from :func:`class_names`.

    Raises:
        UserError: no class has this index or name, or several classes have it.
    """
    if text.startswith("index:"):
        return _class_of_index(text.removeprefix("index:"), names)
    if text.startswith("name:"):
        return _class_of_name(text.removeprefix("name:"), names)
    named = _classes_named(text, names)
    # "007", or a number beyond the last class, is spelt like no index. A folder's name may be.
    indices = map(str, range(len(names)))
    if not _is_number(text) or (named and text.strip() not in indices):
        return _class_of_name(text, names)
    index = _class_of_index(text, names)
    others = [other for other in named if other != index]
    if others:
        raise UserError(
            f"class {text!r} is ambiguous: {names[index][0]!r} has this number and class "
            f"{others[0]} has this name; give index:{index} or name:{text.strip()}"
        )
    return index


def find_classes(text: str, names: Sequence[Sequence[str]]) -> list[int]:
    """The indices of the classes in a list such as "cat,207".

    A class whose name holds a comma can be given alone.

    Args:
        text: classes with commas between them, each as :func:`find_class` takes it.
        names: the names of every class, from :func:`class_names`.

    Raises:
        UserError: no class has one of the indices or names, or several classes have it.
    """
    is_one_name = bool(_classes_named(text.removeprefix("name:"), names))
    return [find_class(part, names) for part in ([text] if is_one_name else text.split(","))]


def _class_of_index(text: str, names: Sequence[Sequence[str]]) -> int:
    last = len(names) - 1
    if not _is_number(text):
        raise UserError(f"{text!r} is no index of a class; give a number from 0 to {last}")
    if int(text) not in range(len(names)):
        raise UserError(f"class {text} is outside the model's classes, 0 to {last}")
    return int(text)


def _class_of_name(text: str, names: Sequence[Sequence[str]]) -> int:
    named = _classes_named(text, names)
    if len(named) == 1:
        return named[0]
    if named:
        numbers = ", ".join(map(str, named))
        raise UserError(f"{text!r} is the name of classes {numbers}; give one of these numbers")
    similar = _similar_names(_fold(text), [_fold(name) for name in itertools.chain(*names)])
    if similar:
        raise UserError(f"no class is named {text!r}; did you mean {', '.join(similar)}?")
    last = len(names) - 1
    raise UserError(f"no class is named {text!r}; give a name, or a number from 0 to {last}")


def _is_number(text: str) -> bool:
    return text.strip().removeprefix("-").isdecimal()


def _classes_named(text: str, names: Sequence[Sequence[str]]) -> list[int]:
    """The classes with exactly this name or, if there are none, with this name in any case."""
    for spelling in (str, _fold):
        name = spelling(text)
        classes = [i for i, synonyms in enumerate(names) if name in map(spelling, synonyms)]
        if classes:
            return classes
    return []


@functools.cache
def _fold(name: str) -> str:
    """A name without what comparisons ignore: case, outer spaces, and how accents are encoded."""
    return unicodedata.normalize("NFC", name.strip().casefold())


def _similar_names(query: str, names: Sequence[str]) -> list[str]:
    """At most three names that are spelt like the query or, if there are none, contain it."""
    spelt_alike = difflib.get_close_matches(query, names, n=3)
    return spelt_alike or [name for name in names if query in name][:3]


def _imagenet_names() -> list[list[str]]:
    """Names of ImageNet's 1000 classes: the synonyms of each, then its WordNet id."""
    from timm.data import ImageNetInfo  # slow to import, and other models do without

    imagenet = ImageNetInfo()
    return [
        [*imagenet.index_to_description(i).split(", "), imagenet.index_to_label_name(i)]
        for i in range(1000)
    ]

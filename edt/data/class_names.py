"""Classes by index or by name."""

import difflib
from collections.abc import Iterable, Sequence

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

    Args:
        text: a class's index, or one of its names in any case.
        names: the names of every class, from :func:`class_names`.

    Raises:
        UserError: no class has this index or name, or several classes have this name.
    """
    indices_of_name: dict[str, list[int]] = {}
    for index, class_synonyms in enumerate(names):
        for name in class_synonyms:
            indices_of_name.setdefault(name.casefold(), []).append(index)
    query = text.strip().casefold()
    # A number is an index wherever it can be one. Beyond the last class it may be a folder's name.
    if query.isdecimal() and int(query) < len(names):
        return int(query)
    indices = indices_of_name.get(query, [])
    if len(indices) == 1:
        return indices[0]
    if indices:
        numbers = ", ".join(map(str, indices))
        raise UserError(f"{text!r} is the name of classes {numbers}; give one of these numbers")
    last = len(names) - 1
    if query.removeprefix("-").isdecimal():
        raise UserError(f"class {text} is outside the model's classes, 0 to {last}")
    similar = _similar_names(query, indices_of_name)
    if similar:
        raise UserError(f"no class is named {text!r}; did you mean {', '.join(similar)}?")
    raise UserError(f"no class is named {text!r}; give a name, or a number from 0 to {last}")


def _similar_names(query: str, names: Iterable[str]) -> list[str]:
    """At most three names that are spelt like the query or, if there are none, contain it."""
    spelt_alike = difflib.get_close_matches(query, list(names), n=3)
    return spelt_alike or [name for name in names if query in name][:3]


def _imagenet_names() -> list[list[str]]:
    """Names of ImageNet's 1000 classes: the synonyms of each, then its WordNet id."""
    from timm.data import ImageNetInfo  # slow to import, and other models do without

    imagenet = ImageNetInfo()
    return [
        [*imagenet.index_to_description(i).split(", "), imagenet.index_to_label_name(i)]
        for i in range(1000)
    ]

"""Classes by index or by name."""

import difflib
from collections.abc import Sequence

from edt.utils.errors import UserError


def class_names(num_classes: int, folders: Sequence[str] | None) -> list[list[str]]:
    """The names each class goes by, the one to show first.

    Args:
        num_classes: of the model; 0 is one class without a name.
        folders: the class folders a model was trained on, in order; None if unknown. A thousand of
            unknown name or named by WordNet ids are taken for ImageNet's, whose names come from
            timm.
    """
    named = [[folder] for folder in folders or ()]
    if num_classes == 1000 and (not named or named[0][0] == "n01440764"):
        from timm.data import ImageNetInfo  # slow to import

        imagenet = ImageNetInfo()
        named = [
            [*imagenet.index_to_description(i).split(", "), imagenet.index_to_label_name(i)]
            for i in range(1000)
        ]
    return [named[i] if i < len(named) else [f"class {i}"] for i in range(max(num_classes, 1))]


def find_class(text: str, names: Sequence[Sequence[str]]) -> int:
    """The class that ``text`` means: its index, or one of its names in any case.

    Raises:
        UserError: there is none, or the name is that of several.
    """
    by_name: dict[str, list[int]] = {}
    for index, known in enumerate(names):
        for name in known:
            by_name.setdefault(name.casefold(), []).append(index)
    wanted = text.strip().casefold()
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    found = by_name.get(wanted, [])
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{text!r} is the name of classes {', '.join(map(str, found))}; give one of these numbers"
        )
    if wanted.removeprefix("-").isdecimal():
        raise UserError(f"class {text} is outside the model's classes, 0 to {len(names) - 1}")
    near = (
        difflib.get_close_matches(wanted, by_name, n=3)
        or [name for name in by_name if wanted in name][:3]
    )
    suggestion = (
        f"did you mean {', '.join(near)}?"
        if near
        else f"give a name, or a number from 0 to {len(names) - 1}"
    )
    raise UserError(f"no class is named {text!r}; {suggestion}")

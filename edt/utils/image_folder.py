"""Image folders: which files are images, and which folders are classes.

Training, reference statistics and evaluation list their images here, so that all see the same ones.
"""

import collections
import dataclasses
import heapq
import os
import re
from pathlib import Path

import numpy as np

from edt.utils.errors import UserError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Operating systems leave these behind, in lower case here. Names that start with a dot
# (.ipynb_checkpoints, .DS_Store, ._1.png) are skipped, too.
SYSTEM_NAMES = {
    *("__macosx", "desktop.ini", "thumbs.db", "$recycle.bin", "system volume information"),
    *("@eadir", "#recycle", "lost+found"),
}
# Words for the splits of a data set, without the endings of "training" and "testset".
SPLITS = {"train", "trainval", "val", "valid", "validation", "test", "dev", "eval", "evaluation"}
# Parts of a data set that stand beside its splits.
PARTS = {"extra", "pred", "sample", "unlabeled", "unlabelled"}


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """The images below a folder. Make one with :func:`list_images`."""

    root: Path
    images: dict[str, list[str]]
    """Sorted names of the images in each folder that has any. The key is the folder's path below
    the root, "" for the root itself."""
    classes: list[str]
    """Sorted names of the folders in the root."""
    left_out: collections.Counter[str]
    """Number of files that are no images, by the ending of their names."""
    skipped_links: int
    """Number of linked folders that their class lists already, or that hold the root."""

    @property
    def count(self) -> int:
        """Number of images."""
        return sum(map(len, self.images.values()))

    def paths(self) -> list[str]:
        """The paths of all images below the root, in the order of their parts."""
        paths = [
            os.path.join(folder, name) for folder, names in self.images.items() for name in names
        ]
        return sorted(paths, key=lambda path: path.split("/"))

    def labelled_paths(self) -> tuple[list[str], np.ndarray]:
        """The paths of all images below the root, and their classes as labels, (count,) int64.

        The order is that of torchvision's ``ImageFolder``: class by class, folder by folder.

        Raises:
            UserError: the folder does not consist of class folders.
        """
        self._check_classes()
        label_of = {name: label for label, name in enumerate(self.classes)}
        folders = sorted((label_of[path.split("/")[0]], path) for path in self.images)
        paths = [os.path.join(path, name) for _, path in folders for name in self.images[path]]
        labels = [label for label, path in folders for _ in self.images[path]]
        return paths, np.array(labels, dtype=np.int64)

    def describe(self) -> str:
        """How many images and classes there are, and what was left out, as one line."""
        text = f"{self.root}: {self.count} images"
        if "" not in self.images:
            text += f" of {len({path.split('/')[0] for path in self.images})} classes"
        text += self.describe_left_out()
        if self.skipped_links:
            text += f"; skipped {self.skipped_links} linked folders, listed already or above it"
        return text

    def refuse_splits(self) -> None:
        """Refuse a folder that holds several splits of a data set, like train and val.

        Raises:
            UserError: it does; the message names the split that was probably meant.
        """
        meant, splits = self._class_root()
        if splits:
            raise UserError(f"{splits}; give one of them, probably {meant}")

    def describe_left_out(self) -> str:
        """The end of a sentence: how many files are no images; "" if none were left out."""
        if not self.left_out:
            return ""
        counts = sorted(self.left_out.items(), key=lambda item: (-item[1], item[0]))
        parts = [f"{number} {ending}" for ending, number in counts[:5]]
        if counts[5:]:
            parts.append(f"{sum(number for _, number in counts[5:])} others")
        return f"; left out: {', '.join(parts)}"

    def _check_classes(self) -> None:
        """Raise a :class:`UserError` unless there are class folders that hold all the images."""
        self.refuse_splits()
        meant, _ = self._class_root()
        if meant != self.root:
            raise UserError(
                f"{self.root} is not a folder of class folders, its images lie deeper; give {meant}"
            )
        beside = self.images.get("", [])
        if not self.classes:
            raise UserError(
                f"{self.root} is not a folder of class folders ({len(beside)} images lie directly "
                f"in it{self.describe_left_out()}); put the images of each class into a sub-folder"
            )
        if beside:
            raise UserError(
                f"{self.root} has images beside the class folders ({_some(beside)}); "
                "move them into a class folder or away"
            )
        filled = {path.split("/")[0] for path in self.images}
        empty = [name for name in self.classes if name not in filled]
        if empty:
            raise UserError(
                f"{self.root} has class folders without images "
                f"({_some(empty)}{self.describe_left_out()}); "
                f"remove them, or give images of the endings {' '.join(IMAGE_ENDINGS)}"
            )

    def _class_root(self) -> tuple[Path, str]:
        """The folder that probably holds the class folders; where there are splits, or "".

        The root is meant, unless its folders are splits, or a chain of single folders leads to
        the class folders, as ILSVRC/Data/CLS-LOC does.
        """
        meant = folder = self.root
        splits = ""
        below = [path.split("/") for path in self.images if path]
        while below:
            names = sorted({parts[0] for parts in below})
            nested = [parts for parts in below if len(parts) > 1]
            name = next((name for name in names if "train" in name.lower()), names[0])
            if _are_splits(names, bool(nested)):
                if len(names) > 1:
                    splits = f"{folder} holds splits of a data set ({_some(names)})"
                meant = folder / name
            elif len(names) > 1:
                meant = folder
                break
            elif len(nested) < len(below):
                break  # This folder is the only class.
            folder /= name
            below = [parts[1:] for parts in nested if parts[0] == name]
        return meant, splits


def list_images(root: str | Path) -> ImageFolder:
    """Find the images below a folder. Links are followed; hidden files and folders are skipped.

    A class lists every folder only once, however many links lead to it. Folders that hold the root
    are not listed again.

    Raises:
        UserError: there is no such folder, or a folder or link below it cannot be read.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(
            f"no image folder at {root}; give a folder with one sub-folder of images per class"
        )
    images: dict[str, list[str]] = {}
    classes: list[str] = []
    left_out: collections.Counter[str] = collections.Counter()
    real_root = os.path.realpath(root)
    above = {real_root, *map(str, Path(real_root).parents)}
    # Class and real path of each folder. The class is the first part of the path below the root.
    listed: set[tuple[str, str]] = set()
    skipped_links = 0
    # Folders to list: the number of links that lead there, the path below the root, the real path.
    # The first in this order is listed first, so that the result is the same on every machine, and
    # a folder has its own name rather than that of a link.
    pending = [(0, "", real_root)]
    while pending:
        links, path, real_path = heapq.heappop(pending)
        key = path.split("/")[0], real_path
        if key in listed or (path and real_path in above):
            skipped_links += 1
            continue
        listed.add(key)
        try:
            with os.scandir(root / path) as scan:
                entries = [entry for entry in scan if not _is_hidden(entry.name)]
        except OSError as error:
            raise UserError(f"cannot list {root / path} ({error.strerror})") from None
        if path and "/" not in path:
            classes.append(path)
        names = []
        for entry in entries:
            is_link = entry.is_symlink()
            if is_link and not os.path.exists(entry.path):
                raise UserError(f"{entry.path} is a link that leads nowhere; repair or remove it")
            if entry.is_dir():
                below, inner = os.path.join(path, entry.name), os.path.join(real_path, entry.name)
                inner = os.path.realpath(inner) if is_link else inner
                heapq.heappush(pending, (links + is_link, below, inner))
            elif entry.name.lower().endswith(IMAGE_ENDINGS) and entry.is_file():
                names.append(entry.name)
            else:
                left_out[os.path.splitext(entry.name)[1].lower() or "without an ending"] += 1
        if names:
            images[path] = sorted(names)
    return ImageFolder(root, images, sorted(classes), left_out, skipped_links)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def _are_splits(names: list[str], nested: bool) -> bool:
    """Whether folders of these names are splits of a data set.

    Args:
        names: of the folders.
        nested: whether one of them has images in sub-folders.
    """
    known = SPLITS | PARTS if nested else SPLITS
    # The split words of the names, by the other words of the name. COCO has "train2017" and
    # "val2017", DIV2K has "DIV2K_train_HR" and "DIV2K_valid_HR". A data set of vehicles may have a
    # class "train".
    splits: dict[frozenset[str], set[frozenset[str]]] = {}
    for words in map(_words, names):
        if words & known:
            splits.setdefault(words - known, set()).add(words & known)
    if any(len(different) > 1 for different in splits.values()):
        return True
    # ImageNet has "ILSVRC2012_img_train" with sub-folders. "bullet_train" without them is a class.
    return nested and all(_words(name) & known for name in names)


def _words(name: str) -> frozenset[str]:
    """The words of a folder's name, without digits, single letters and endings like "set".

    A word begins after a separator or digit, or at a capital: "train_images", "PublicTest".
    """
    words = re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    stems = (re.sub("(ing)?(set|data)?$", "", word.lower()) for word in words)
    return frozenset(stem for stem in stems if len(stem) > 1)


def _some(names: list[str]) -> str:
    """The first names of a list, and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

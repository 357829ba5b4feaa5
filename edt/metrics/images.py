"""The images to be judged: ADM .npz files, image folders and arrays, checked at opening and read in
batches.
"""

import hashlib
import io
import math
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from edt.utils.errors import UserError
from edt.utils.files import file_sha256

Crop = Callable[[Image.Image], Image.Image]
T = TypeVar("T")
PEEK_IMAGES = 64  # how many images are read at opening to see whether their values can be right
TO_UINT8 = "convert images in [-1, 1] with clamp(127.5 * x + 128, 0, 255) to uint8"


class ImageSet(ABC):
    """Images of one size.

    Attributes:
        name: what messages call the set.
        count: number of images.
        resolution: (height, width) in pixels.
        sorted_by_class: whether the images are known to come class after class.
    """

    name: str
    count: int
    resolution: tuple[int, int]
    sorted_by_class = False

    @abstractmethod
    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """All images in order as uint8 (n, H, W, 3), n = ``batch_size`` except for the last
        batch.
        """

    @abstractmethod
    def sha256(self) -> str:
        """Hash of the content, the same for the same images in the same order."""


class ArrayImages(ImageSet):
    """Images in memory, uint8 (N, H, W, 3)."""

    def __init__(self, images: np.ndarray, name: str = "the image array"):
        _check_array(name, images.shape, images.dtype)
        _check_values(name, images[:PEEK_IMAGES])
        self.name, self.count, self.resolution = name, len(images), images.shape[1:3]
        self._images = images

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        for start in range(0, self.count, batch_size):
            yield self._images[start : start + batch_size]

    def sha256(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self._images)).hexdigest()


class NpzImages(ImageSet):
    """``arr_0`` of an .npz file, streamed: only one batch is in memory."""

    def __init__(self, path: Path):
        self.name, self._path = str(path), path
        with open_npz_array(path, "arr_0") as (file, shape, dtype):
            if dtype.kind == "f":
                _refuse_floats(self.name, shape, dtype, file)
            _check_array(self.name, shape, dtype)
        self.count, self.resolution = shape[0], shape[1:3]
        _check_values(self.name, next(self.batches(PEEK_IMAGES)))
        labels = read_npz(path, ("arr_1",)).get("arr_1", np.empty(0))
        if labels.shape == (self.count,):
            self.sorted_by_class = bool(labels[0] != labels[-1] and (np.diff(labels) >= 0).all())

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        with open_npz_array(self._path, "arr_0") as (file, shape, _):
            for start in range(0, shape[0], batch_size):
                yield _read_rows(file, min(batch_size, shape[0] - start), shape, np.dtype(np.uint8))

    def sha256(self) -> str:
        return file_sha256(self._path)


class FolderImages(ImageSet):
    """All images below a folder, in the order of their paths.

    Args:
        crop: applied to each image; without it the images must all have one size.
    """

    def __init__(self, path: Path, crop: Crop | None = None):
        self.name = str(path)
        self._files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
        if not self._files:
            raise UserError(f"no images below {path}; give a folder of image files or an .npz file")
        self._root, self._crop = path, crop
        self.count, self.resolution = len(self._files), self._decode(self._files[0]).shape[:2]
        _check_count(self.name, self.count)
        if crop is None:
            self._check_sizes()
        self.sorted_by_class = len({p.parent for p in self._files}) > 1

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor() as pool:
            for start in range(0, self.count, batch_size):
                yield np.stack(
                    list(pool.map(self._decode, self._files[start : start + batch_size]))
                )

    def sha256(self) -> str:
        digest = hashlib.sha256(f"{self.resolution}".encode())
        for file in self._files:
            digest.update(f"{file.relative_to(self._root)} {file_sha256(file)}\n".encode())
        return digest.hexdigest()

    def _open(self, file: Path, read: Callable[[Image.Image], T]) -> T:
        try:
            with Image.open(file) as image:
                return read(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(
                f"cannot read the image {file} ({error}); replace or remove it"
            ) from None

    def _decode(self, file: Path) -> np.ndarray:
        return self._open(
            file,
            lambda image: np.asarray(self._crop(image) if self._crop else image.convert("RGB")),
        )

    def _check_sizes(self) -> None:
        for file in self._files:
            size = self._open(file, lambda image: (image.height, image.width))
            if size != self.resolution:
                raise UserError(
                    f"{file} is {_pixels(size)}, others {_pixels(self.resolution)}; crop all: --image-size"
                )


@contextmanager
def open_npz_array(path: Path, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
    """An array of an .npz file as (file at its first byte, shape, dtype); nothing is unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{name}.npy" not in archive.namelist():
                found = ", ".join(archive.namelist()) or "nothing"
                raise UserError(
                    f"{path} holds no array {name} (found {found}); give an .npz file of images"
                )
            with archive.open(f"{name}.npy") as file:
                old = np.lib.format.read_magic(file) == (1, 0)
                shape, fortran_order, dtype = (
                    np.lib.format.read_array_header_1_0(file)
                    if old
                    else np.lib.format.read_array_header_2_0(file)
                )
                size = archive.getinfo(f"{name}.npy").file_size - file.tell()
                if size != math.prod(shape) * dtype.itemsize and not dtype.hasobject:
                    raise UserError(
                        f"{path}: {name} has {size} bytes, too many or few for {shape}; write it again"
                    )
                if fortran_order and not dtype.hasobject:
                    file = io.BytesIO(read_npz(path, (name,))[name].tobytes())
                yield file, shape, dtype
    except UserError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _unreadable(path, error) from None


def read_npz(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Those of the named arrays that the .npz file holds; nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names if name in arrays}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _unreadable(path, error) from None


def npz_names(path: Path) -> list[str]:
    """Names of the arrays in an .npz file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"cannot read {path} ({error or type(error).__name__}); give an .npz file that numpy.savez wrote"
    )


def _read_rows(file: IO[bytes], count: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    data = file.read(count * math.prod(shape[1:]) * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(count, *shape[1:])


def _check_array(name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype != np.uint8:
        raise UserError(f"{name} holds {dtype}, not uint8; {TO_UINT8}")
    if len(shape) != 4 or shape[3] != 3:
        raise UserError(
            f"{name} has shape {tuple(shape)}; images must be (count, height, width, 3)"
        )
    _check_count(name, shape[0])


def _check_count(name: str, count: int) -> None:
    if count < 2:
        raise UserError(
            f"{name} holds {count} image(s); at least 2 are needed to compare distributions"
        )


def _check_values(name: str, images: np.ndarray) -> None:
    """Refuse floats in [0, 1] or [-1, 1] that were cast to integers: only 0 and 1, or 0, 1 and 255,
    are left.
    """
    found = np.flatnonzero(np.bincount(images.ravel(), minlength=256))
    if 1 in found and set(found) <= {0, 1, 255}:
        raise UserError(
            f"{name} holds only the values {found.tolist()}: floats cast without scaling; {TO_UINT8}"
        )


def _refuse_floats(name: str, shape: tuple[int, ...], dtype: np.dtype, file: IO[bytes]) -> None:
    """Say what is wrong with an array of floats, judging by its first images."""
    values = _read_rows(file, min(shape[0], PEEK_IMAGES), shape, dtype) if shape else np.empty(0)
    if np.isnan(values).any():
        raise UserError(f"{name} holds NaN; the sampler diverged, draw the images again")
    span = f" in [{values.min():.3g}, {values.max():.3g}]" if values.size else ""
    raise UserError(f"{name} holds {dtype}{span}, not uint8; {TO_UINT8}")


def _pixels(resolution: tuple[int, int]) -> str:
    height, width = resolution
    return f"{width}x{height} pixels"

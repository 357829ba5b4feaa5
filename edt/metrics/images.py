"""Image sets: ADM's .npz files, image folders and arrays.

They are checked when they are opened, and read in batches.
"""

import hashlib
import io
import math
import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from edt.metrics.image_arrays import check_array, check_values
from edt.utils.errors import UserError
from edt.utils.files import file_sha256
from edt.utils.image_files import open_image, to_rgb
from edt.utils.image_folder import list_images

Crop = Callable[[Image.Image], Image.Image]

# Images read at opening to check their values. A few suffice: a wrong conversion affects all.
PEEK_IMAGES = 64
PART_BYTES = 1 << 26  # of an array that is read in pieces
# What numpy and zipfile raise for a damaged or missing file. A RuntimeError says that the file is
# encrypted or of another version: so a damaged header looks.
READ_ERRORS = (
    OSError,
    ValueError,
    EOFError,
    MemoryError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


class ImageSet(ABC):
    """Images of one size.

    Attributes:
        name: what messages call the set.
        count: number of images.
        resolution: (height, width) in pixels.
        sorted_by_class: whether the images are known to be sorted by class.
    """

    name: str
    count: int
    resolution: tuple[int, int]
    sorted_by_class = False

    @abstractmethod
    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """All images in order, as uint8 (n, H, W, 3).

        Every batch has ``batch_size`` images; the last one may have fewer.
        """

    @abstractmethod
    def sha256(self) -> str:
        """Hash of the content, the same for the same images in the same order."""


class ArrayImages(ImageSet):
    """Images in memory.

    Args:
        images: uint8 (N, H, W, 3).
        name: what messages call the set.

    Raises:
        UserError: the array is no set of images.
    """

    def __init__(self, images: np.ndarray, name: str = "the image array"):
        check_array(name, images.shape, images.dtype, [images])
        _check_count(name, len(images))
        check_values(name, images[:PEEK_IMAGES])
        self.name = name
        self.count, height, width, _ = images.shape
        self.resolution = (height, width)
        self._images = images

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        for start in range(0, self.count, batch_size):
            yield self._images[start : start + batch_size]

    def sha256(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self._images).data).hexdigest()


class NpzImages(ImageSet):
    """``arr_0`` of an .npz file. Only one batch is in memory.

    Args:
        path: the file. Labels in ``arr_1``, if present, set ``sorted_by_class``.

    Raises:
        UserError: the file cannot be read, or holds no images.
    """

    def __init__(self, path: Path):
        self.name, self._path = str(path), path
        with open_npz_array(path, "arr_0") as (file, shape, dtype):
            check_array(self.name, shape, dtype, _read_parts(file, dtype))
        _check_count(self.name, shape[0])
        self.count, height, width, _ = shape
        self.resolution = (height, width)
        check_values(self.name, next(self.batches(PEEK_IMAGES)))
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
        path: the folder.
        crop: applied to each image. Without it all images must have one size.

    Attributes:
        folder: the listing of the folder.

    Raises:
        UserError: there are no images, or they cannot be read, or their sizes differ, or the
            folder holds several splits of a data set.
    """

    def __init__(self, path: Path, crop: Crop | None = None):
        self.name = str(path)
        self._root, self._crop = path, crop
        self.folder = folder = list_images(path)
        if not folder.count:
            raise UserError(
                f"no images below {path}{folder.describe_left_out()}; "
                "give a folder of image files or an .npz file"
            )
        folder.refuse_splits()
        self._files = [path / name for name in folder.paths()]
        self.count = len(self._files)
        _check_count(self.name, self.count)
        height, width, _ = self._decode(self._files[0]).shape
        self.resolution = (height, width)
        if crop is None:
            self._check_sizes()
        # The usual layout of labelled images has one folder per class.
        self.sorted_by_class = len({p.parent for p in self._files}) > 1

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor() as pool:
            for start in range(0, self.count, batch_size):
                files = self._files[start : start + batch_size]
                yield np.stack(list(pool.map(self._decode, files)))

    def sha256(self) -> str:
        # Features in the cache of version 0.1 are of grey values that were clipped, not scaled.
        digest = hashlib.sha256(f"{self.resolution} scaled to 8 bits".encode())
        for file in self._files:
            # The file system's own bytes: not every name is UTF-8.
            digest.update(os.fsencode(f"{file.relative_to(self._root)} {file_sha256(file)}\n"))
        return digest.hexdigest()

    def _decode(self, file: Path) -> np.ndarray:
        with open_image(file) as image:
            rgb = to_rgb(image)
            return np.asarray(self._crop(rgb) if self._crop else rgb)

    def _check_sizes(self) -> None:
        """Check the image size in every file's header, before hours of work begin."""
        for file in self._files:
            with open_image(file) as image:
                size = (image.height, image.width)
            if size != self.resolution:
                raise UserError(
                    f"{file} has {_pixels(size)}, others have {_pixels(self.resolution)}; "
                    "crop all to one size with --image-size"
                )


@contextmanager
def open_npz_array(path: Path, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
    """Open an array of an .npz file for reading in pieces; nothing is unpickled.

    Yields:
        The file at the first byte of the array, its shape, its dtype.

    Raises:
        UserError: the file is damaged or holds no such array. Damage may show only when the caller
            reads, inside the ``with`` block.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if f"{name}.npy" not in archive.namelist():
                contents = ", ".join(archive.namelist()) or "nothing"
                raise UserError(
                    f"{path} holds no array {name} (found {contents}); give an .npz file of images"
                )
            with archive.open(f"{name}.npy") as file:
                shape, fortran_order, dtype = _read_npy_header(file)
                size = archive.getinfo(f"{name}.npy").file_size - file.tell()
                # A damaged header may announce terabytes, so the sizes are compared before
                # anything is allocated. Pickled objects have no fixed size.
                if size != math.prod(shape) * dtype.itemsize and not dtype.hasobject:
                    raise UserError(
                        f"{path}: {name} has {size} bytes, too many or too few for {shape}; "
                        "write the file again"
                    )
                if fortran_order and not dtype.hasobject:
                    # Its rows are not contiguous, so the array must be in memory to be reordered.
                    yield io.BytesIO(read_npz(path, (name,))[name].tobytes()), shape, dtype
                else:
                    yield file, shape, dtype
    except UserError:
        raise  # a UserError is a ValueError too
    except READ_ERRORS as error:
        raise _unreadable(path, error) from None


def _read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the order is Fortran's, and dtype."""
    if np.lib.format.read_magic(file) == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def read_npz(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Read those of the named arrays that an .npz file holds; nothing is unpickled."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names if name in arrays}
    except READ_ERRORS as error:
        raise _unreadable(path, error) from None


def npz_names(path: Path) -> list[str]:
    """Names of the arrays in an .npz file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except READ_ERRORS as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = str(error) or type(error).__name__
    return UserError(f"cannot read {path} ({reason}); give an .npz file that numpy.savez wrote")


def _read_rows(file: IO[bytes], count: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    data = file.read(count * math.prod(shape[1:]) * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(count, *shape[1:])


def _read_parts(file: IO[bytes], dtype: np.dtype) -> Iterator[np.ndarray]:
    """All values of an array, in the order of the file."""
    while data := file.read(PART_BYTES // dtype.itemsize * dtype.itemsize):
        yield np.frombuffer(data, dtype)


def _check_count(name: str, count: int) -> None:
    if count < 2:
        raise UserError(f"{name} holds {count} image(s); give at least 2, which a covariance needs")


def _pixels(resolution: tuple[int, int]) -> str:
    height, width = resolution
    return f"{width}x{height} pixels"

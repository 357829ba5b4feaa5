"""The .npz of samples that ADM's evaluator reads, filled in place by any number of processes.

The file is the final .npz from the start - room for the zip header, the .npy header, then the
images - so 50,000 images are written once, wherever they are drawn, and finishing it takes one pass
for the checksum. Beside it, until then, a byte for each image says which are done. Written with
pwrite, not mapped: mapped pages count as the process's memory."""

import contextlib
import fcntl
import io
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from edt.utils.errors import UserError
from edt.utils.files import sync

_MEMBER = b"arr_0.npy"
_CHUNK = 1 << 24


def _npy_header(shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    return header.getvalue()


def _zip64_sizes(size: int) -> bytes:
    return struct.pack("<HHQQ", 1, 16, size, size)  # the zip64 extra field: size, stored size


def _local_header(size: int, crc: int) -> bytes:
    """Local file header of a stored zip64 member (APPNOTE.TXT 4.3.7); its date is 1980-01-01."""
    fields = struct.pack(
        "<4sHHHHHIIIHH", b"PK\3\4", 45, 0, 0, 0, 33, crc, 0xFFFFFFFF, 0xFFFFFFFF, len(_MEMBER), 20
    )
    return fields + _MEMBER + _zip64_sizes(size)


def _central_directory(size: int, crc: int, offset: int) -> bytes:
    """Central directory of one member, with the zip64 and the plain end records (APPNOTE.TXT 4.3.12
    to 4.3.16).
    """
    entry = (
        struct.pack(
            "<4sHHHHHHIIIHHHHHII",
            b"PK\1\2",
            45,
            45,
            0,
            0,
            0,
            33,
            crc,
            0xFFFFFFFF,
            0xFFFFFFFF,
            len(_MEMBER),
            20,
            0,
            0,
            0,
            0,
            0,
        )
        + _MEMBER
        + _zip64_sizes(size)
    )
    end64 = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, len(entry), offset)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, offset + len(entry), 1)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 1, 1, len(entry), 0xFFFFFFFF, 0)
    return entry + end64 + locator + end


def _pwrite(file: io.FileIO, data: bytes, offset: int) -> None:
    while data:  # a write up to a limit or a full disk's last block is short; the next one raises
        written = os.pwrite(file.fileno(), data, offset)
        data, offset = data[written:], offset + written


class SampleArchive:
    """``samples_{N}x{H}x{W}x3.npz`` in a folder, written image by image.

    Args:
        folder: where it will be; created.
        shape: (N, H, W, 3).

    Attributes:
        path: the finished file.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int, int]):
        folder.mkdir(parents=True, exist_ok=True)
        self.shape = shape
        self.path = folder / f"samples_{'x'.join(map(str, shape))}.npz"
        self._partial = self.path.with_suffix(".partial")
        self._done_file = self.path.with_suffix(".done")
        self._lock_file = self.path.with_suffix(".lock")
        self._npy_header = _npy_header(shape)
        self._npy_offset = len(_local_header(0, 0))
        self._image_offset = self._npy_offset + len(self._npy_header)
        self._image_bytes = int(np.prod(shape[1:]))
        self._end = self._image_offset + shape[0] * self._image_bytes

    @property
    def finished(self) -> bool:
        return self.path.exists()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self._lock_file, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def open(self) -> None:
        """Make room on the disk, unless an earlier run or another process has.

        Raises:
            UserError: there is not enough, saying how much is needed.
        """
        with self._locked():
            if not self.finished and not self._done_file.exists():
                self._make_room()
            # Kept open: another process may finish the file, rename it and remove the bytes, under
            # this one's hands.
            self._file = open(
                self.path if self.finished else self._partial,
                "rb" if self.finished else "r+b",
                buffering=0,
            )
            self._done = None if self.finished else open(self._done_file, "r+b", buffering=0)

    def _make_room(self) -> None:
        try:
            with open(self._partial, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, self._end)
                file.seek(self._npy_offset)
                file.write(self._npy_header)
            with open(self._done_file, "wb") as file:
                file.write(bytes(self.shape[0]))
        except OSError as error:
            self._partial.unlink(missing_ok=True)
            self._done_file.unlink(missing_ok=True)
            raise UserError(
                f"{self.shape[0]} images need {self._end / 2**30:.2f} GiB in {self.path.parent} ({error.strerror}); "
                "free some, or give another --output-dir"
            ) from None

    def missing(self) -> np.ndarray:
        """Indices of the images not yet written, (n,) int64."""
        done = os.pread(self._done.fileno(), self.shape[0], 0) if self._done else b""
        return np.flatnonzero(np.frombuffer(done, np.uint8) == 0)

    def write(self, indices: np.ndarray, images: np.ndarray) -> None:
        """Store images (n, H, W, 3) uint8."""
        for index, image in zip(indices.tolist(), images, strict=True):
            _pwrite(self._file, image.tobytes(), self._image_offset + index * self._image_bytes)
        os.fdatasync(self._file.fileno())
        for index in (
            indices.tolist()
        ):  # after the images: what a kill or a power cut leaves marked is there
            _pwrite(self._done, b"\1", index)

    def read(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        """Images that are written, (H, W, 3) uint8 each."""
        for index in indices:
            image = os.pread(
                self._file.fileno(),
                self._image_bytes,
                self._image_offset + index * self._image_bytes,
            )
            yield np.frombuffer(image, np.uint8).reshape(self.shape[1:])

    def finish(self) -> bool:
        """Turn the file into the .npz if this process is the last to finish; True if the .npz is
        there.
        """
        with self._locked():
            if self.finished:
                return True
            if self.missing().size:
                return False
            with open(self._partial, "r+b") as file:
                file.seek(self._npy_offset)
                crc, left = 0, self._end - self._npy_offset
                while left:
                    chunk = file.read(min(_CHUNK, left))
                    crc, left = zlib.crc32(chunk, crc), left - len(chunk)
                file.write(_central_directory(self._end - self._npy_offset, crc, self._end))
                file.seek(0)
                file.write(_local_header(self._end - self._npy_offset, crc))
            sync(self._partial)
            os.replace(self._partial, self.path)
            self._done_file.unlink()
            return True

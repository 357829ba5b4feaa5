"""The .npz of samples that ADM's evaluator reads, filled in place by any number of processes.

The file has the layout of the final .npz from the start: room for the zip header, the .npy header,
then the images. So 50,000 images are written once, by whichever process draws them, and finishing
the file takes one pass for the checksum. Until then a second file holds one byte per image, which
says whether the image is written.

This replaces numpy.savez, which needs all images in the memory of one process while the others
wait. It is long because it writes the zip headers itself: Python's zipfile cannot leave room for
data that other processes write.
"""

import io
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from edt.utils.errors import UserError
from edt.utils.files import file_lock, sync

_MEMBER = b"arr_0.npy"
_CHUNK_BYTES = 1 << 24
_VERSION = 45  # of the zip format that is needed to read zip64
_DATE = 33  # 1980-01-01, the earliest that zip can hold: equal images make equal files
_IN_ZIP64 = 0xFFFFFFFF  # "see the zip64 field", in place of a 32-bit size


# ---------------------------------------------------------------------------------------------
# File formats


def _npy_header(shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    fields = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.getvalue()


def _zip64_sizes(size: int) -> bytes:
    """The zip64 extra field: size and stored size."""
    return struct.pack("<HHQQ", 1, 16, size, size)


def _local_header(size: int, crc: int) -> bytes:
    """Local file header of an uncompressed zip64 member (APPNOTE.TXT 4.3.7)."""
    sizes = (_IN_ZIP64, _IN_ZIP64)
    lengths = (len(_MEMBER), len(_zip64_sizes(size)))
    fields = struct.pack(
        "<4sHHHHHIIIHH", b"PK\3\4", _VERSION, 0, 0, 0, _DATE, crc, *sizes, *lengths
    )
    return fields + _MEMBER + _zip64_sizes(size)


def _central_directory(size: int, crc: int, offset: int) -> bytes:
    """Central directory of one member, with both end records (APPNOTE.TXT 4.3.12 to 4.3.16)."""
    sizes = (_IN_ZIP64, _IN_ZIP64)
    lengths = (len(_MEMBER), len(_zip64_sizes(size)))
    versions = (_VERSION, _VERSION)
    # fmt: off
    entry = struct.pack(
        "<4sHHHHHHIIIHHHHHII",
        b"PK\1\2", *versions, 0, 0, 0, _DATE, crc, *sizes, *lengths, 0, 0, 0, 0, 0,
    )
    entry += _MEMBER + _zip64_sizes(size)
    end64 = struct.pack(
        "<4sQHHIIQQQQ", b"PK\6\6", 44, *versions, 0, 0, 1, 1, len(entry), offset
    )
    # fmt: on
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, offset + len(entry), 1)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 1, 1, len(entry), _IN_ZIP64, 0)
    return entry + end64 + locator + end


def _pwrite(file: io.FileIO, data: bytes, offset: int) -> None:
    """Write at an offset.

    A memory map would be simpler, but its pages count as resident memory of the process.
    """
    # At a size limit or on a full disk, pwrite writes a part only. The next call then raises.
    while data:
        written = os.pwrite(file.fileno(), data, offset)
        data, offset = data[written:], offset + written


# ---------------------------------------------------------------------------------------------
# The archive


class SampleArchive:
    """``samples_{N}x{H}x{W}x3.npz`` in a folder, written image by image.

    Args:
        folder: holds the file; created.
        shape: (N, H, W, 3).

    Attributes:
        path: the finished file.
        labels_path: where the labels of its images belong, (N,) int64 in a .npy file.
    """

    _file: io.FileIO
    _done: io.FileIO | None

    def __init__(self, folder: Path, shape: tuple[int, int, int, int]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.shape = shape
        self.path = folder / f"samples_{'x'.join(map(str, shape))}.npz"
        self.labels_path = self.path.with_suffix(".labels.npy")
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
        """Whether the .npz exists."""
        return self.path.exists()

    def open(self) -> None:
        """Allocate the file on the disk, unless an earlier run or another process has.

        Raises:
            UserError: the disk has too little space; the message says how much is needed.
        """
        with file_lock(self._lock_file):
            if not self.finished and not self._done_file.exists():
                self._allocate()
            # Both files stay open: another process may finish the .npz, which renames one and
            # removes the other while this process still reads them.
            if self.finished:
                self._file, self._done = open(self.path, "rb", buffering=0), None
            else:
                self._file = open(self._partial, "r+b", buffering=0)
                self._done = open(self._done_file, "r+b", buffering=0)

    def _allocate(self) -> None:
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
                f"{self.shape[0]} images need {self._end / 2**30:.2f} GiB in {self.path.parent} "
                f"({error.strerror}); free some disk space, or give another --output-dir"
            ) from None

    def missing(self) -> np.ndarray:
        """Indices of the images that are not written yet, (n,) int64."""
        done = os.pread(self._done.fileno(), self.shape[0], 0) if self._done else b""
        return np.flatnonzero(np.frombuffer(done, np.uint8) == 0)

    def write(self, indices: np.ndarray, images: np.ndarray) -> None:
        """Store images.

        Args:
            indices: (n,) int.
            images: (n, H, W, 3) uint8.
        """
        assert self._done is not None
        for index, image in zip(indices.tolist(), images, strict=True):
            offset = self._image_offset + index * self._image_bytes
            _pwrite(self._file, image.tobytes(), offset)
        os.fdatasync(self._file.fileno())
        # Marked after the images are on the disk: a kill or a power cut leaves no mark without
        # its image.
        for index in indices.tolist():
            _pwrite(self._done, b"\1", index)

    def read(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        """Images that are written, (H, W, 3) uint8 each."""
        for index in indices:
            offset = self._image_offset + index * self._image_bytes
            image = os.pread(self._file.fileno(), self._image_bytes, offset)
            yield np.frombuffer(image, np.uint8).reshape(self.shape[1:])

    def finish(self) -> bool:
        """Make the .npz if no image is missing.

        The last process to call this does the work.

        Returns:
            whether the .npz exists.
        """
        with file_lock(self._lock_file):
            if self.finished:
                return True
            if self.missing().size:
                return False
            with open(self._partial, "r+b") as file:
                file.seek(self._npy_offset)
                crc, left = 0, self._end - self._npy_offset
                while left:
                    chunk = file.read(min(_CHUNK_BYTES, left))
                    crc, left = zlib.crc32(chunk, crc), left - len(chunk)
                file.write(_central_directory(self._end - self._npy_offset, crc, self._end))
                file.seek(0)
                file.write(_local_header(self._end - self._npy_offset, crc))
            sync(self._partial)
            os.replace(self._partial, self.path)
            self._done_file.unlink()
            return True

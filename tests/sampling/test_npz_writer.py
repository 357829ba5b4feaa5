import errno
import fcntl
import os
import zipfile

import numpy as np
import pytest

from edt.sampling.npz_writer import SampleArchive
from edt.utils.errors import UserError


def test_archive_is_an_npz_whoever_fills_it(tmp_path):
    shape = (23, 4, 5, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    first, second = SampleArchive(tmp_path, shape), SampleArchive(tmp_path, shape)
    for archive in (first, second):
        archive.open()
    first.write(np.arange(0, 23, 2), images[::2])
    assert not first.finish()
    assert not first.path.exists()
    assert second.missing().tolist() == list(range(1, 23, 2))
    for image, expected in zip(second.read([4, 0]), images[[4, 0]], strict=True):
        assert np.array_equal(image, expected)
    second.write(np.arange(1, 23, 2), images[1::2])
    assert second.finish()
    assert first.finish()
    assert first.path.name == "samples_23x4x5x3.npz"
    with np.load(first.path, allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        assert np.array_equal(file["arr_0"], images)
    with zipfile.ZipFile(first.path) as archive:
        assert archive.testzip() is None
        with archive.open("arr_0.npy") as member:  # as ADM's evaluator streams it
            assert np.lib.format.read_magic(member) == (1, 0)
    reopened = SampleArchive(tmp_path, shape)
    reopened.open()
    assert reopened.missing().size == 0
    assert reopened.finish()
    assert np.array_equal(next(reopened.read([22])), images[22])


@pytest.mark.slow
def test_archive_of_more_than_four_gib(tmp_path):
    # 4.3 GiB that are allocated on the disk and never written.
    shape = (30_000, 256, 200, 3)
    archive = SampleArchive(tmp_path, shape)
    archive.open()
    archive.write(np.array([29_999]), np.full((1, 256, 200, 3), 7, np.uint8))
    archive._done_file.write_bytes(bytes([1]) * 30_000)
    assert archive.finish()
    with zipfile.ZipFile(archive.path) as file, file.open("arr_0.npy") as member:
        assert member._orig_file_size == archive._end - archive._npy_offset
        assert member._orig_file_size > 1 << 32
    with np.load(archive.path, mmap_mode="r") as file:
        assert file.files == ["arr_0"]
    assert archive.path.stat().st_size > 1 << 32
    archive.path.unlink()


def test_a_disk_that_is_too_small_is_named_before_anything_is_drawn(tmp_path):
    with pytest.raises(UserError, match="images need .* GiB"):
        SampleArchive(tmp_path, (10**9, 256, 256, 3)).open()
    assert [path.name for path in tmp_path.iterdir()] == ["samples_1000000000x256x256x3.lock"]


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    archive = SampleArchive(tmp_path, (2, 4, 4, 3))
    archive.open()
    images = np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3)
    archive.write(np.arange(2), images)
    assert archive.finish()
    assert np.array_equal(np.load(archive.path)["arr_0"], images)
    assert caplog.text.count("cannot lock") == 1

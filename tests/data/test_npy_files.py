"""Small .npy files, read and compared by their headers."""

from pathlib import Path

import numpy as np
import pytest

from edt.data.npy_files import changes, load_npy, npy_names, read_numbers
from edt.utils.errors import UserError


def save(folder: Path, *arrays) -> list[str]:
    files = [str(folder / f"{i}.npy") for i in range(len(arrays))]
    for file, array in zip(files, arrays, strict=True):
        np.save(file, array)
    return files


def test_hidden_files_have_no_names(tmp_path):
    for name in ("0.npy", "12.npy", "._0.npy", ".npy", "0.txt"):
        (tmp_path / name).touch()
    assert npy_names(tmp_path) == {"0", "12"}
    assert npy_names(tmp_path / "absent") == set()


def test_numbers_of_every_type_and_header(tmp_path):
    files = save(
        tmp_path,
        np.array([3]),
        np.array([4]),
        np.array(5, dtype=np.uint8),
        np.array([[6.5]], dtype=np.float32),
        np.array([7], dtype=">i4"),
        np.array([8]),
    )
    with open(tmp_path / "6.npy", "wb") as file:  # a header with a longer length field
        np.lib.format.write_array(file, np.array([9]), version=(2, 0))
    files.append(file.name)
    assert list(read_numbers(files)) == [3, 4, 5, 6.5, 7, 8, 9]


@pytest.mark.parametrize("array", [np.array([1, 2]), np.zeros((1, 4)), np.array([])])
def test_a_file_of_several_numbers_is_refused(array, tmp_path):
    files = save(tmp_path, np.array([1]), array)
    with pytest.raises(UserError, match="1.npy has shape"):
        list(read_numbers(files))


def test_only_files_unlike_the_one_before_are_returned(tmp_path):
    files = save(
        tmp_path,
        np.zeros((1, 2, 4, 8)),
        np.ones((1, 2, 4, 8)),
        np.zeros((1, 2, 8, 4)),  # as many bytes, another shape
        np.zeros((1, 2, 8, 4)),
        np.zeros((1, 2, 8, 4), np.int64),
        np.zeros((1, 2, 8, 5), np.int64),
    )
    returned = list(changes(files))
    assert [file for file, _ in returned] == [files[0], files[2], files[4], files[5]]
    assert [array.shape for _, array in returned][1:] == [(1, 2, 8, 4), (1, 2, 8, 4), (1, 2, 8, 5)]


@pytest.mark.parametrize("length", [0, 5, 60, 150])
def test_a_file_cut_short_is_named(length, tmp_path):
    files = save(tmp_path, np.zeros((1, 2, 4, 4)), np.zeros((1, 2, 4, 4)))
    content = (tmp_path / "1.npy").read_bytes()
    (tmp_path / "1.npy").write_bytes(content[:length])
    for read in (lambda: list(changes(files)), lambda: load_npy(files[1])):
        with pytest.raises(UserError, match="cannot read the feature file .*1.npy"):
            read()
    (tmp_path / "1.npy").unlink()
    with pytest.raises(UserError, match="cannot read the feature file .*1.npy"):
        list(read_numbers(files[1:]))


def test_an_archive_by_another_name_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", np.zeros(3))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(UserError, match="cannot read the feature file .*a.npy"):
        load_npy(str(tmp_path / "a.npy"))

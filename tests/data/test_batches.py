import contextlib
import itertools
import multiprocessing
import os

import numpy as np
import pytest
import torch
from extracting import extract
from torch.utils.data import DataLoader, Dataset

from edt.data.batches import BatchIndices, epoch_order, read_batches, read_loader
from edt.data.features import Batch, open_features
from edt.utils.errors import UserError

COUNT, SEED, BATCH = 14, 7, 4  # three batches per epoch; two images are left over


def take(steps: int, rows: slice, first_step: int = 0) -> list[tuple[list[int], list[int]]]:
    """Indices and flips of some steps."""
    batches = itertools.islice(BatchIndices(COUNT, SEED, BATCH, rows, first_step), steps)
    return [(indices.tolist(), flips.tolist()) for indices, flips in batches]


@pytest.mark.parametrize("count", [1, 17, 1000])
def test_an_epoch_visits_every_image_once(count):
    order = epoch_order(0, 3, count)
    assert torch.equal(order.sort().values, torch.arange(count))
    if count > 1:
        assert not torch.equal(order, epoch_order(0, 4, count))


def test_batches_cover_each_epoch():
    steps = take(9, slice(0, 4))
    for epoch in range(3):
        indices = sum((indices for indices, _ in steps[3 * epoch : 3 * epoch + 3]), [])
        assert len(set(indices)) == 12
    assert steps[0] != steps[3]
    assert {flip for _, flips in steps for flip in flips} == {0, 1}


def test_batches_continue_anywhere():
    assert take(4, slice(0, 4), first_step=5) == take(9, slice(0, 4))[5:9]


def test_two_processes_share_the_global_batch():
    first, second = take(9, slice(0, 2)), take(9, slice(2, 4))
    joined = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(first, second, strict=True)]
    assert joined == take(9, slice(0, 4))


def test_batches_are_those_of_earlier_versions():
    # A run that an earlier version started is continued with these.
    expected = [([4, 9, 2, 7], [0, 1, 1, 0]), ([6, 1, 10, 4], [1, 0, 0, 0])]
    assert take(2, slice(0, 4), first_step=2) == expected


def test_too_few_images_are_named():
    with pytest.raises(UserError, match="3 images are fewer"):
        BatchIndices(3, 0, 4, slice(0, 4))


@pytest.mark.parametrize("layout", ["packed", "npy"])
def test_workers_read_the_batches_of_the_main_process(layout, image_folder, tmp_path):
    extract(image_folder, tmp_path, "--layout", layout)
    features = open_features(tmp_path)
    indices = BatchIndices(len(features), 0, 6, slice(1, 5))
    with (
        contextlib.closing(read_batches(features, indices, 0, pin_memory=False)) as alone,
        contextlib.closing(read_batches(features, indices, 2, pin_memory=False)) as with_workers,
    ):
        for _ in range(8):  # more than one epoch
            expected, batch = next(alone), next(with_workers)
            assert isinstance(expected, Batch)
            assert isinstance(batch, Batch)
            assert torch.equal(batch.stored, expected.stored)
            assert torch.equal(batch.labels, expected.labels)
        assert batch.stored.shape == (4, 3, 16, 16)
        assert batch.labels.dtype == torch.int64
        assert len(multiprocessing.active_children()) == 2
    assert multiprocessing.active_children() == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU pins memory")
def test_pinned_batches_are_batches(features):
    opened = open_features(features)
    indices = BatchIndices(len(opened), 0, 6, slice(0, 6))
    with contextlib.closing(read_batches(opened, indices, 1, pin_memory=True)) as batches:
        batch = next(batches)
    assert isinstance(batch, Batch)
    assert batch.stored.is_pinned()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_file_is_named_in_one_line(num_workers, image_folder, tmp_path):
    extract(image_folder, tmp_path, "--layout", "npy")
    features = open_features(tmp_path)
    os.truncate(tmp_path / "imagenet_features" / "7.npy", 6)
    indices = BatchIndices(len(features), 0, 40, slice(0, 40))
    with contextlib.closing(read_batches(features, indices, num_workers, False)) as batches:
        with pytest.raises(UserError) as error:
            next(batches)
    file = tmp_path / "imagenet_features" / "7.npy"
    assert str(error.value).startswith(f"cannot read the feature file {file}; it is damaged")
    assert "\n" not in str(error.value)
    assert multiprocessing.active_children() == []


def test_a_killed_reader_is_reported_in_one_line(image_folder, tmp_path):
    """A reader dies of a shard that is cut short after it was opened."""
    extract(image_folder, tmp_path, "--layout", "packed")
    features = open_features(tmp_path)
    os.truncate(tmp_path / "shard-00000.npy", 0)
    indices = BatchIndices(len(features), 0, 40, slice(0, 40))
    with contextlib.closing(read_batches(features, indices, 1, False)) as batches:
        with pytest.raises(UserError) as error:
            next(batches)
    expected = f"a process that reads features in {tmp_path} was killed (out of memory or shared"
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)
    assert multiprocessing.active_children() == []


class Failing(Dataset):
    """Raises the same error for every index."""

    def __init__(self, error: Exception):
        self.error = error

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> np.ndarray:
        raise self.error


@pytest.mark.parametrize("num_workers", [0, 1])
def test_other_errors_keep_their_traceback(num_workers):
    loader = DataLoader(Failing(RuntimeError("a bug")), num_workers=num_workers)
    with pytest.raises(RuntimeError, match="a bug") as error:
        list(read_loader(loader, "numbers"))
    assert ("Traceback" in str(error.value)) == (num_workers > 0)

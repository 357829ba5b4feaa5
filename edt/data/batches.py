"""From the number of a training step to its batch.

::

    step -> indices of the global batch -> rows of this process -> DataLoader -> Batch

For given data and batch size, the global batch depends on (seed, step) alone. So a run can continue
at any step, on any number of processes, with the batches of an uninterrupted run.
"""

import functools
import itertools
import signal
import threading
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from edt.data.features import Batch, Features
from edt.utils.errors import UserError
from edt.utils.randomness import generator

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Signals that ask a run to save and end."""

# How torch's messages begin if a worker was killed. The thread that pins memory dies where it waits
# for the rest of a batch from that worker.
WORKER_DEATHS = ("DataLoader worker (pid", "Pin memory thread exited unexpectedly")


def steps_per_epoch(count: int, global_batch_size: int) -> int:
    """Number of full batches in ``count`` images. The images of an incomplete batch are dropped.

    Raises:
        UserError: there are fewer images than one batch takes.
    """
    if count < global_batch_size:
        raise UserError(
            f"{count} images are fewer than --global-batch-size {global_batch_size}; "
            "make the batch smaller"
        )
    return count // global_batch_size


# Cached, because all steps of an epoch use the same permutation (10 MB for ImageNet). Two entries:
# a second iterator in this process may still be in the previous epoch.
@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> torch.Tensor:
    """The order in which an epoch visits ``count`` images, a permutation, (count,) int64."""
    return torch.randperm(count, generator=generator(seed, "order", epoch))


class BatchIndices:
    """The images that each step reads, from ``first_step`` on, without end.

    Iterating yields (indices (b,) int64, flips (b,) int64) for the b rows of this process. They are
    the argument of :meth:`edt.data.features.Features.__getitem__`.

    Args:
        count: number of images.
        seed: of the run.
        global_batch_size: B, images of one step over all processes.
        rows: the rows of the global batch that this process reads.
        first_step: number of the first step, from 0.

    Attributes:
        steps_per_epoch: full batches in ``count`` images.

    Raises:
        UserError: there are fewer images than one batch takes.
    """

    def __init__(
        self, count: int, seed: int, global_batch_size: int, rows: slice, first_step: int = 0
    ):
        self.count, self.seed, self.global_batch_size = count, seed, global_batch_size
        self.rows, self.first_step = rows, first_step
        self.steps_per_epoch = steps_per_epoch(count, global_batch_size)

    def global_batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices (B,) int64 and flips (B,) int64, 0 or 1, of one step over all processes."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.global_batch_size
        order = epoch_order(self.seed, epoch, self.count)
        indices = order[start : start + self.global_batch_size]
        # Every process draws the flips of the global batch and keeps its rows, so that the number
        # of processes changes nothing. Features that store one orientation ignore the flips.
        flips = torch.randint(
            2, (self.global_batch_size,), generator=generator(self.seed, "flip", step)
        )
        return indices, flips

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for step in itertools.count(self.first_step):
            indices, flips = self.global_batch(step)
            yield indices[self.rows].numpy(), flips[self.rows].numpy()


def read_batches(
    features: Features, indices: BatchIndices, num_workers: int, pin_memory: bool
) -> Generator[Batch, None, None]:
    """The batches of this process, step by step, without end.

    Close the generator when done (``contextlib.closing``): this ends the worker processes.

    Args:
        features: the open features.
        indices: the images that each step reads.
        num_workers: processes that read ahead; 0 reads in this process.
        pin_memory: put the batches into page-locked memory, so that copies to a GPU can overlap
            with computation.

    Raises:
        UserError: a feature file is missing or damaged.
    """
    loader = DataLoader(
        features,
        batch_size=None,  # features read a batch at once: nothing is left to collate
        sampler=indices,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_signals,
    )
    return read_loader(loader, f"features in {features.path}")


def read_loader(loader: DataLoader, what: str) -> Generator[Any, None, None]:
    """Iterate over a ``DataLoader``, whose workers end with the generator.

    Args:
        loader: the loader.
        what: is read, e.g. "features in PATH", for messages.

    Raises:
        UserError: the dataset raised it, in this process or in a worker. The message is that of the
            dataset, without a traceback. Or a worker was killed.
    """
    iterator = _iterate(loader)
    try:
        yield from iterator
    except UserError as error:
        raise UserError(_original_message(error)) from None
    except RuntimeError as error:
        # An error that the dataset raised in a worker begins with "Caught" and keeps its traceback.
        if not str(error).startswith(WORKER_DEATHS):
            raise
        raise UserError(
            f"a process that reads {what} was killed (out of memory or shared memory, or by a "
            "damaged or unreadable file there); check the files, or give fewer --num-workers"
        ) from None
    finally:
        # The garbage collector may come too late: a process waits at its exit for its workers, and
        # these ignore the signals that would end them.
        if isinstance(iterator, _MultiProcessingDataLoaderIter):
            iterator._shutdown_workers()


def _iterate(loader: DataLoader) -> Iterator[Any]:
    """The loader's iterator, which raises a worker's death when the next batch is asked for.

    torch's handler of SIGCHLD would raise it wherever this process is, also in the middle of a
    step, whose result then could not be saved.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    if threading.current_thread() is threading.main_thread():  # only there can handlers be set
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    return iterator


def _original_message(error: UserError) -> str:
    """The message that the dataset raised.

    torch raises a worker's exception again in this process with the worker's traceback as its
    message. The traceback ends in "edt.utils.errors.UserError: MESSAGE". A message from this
    process has no such prefix and is returned as it is.
    """
    prefix = f"{UserError.__module__}.{UserError.__qualname__}: "
    return str(error).rpartition(prefix)[2].strip()


def _ignore_signals(worker_id: int) -> None:
    """Make a worker survive signals that reach every process of the group, such as Ctrl-C.

    The training process decides when to stop. Until then it needs batches, to finish its step.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)

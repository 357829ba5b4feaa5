"""Checkpoint folders: writing, verifying, listing and pruning them.

A checkpoint is a folder named by its step::

    model.safetensors  ema.safetensors      weights, named as in the released state dicts
    config.json                             model configuration and a record of its features
    optimizer.safetensors  sampler.safetensors  state.json    read only to resume training
    manifest.json                           size and SHA-256 of the other files

It is written under a temporary name and renamed when it is complete. Nothing in it is pickled.
"""

import dataclasses
import logging
import re
import shutil
from collections.abc import Collection, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from edt.utils.errors import UserError
from edt.utils.files import file_sha256, read_json, sync, write_json
from edt.utils.weights_format import check_is_utf8

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
TENSOR_FILES = ("model", "ema", "optimizer", "sampler")

NamedTensors = dict[str, torch.Tensor]


class Optimizer(Protocol):
    """The part of torch.optim.Optimizer that a checkpoint needs."""

    def state_dict(self) -> dict[str, Any]:
        """See torch.optim.Optimizer."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See torch.optim.Optimizer."""


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """Everything that a run is continued from, as plain data."""

    step: int
    """Training steps taken, the skipped ones included."""
    skipped_steps: int
    """Steps with a loss or gradient that was not finite."""
    config: dict[str, Any]
    """The training configuration, as JSON values."""
    optimizer: dict[str, Any]
    """The optimizer's step counters, as JSON values."""
    tensors: dict[str, NamedTensors]
    """Named tensors of each of :data:`TENSOR_FILES`."""
    images_seen: int | None = None
    """Images of all steps; None in the checkpoints of version 0.1, which did not count them."""
    epoch: Fraction | None = None
    """Passes over the features, exactly; None in the checkpoints of version 0.1."""


# ---------------------------------------------------------------------------------------------
# Writing and reading


def save_checkpoint(folder: Path, state: TrainingState, config: dict[str, Any]) -> None:
    """Write a checkpoint folder completely or not at all.

    Args:
        folder: its final path; replaced if it exists.
        state: what the run is continued from.
        config: the content of config.json.

    Raises:
        UserError: the disk is full or cannot be written to.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    values = {
        "step": state.step,
        "skipped_steps": state.skipped_steps,
        "optimizer": state.optimizer,
        "config": state.config,
        "images_seen": state.images_seen,
        "epoch": None if state.epoch is None else str(state.epoch),  # "7/3"
    }
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, tensors in state.tensors.items():
            file = temporary / f"{name}.safetensors"
            save_file({key: value.detach().contiguous() for key, value in tensors.items()}, file)
            sync(file)
        write_json(temporary / "state.json", values)
        write_json(temporary / "config.json", config)
        manifest = {file.name: fingerprint(file) for file in sorted(temporary.iterdir())}
        write_json(temporary / MANIFEST, manifest)
        sync(temporary)
        _replace_folder(folder, temporary)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write the checkpoint {folder} ({error}); free some disk space. "
            "The checkpoints before it are complete"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_folder(folder: Path, new: Path) -> None:
    """Rename ``new`` to ``folder``. A folder of that name stays until the new one is in place."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def read_checkpoint(folder: Path) -> TrainingState:
    """Read what :func:`save_checkpoint` wrote, on the CPU.

    Raises:
        UserError: a file is missing or damaged.
    """
    values = read_json(folder / "state.json")
    epoch = values.get("epoch")
    return TrainingState(
        step=values["step"],
        # Called "bad_steps" until version 0.1.
        skipped_steps=values.get("skipped_steps", values.get("bad_steps", 0)),
        config=values["config"],
        optimizer=values["optimizer"],
        tensors={name: read_tensors(folder / f"{name}.safetensors") for name in TENSOR_FILES},
        images_seen=values.get("images_seen"),
        epoch=None if epoch is None else Fraction(epoch),
    )


def read_tensors(path: Path) -> NamedTensors:
    """Read a safetensors file on the CPU.

    Raises:
        UserError: it is missing or damaged, or its path is not UTF-8.
    """
    check_is_utf8(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path} ({error}); is the checkpoint complete?") from None


# ---------------------------------------------------------------------------------------------
# Verifying


def fingerprint(file: Path) -> list:
    """Size in bytes and SHA-256 of a file, as the manifest holds them."""
    return [file.stat().st_size, file_sha256(file)]


def verify_file(folder: Path, name: str) -> str:
    """Compare one file of a checkpoint with the manifest.

    Returns:
        the file's SHA-256.

    Raises:
        UserError: the file is missing or damaged, or the manifest is.
    """
    expected = read_json(folder / MANIFEST).get(name)
    if not (folder / name).is_file():
        raise UserError(f"{folder / name} is missing")
    size, sha256 = fingerprint(folder / name)
    if [size, sha256] != expected:
        raise UserError(f"{folder / name} is damaged: it differs from {MANIFEST}")
    return sha256


def verify_checkpoint(folder: Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        UserError: a file is missing or damaged.
    """
    for name in read_json(folder / MANIFEST):
        verify_file(folder, name)


# ---------------------------------------------------------------------------------------------
# The checkpoints of a run


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest step first."""
    checkpoints = [path for path in folder.glob("*") if path.name.isdigit()]
    return sorted(checkpoints, key=lambda path: int(path.name))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest undamaged checkpoint in ``folder``; a warning names each damaged one."""
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            verify_checkpoint(checkpoint)
            return checkpoint
        except UserError as error:
            logger.warning("skipping checkpoint %s: %s", checkpoint.name, error)
    return None


def prune_checkpoints(
    folder: Path, keep_last: int, keep_every: int, keep_steps: Collection[int | None] = ()
) -> None:
    """Remove all checkpoints but the newest ``keep_last`` and the multiples of ``keep_every``.

    Args:
        folder: holds the checkpoints.
        keep_last: how many of the newest stay.
        keep_every: a checkpoint stays if this divides its step.
        keep_steps: the checkpoints of these steps stay in any case.
    """
    for checkpoint in list_checkpoints(folder)[:-keep_last]:
        step = int(checkpoint.name)
        if step % keep_every and step not in keep_steps:
            # Renamed first, so that a kill in between leaves no half checkpoint under its name.
            shutil.rmtree(checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.old")))


def sweep_checkpoints(folder: Path) -> None:
    """Remove the half-written and half-removed checkpoints that killed processes left.

    Only one process may do this, and only while no other one writes there.
    """
    for path in folder.glob(".*"):
        match = re.fullmatch(r"\.(\d+)\.(tmp|old)", path.name)
        if not match:
            continue
        checkpoint = folder / match[1]
        if match[2] == "old" and not checkpoint.exists() and _is_undamaged(path):
            path.rename(checkpoint)  # it was about to be replaced or removed
        else:
            logger.info("removing %s, which a killed process left", path)
            shutil.rmtree(path, ignore_errors=True)


def _is_undamaged(checkpoint: Path) -> bool:
    try:
        verify_checkpoint(checkpoint)
    except UserError:
        return False
    return True


# ---------------------------------------------------------------------------------------------
# Optimizer state as named tensors


def flatten_optimizer(
    optimizer: Optimizer, parameter_names: Iterable[str]
) -> tuple[NamedTensors, dict[str, Any]]:
    """Split an optimizer's state into tensors named "parameter/buffer" and JSON values.

    Args:
        optimizer: has one parameter group.
        parameter_names: in the order of its parameters.
    """
    state = optimizer.state_dict()
    tensors, values = {}, {}
    group = state["param_groups"][0]
    for name, index in zip(parameter_names, group["params"], strict=True):
        for key, value in state["state"].get(index, {}).items():
            if torch.is_tensor(value):
                tensors[f"{name}/{key}"] = value
            else:
                values[f"{name}/{key}"] = value
    step = group.get("step")  # edt's Adan counts steps per group, other optimizers per parameter
    return tensors, {"step": None if step is None else int(step), "values": values}


def restore_optimizer(
    optimizer: Optimizer,
    parameter_names: Iterable[str],
    tensors: NamedTensors,
    values: dict[str, Any],
) -> None:
    """Inverse of :func:`flatten_optimizer`."""
    state = optimizer.state_dict()
    group = state["param_groups"][0]
    index_of_name = dict(zip(parameter_names, group["params"], strict=True))
    state["state"] = {}
    for key, value in {**tensors, **values["values"]}.items():
        name, _, buffer = key.rpartition("/")
        state["state"].setdefault(index_of_name[name], {})[buffer] = value
    if values["step"] is not None:
        group["step"] = values["step"]
    optimizer.load_state_dict(state)

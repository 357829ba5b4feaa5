"""A training run is its folder::

    log.txt   metrics.jsonl   checkpoints/0050000/   checkpoints/0100000/ ...

Starting in a folder that holds a checkpoint of the same configuration continues it.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

from edt.checkpoints.folder import (
    check_checkpoint,
    list_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    read_tensors,
    save_checkpoint,
)
from edt.training.trainer import Trainer
from edt.utils.errors import UserError
from edt.utils.files import atomic_write, differences, make_folder, read_json

logger = logging.getLogger(__name__)
SCHEMA_VERSION = 1


def new_run_folder(results_dir: Path, name: str) -> Path:
    """The next free ``NNN-name`` in the results folder, counted as the release counts."""
    taken = [
        int(match[1])
        for path in results_dir.glob("*")
        if (match := re.match(r"(\d{3,})-", path.name))
    ]
    return results_dir / f"{max(taken, default=-1) + 1:03d}-{name}"


def run_folder(run_dir: str | None, results_dir: str, model: str, resume: str | None) -> Path:
    """The folder a run writes to.

    ``run_dir`` if given; else the run that ``resume`` points into, or the newest of the model in
    ``results_dir`` if ``resume`` is empty; else a new one."""
    if run_dir:
        return Path(run_dir)
    name = model.replace("/", "-")
    if resume:
        path = Path(resume)
        return path.parent.parent if path.parent.name == "checkpoints" else path
    mine = sorted(Path(results_dir).glob(f"[0-9]*-{name}"))
    if resume is not None:
        if not mine:
            raise UserError(
                f"--resume: no run of {model} in {results_dir}; leave --resume out to start anew"
            )
        return mine[-1]
    return new_run_folder(Path(results_dir), name)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other live process out of a run folder; the lock dies with its owner.

    Raises:
        UserError: another run is in it.
    """
    make_folder(folder)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another run is writing to {folder}; stop it or give another --run-dir"
            ) from None
        yield


class Run:
    """The folder of one run, and what is written to it.

    Args:
        folder: it; created when something is written.
        notes: what a sampler wants to know of the features (see edt.checkpoints.folder); saved with
            every checkpoint.
        keep_last, keep_every: which checkpoints stay (edt.checkpoints.folder.prune_checkpoints).
    """

    def __init__(self, folder: Path, notes: dict, keep_last: int = 3, keep_every: int = 50_000):
        self.folder, self.checkpoints, self.metrics = (
            folder,
            folder / "checkpoints",
            folder / "metrics.jsonl",
        )
        self.notes, self.keep_last, self.keep_every = notes, keep_last, keep_every

    def save(self, trainer: Trainer) -> Path:
        """Write a checkpoint and prune the old ones."""
        tensors, documents = trainer.state()
        config = {
            "schema_version": SCHEMA_VERSION,
            "model": dataclasses.asdict(trainer.model.config),
            **self.notes,
        }
        checkpoint = self.checkpoints / f"{trainer.step:07d}"
        save_checkpoint(checkpoint, tensors, {**documents, "config": config})
        prune_checkpoints(self.checkpoints, self.keep_last, self.keep_every)
        return checkpoint

    def find(self, resume: str | None, step: int | None = None) -> Path | None:
        """The checkpoint to continue from, or None for a fresh start.

        Args:
            resume: None takes what the folder holds, if anything; "" demands that it holds one;
                otherwise the path of a checkpoint, or of a run.
            step: demand the checkpoint of this step.

        Raises:
            UserError: it is not there or not whole; or there are checkpoints, and none is.
        """
        path = Path(resume) if resume else self.folder
        if path.is_file():
            raise UserError(
                f"cannot resume from the file {path}; give a checkpoint folder of this project"
            )
        if resume and not path.is_dir():
            raise UserError(f"no checkpoint at {path} to resume from; check --resume")
        if resume and not (path / "checkpoints").is_dir():
            check_checkpoint(path)
            return path
        there = list_checkpoints(path / "checkpoints")
        if step is not None:
            chosen = path / "checkpoints" / f"{step:07d}"
            if chosen not in there:
                steps = ", ".join(str(int(one.name)) for one in there) or "none"
                raise UserError(
                    f"no checkpoint of step {step} in {chosen.parent}; its steps: {steps}"
                )
            check_checkpoint(chosen)
            return chosen
        found = newest_checkpoint(path / "checkpoints")
        if found is None and (there or resume is not None):
            mend = (
                "another --run-dir starts anew"
                if resume is None
                else "leave --resume out to start anew"
            )
            raise UserError(f"no whole checkpoint in {path / 'checkpoints'} to resume from; {mend}")
        return found

    def load(self, trainer: Trainer, checkpoint: Path, allow_changes: bool = False) -> None:
        """Continue from a checkpoint of the same model, features and configuration.

        Args:
            allow_changes: take the features and the trainer's configuration where the checkpoint's
                differ.

        Raises:
            UserError: it is of another, naming what differs.
        """
        config, state = read_json(checkpoint / "config.json"), read_json(checkpoint / "state.json")
        model = json.loads(json.dumps(dataclasses.asdict(trainer.model.config)))
        differing = differences(config["model"], model)
        if differing:
            raise UserError(
                f"{checkpoint} is of another model ({differing}); --init-from in a new --run-dir takes what fits"
            )
        trained_on = config.get("features", {})
        features = {name: self.notes["features"].get(name) for name in trained_on}
        changes = (
            differences(state["config"], dataclasses.asdict(trainer.config)),
            differences(trained_on, features),
        )
        differing = ", ".join(filter(None, changes))
        if differing and not allow_changes:
            raise UserError(
                f"{checkpoint} was trained otherwise ({differing}); --allow-config-change goes on all the same"
            )
        if differing:
            logger.warning("going on with another configuration: %s", differing)
        names = ("model", "ema", "optimizer", "sampler")
        trainer.load_state(
            {name: read_tensors(checkpoint / f"{name}.safetensors") for name in names}, state
        )

    def log_metrics(self, row: dict) -> None:
        """Append a line to the JSONL file, whole or not at all; what is not finite, a mean of
        nothing, becomes null.

        Raises:
            UserError: there is no room.
        """
        line = json.dumps({name: _finite(value) for name, value in row.items()}).encode() + b"\n"
        try:
            with open(self.metrics, "ab", buffering=0) as file:
                size = file.tell()
                if file.write(line) < len(line):
                    file.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise UserError(
                f"cannot write to {self.metrics} ({error.strerror}); make room"
            ) from None

    def forget_metrics_after(self, step: int) -> None:
        """Drop a torn last line, and the lines of steps that are about to be taken again. For the
        main process.
        """
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text().splitlines(keepends=True):
            with contextlib.suppress(ValueError):
                kept += [line] if json.loads(line)["step"] <= step else []
        with atomic_write(self.metrics) as temporary:
            temporary.write_text("".join(kept))


def _finite(value):
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""The folder of a training run::

    log.txt   metrics.jsonl   samples/   checkpoints/0050000/   checkpoints/0100000/ ...
    set-aside-1/     checkpoints, samples and metrics from before the run went back

A run that starts in a folder with a checkpoint of the same configuration continues it.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import re
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from edt.checkpoints.folder import (
    MANIFEST,
    TrainingState,
    list_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    save_checkpoint,
    sweep_checkpoints,
    verify_checkpoint,
)
from edt.checkpoints.loading import check_finite
from edt.nn.config import ModelConfig
from edt.registry import read_config
from edt.training.config import TrainConfig
from edt.utils.errors import UserError
from edt.utils.files import differences, file_lock, file_sha256, make_folder, read_json

logger = logging.getLogger(__name__)
SCHEMA_VERSION = 1
CONTENT = "content_sha256"  # field of FeatureInfo


# ---------------------------------------------------------------------------------------------
# Which folder, and which checkpoint in it


def new_run_dir(results_dir: Path, name: str) -> Path:
    """The next free ``NNN-name`` in the results folder, counted as the release counts."""
    matches = [re.match(r"(\d{3,})-", path.name) for path in results_dir.glob("*")]
    numbers = [int(match[1]) for match in matches if match]
    return results_dir / f"{max(numbers, default=-1) + 1:03d}-{name}"


def newest_run_dir(results_dir: Path, model: str) -> Path:
    """The newest run of a model in the results folder.

    Raises:
        UserError: there is none.
    """
    name = re.compile(r"(\d{3,})-" + re.escape(model.replace("/", "-")))
    runs = [path for path in results_dir.glob("*") if name.fullmatch(path.name)]
    if not runs:
        raise UserError(
            f"no run of {model} in {results_dir} to resume; leave --resume out to start a new run"
        )
    return max(runs, key=lambda path: int(path.name.partition("-")[0]))


def choose_run_dir(
    run_dir: Path | None, results_dir: Path, model: str, resume: Path | None
) -> Path:
    """The folder that a run writes to.

    Args:
        run_dir: taken if given.
        results_dir: holds the folders of runs.
        model: name of the model, which becomes part of a new folder's name.
        resume: a checkpoint or a run; without ``run_dir``, its run is continued in place.
    """
    if run_dir is not None:
        return run_dir
    if resume is not None:
        if not resume.is_dir():
            raise UserError(
                f"no checkpoint or run folder at {resume} to resume from; check --resume"
            )
        if not (resume / "manifest.json").exists():
            return resume
        run = resume.resolve().parent.parent
        if resume.resolve().parent.name != "checkpoints":
            raise UserError(f"{resume} is not inside a run folder; give --run-dir, too")
        return run
    return new_run_dir(results_dir, model.replace("/", "-"))


def resolve_resume(run_dir: Path, resume: Path | None, step: int | None = None) -> Path | None:
    """The checkpoint to continue from, or None for a fresh start.

    A run folder that holds a checkpoint is continued. With ``resume`` or ``step``, a missing
    checkpoint is an error.

    Args:
        run_dir: the run's folder.
        resume: a checkpoint, or a run folder whose newest checkpoint is meant; it must exist.
        step: require the checkpoint of this step.

    Raises:
        UserError: a required checkpoint is missing or damaged, or every checkpoint is damaged.
    """
    source = run_dir if resume is None else resume
    if source.is_file():
        raise UserError(
            f"cannot resume from the file {source}; give a checkpoint folder of this project"
        )
    if resume is not None and (resume / "manifest.json").exists():
        if step is not None and resume.name != f"{step:07d}":
            raise UserError(
                f"--resume {resume} is not the checkpoint of --resume-step {step}; "
                "leave one of the two out"
            )
        verify_checkpoint(resume)
        return resume
    folder = source / "checkpoints"
    checkpoints = list_checkpoints(folder)
    if step is not None:
        return _checkpoint_of_step(folder, checkpoints, step)
    newest = newest_checkpoint(folder)
    if newest is None and resume is not None:
        raise UserError(
            f"no complete checkpoint in {folder} to resume from; "
            "leave --resume out to start a new run"
        )
    if newest is None and checkpoints:
        raise UserError(
            f"every checkpoint in {folder} is damaged; give another --run-dir to start a new run"
        )
    return newest


def _checkpoint_of_step(folder: Path, checkpoints: list[Path], step: int) -> Path:
    for checkpoint in checkpoints:
        if int(checkpoint.name) == step:
            verify_checkpoint(checkpoint)
            return checkpoint
    steps = ", ".join(str(int(checkpoint.name)) for checkpoint in checkpoints) or "none"
    raise UserError(f"no checkpoint of step {step} in {folder}; its steps: {steps}")


@contextlib.contextmanager
def lock_run_dir(folder: Path) -> Iterator[None]:
    """Keep a second run out of the folder. The lock ends with its process.

    Raises:
        UserError: another run holds the lock.
    """
    refusal = f"another run is writing to {folder}; stop it or give another --run-dir"
    with file_lock(make_folder(folder) / ".lock", refusal):
        yield


def check_all_see(checkpoint: Path | None, run_dir: Path) -> None:
    """Check that every process sees the checkpoint that the first process chose.

    A node without a shared disk would continue at another step, and with other weights.

    Args:
        checkpoint: what the first process chose; None: it starts a new run.
        run_dir: the run's folder.

    Raises:
        UserError: a process sees another checkpoint or none; raised on every process.
    """
    seen = gather_object([_what_is_seen(checkpoint, run_dir)])
    for process, other in enumerate(seen):
        if other != seen[0]:
            raise UserError(
                f"the run folder {run_dir} must be shared by all nodes: process 0 sees {seen[0]}, "
                f"process {process} sees {other}. Put it on a shared disk, or copy it to every node"
            )
    if not all(gather_object([run_dir.is_dir()])):
        logger.warning("not every node sees %s; share it, or the run cannot be continued", run_dir)


def _what_is_seen(checkpoint: Path | None, run_dir: Path) -> str:
    """What this process sees of a checkpoint; equal only for equal content."""
    if checkpoint is None:
        names = [path.name for path in list_checkpoints(run_dir / "checkpoints")]
        return f"the checkpoints {', '.join(names)}" if names else "no checkpoint"
    manifest = checkpoint / MANIFEST
    if not manifest.exists():
        return f"no {checkpoint}"
    try:
        if not PartialState().is_main_process:  # the first process has verified its checkpoint
            verify_checkpoint(checkpoint)
    except UserError as error:
        return str(error)
    return f"{checkpoint} (SHA-256 {file_sha256(manifest)[:12]})"


# ---------------------------------------------------------------------------------------------
# Checkpoints of the run


class RunDirectory:
    """The folder of one run.

    Args:
        folder: its path; created when something is written.
        name: name of the model, e.g. "EDT-S/2".
        model: its configuration.
        features: what a sampler needs to know about the features, as JSON values; saved with every
            checkpoint (see edt.data.features.FeatureInfo).
        keep_last: how many of the newest checkpoints stay.
        keep_every: checkpoints at multiples of this many steps stay, too.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        model: ModelConfig,
        features: dict[str, Any],
        keep_last: int = 3,
        keep_every: int = 50_000,
    ) -> None:
        self.folder = folder
        self.checkpoints, self.metrics = folder / "checkpoints", folder / "metrics.jsonl"
        self.name, self.model, self.features = name, model, features
        self.keep_last, self.keep_every = keep_last, keep_every
        self.resumed_step: int | None = None
        self.saved_step: int | None = None

    def sweep(self) -> None:
        """Remove what killed processes left half-written. Call it under the run's lock."""
        sweep_checkpoints(self.checkpoints)
        for pattern in (f".{self.metrics.name}.*.tmp", "samples/.*.png.*.tmp"):
            for file in self.folder.glob(pattern):
                file.unlink(missing_ok=True)

    def continue_from(self, checkpoint: Path) -> None:
        """Make a checkpoint the newest: set aside what the run wrote after its step.

        There is something if the user goes back, or if the newest checkpoints are damaged. Left in
        place, they would count as newer than everything that this run saves. If the checkpoint is
        of another folder, all that this folder holds is of another run, and is set aside.
        """
        self.resumed_step = step = int(read_json(checkpoint / "state.json")["step"])
        # The run's own checkpoint may be a link to another disk, or be given by a link.
        parents = checkpoint.resolve().parent, checkpoint.parent.resolve()
        is_own = self.checkpoints.resolve() in parents
        last_kept = step if is_own else -1
        later = [path for path in list_checkpoints(self.checkpoints) if int(path.name) > last_kept]
        if not later and (is_own or not self.metrics.exists()):
            return
        numbers = itertools.count(1)
        paths = (self.folder / f"set-aside-{number}" for number in numbers)
        target = next(path for path in paths if not path.exists())
        pictures = self.folder.glob("samples/*.png")
        later += [path for path in pictures if path.stem.isdigit() and int(path.stem) > last_kept]
        for path in later:
            path.rename(make_folder(target / path.parent.name) / path.name)
        if self.metrics.exists():
            shutil.copy(self.metrics, make_folder(target))
            if not is_own:
                self.metrics.unlink()
        what = "everything after it" if is_own else f"the earlier run in {self.folder}"
        logger.warning(
            "going back to step %d of %s: %s is now in %s. --run-dir %s continues that",
            *(step, checkpoint, what, target, target),
        )

    def save(self, state: TrainingState) -> Path:
        """Write a checkpoint and prune the old ones.

        This one and the one that the run was continued from stay.

        Raises:
            UserError: the disk is full.
        """
        config = {
            "schema_version": SCHEMA_VERSION,
            "model": dataclasses.asdict(self.model),
            "name": self.name,
            "features": self.features,
        }
        checkpoint = self.checkpoints / f"{state.step:07d}"
        save_checkpoint(checkpoint, state, config)
        self.saved_step = state.step
        keep_steps = (self.saved_step, self.resumed_step)
        prune_checkpoints(self.checkpoints, self.keep_last, self.keep_every, keep_steps)
        return checkpoint

    def load(
        self, checkpoint: Path, config: TrainConfig, allow_changes: bool = False
    ) -> TrainingState:
        """Read a checkpoint of the same model, features and configuration.

        Args:
            checkpoint: its folder.
            config: the configuration to continue with.
            allow_changes: continue where features or configuration differ from the checkpoint's.

        Raises:
            UserError: they differ, and the message names the fields; or it is another model; or
                tensors hold NaN or infinity.
        """
        other_model, differing = self.compare(checkpoint, config)
        if other_model:
            raise UserError(
                f"{checkpoint} is of another model ({other_model}); "
                "--init-from in a new --run-dir starts from the weights that fit"
            )
        if differing and not allow_changes:
            raise UserError(
                f"{checkpoint} was trained with different settings ({differing}). "
                "Pass --allow-config-change to continue with the new ones"
            )
        if differing:
            logger.warning("continuing with different settings: %s", differing)
        saved_features = read_json(checkpoint / "config.json").get("features", {})
        state = read_checkpoint(checkpoint)
        for name, tensors in state.tensors.items():
            check_finite(tensors, checkpoint / f"{name}.safetensors")
        return _with_counts(state, {**self.features, **saved_features})

    def compare(self, checkpoint: Path, config: TrainConfig) -> tuple[str, str]:
        """What differs in a checkpoint: of the model, and of the other settings. "" if nothing."""
        saved = read_json(checkpoint / "config.json")
        saved_features = saved.get("features", {})
        saved_config = TrainConfig.from_dict(read_json(checkpoint / "state.json")["config"])
        parts = (
            differences(dataclasses.asdict(saved_config), dataclasses.asdict(config)),
            _feature_differences(saved_features, self.features),
        )
        model = differences(
            _json(_with_image_size(read_config(saved["model"]), saved_features)),
            _json(_with_image_size(self.model, self.features)),
        )
        return model, ", ".join(part for part in parts if part)

    def find_unfinished(self, results_dir: Path, config: TrainConfig, steps: int) -> Path | None:
        """The last checkpoint of a run of the same settings that is below ``steps``, or None.

        Of several runs it is the one that was written to last.
        """
        found = []
        for folder in results_dir.glob("*/checkpoints"):
            for checkpoint in list_checkpoints(folder)[-1:]:
                # A checkpoint that cannot be read is not of these settings.
                with contextlib.suppress(UserError, OSError, KeyError, TypeError):
                    if int(checkpoint.name) < steps and not any(self.compare(checkpoint, config)):
                        found.append((checkpoint.stat().st_mtime, checkpoint))
        return max(found)[1] if found else None


def _with_counts(state: TrainingState, features: dict[str, Any]) -> TrainingState:
    """The state with the images and epochs, as if batch size and features had never changed.

    Version 0.1 did not count them.
    """
    if state.images_seen is not None and state.epoch is not None:
        return state
    batch_size = state.config["global_batch_size"]
    epoch = Fraction(state.step, max(features.get("count", 0) // batch_size, 1))
    return dataclasses.replace(state, images_seen=state.step * batch_size, epoch=epoch)


def _feature_differences(saved: dict[str, Any], current: dict[str, Any]) -> str:
    """Describe how the features differ from those of a checkpoint; "" if they do not.

    Features of the same content are the same, whatever was recorded of their making.
    """
    both_contents = saved.get(CONTENT), current.get(CONTENT)
    if None not in both_contents and both_contents[0] == both_contents[1]:
        return ""
    if "scaling_factor" in saved:  # versions that did not know shifts had none
        saved = {"shift_factor": None, **saved}
    # An old checkpoint knows less about its features. What both know of it is compared.
    names = [name for name in saved if name != CONTENT or None not in both_contents]
    return differences(
        {name: saved[name] for name in names}, {name: current.get(name) for name in names}
    )


def _with_image_size(model: ModelConfig, features: dict[str, Any]) -> ModelConfig:
    """The configuration with the features' image size, which version 0.1 did not record in it."""
    if model.image_size is not None:
        return model
    return dataclasses.replace(model, image_size=features.get("image_size"))


def _json(config: ModelConfig) -> dict[str, Any]:
    """A configuration as it is read back from JSON: lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(config)))

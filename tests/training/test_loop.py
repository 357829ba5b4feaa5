"""The loop around the training step: what errors and signals leave behind."""

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_training import NUM_CLASSES, state_tensors, tiny_trainer

import edt.training.loop as training_loop_module
from edt.checkpoints.folder import list_checkpoints, read_checkpoint
from edt.data.features import Features
from edt.training.config import LoopConfig
from edt.training.loop import StopSignal, training_loop
from edt.training.run_dir import RunDirectory
from edt.training.trainer import Trainer
from edt.utils.errors import UserError


class FaultyFeatures(Features):
    """36 images of noise. After ``good`` batches, each further one calls ``fault``."""

    def __init__(self, good: int, fault: Callable[[], None]) -> None:
        super().__init__(Path("features"), {}, np.arange(36) % NUM_CLASSES, (3, 16, 16))
        self.left, self.fault = good, fault

    def _read(self, indices: np.ndarray, flips: np.ndarray) -> np.ndarray:
        if not self.left:
            self.fault()
        self.left -= 1
        noise = [np.random.default_rng(i).standard_normal((3, 16, 16)) for i in indices]
        return np.array(noise, np.float32)


def disk_fails() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def file_is_damaged() -> None:
    raise UserError("cannot read 7.npy")


def worker_is_killed() -> None:
    time.sleep(1)  # until the batches before are handed over
    os.kill(os.getpid(), signal.SIGKILL)


def loop(trainer: Trainer, folder: Path, features: Features, **config) -> RunDirectory:
    run_dir = RunDirectory(folder, "EDT-Tiny/2", trainer.model.config, {})
    folder.mkdir(exist_ok=True)
    fields = {"max_steps": 20, "num_workers": 0, **config}
    training_loop(trainer, features, run_dir, LoopConfig(**fields))
    return run_dir


def assert_saved(folder: Path, expected: dict[str, torch.Tensor], step: int) -> None:
    """Compare the one checkpoint of a run with the state after ``step`` uninterrupted steps."""
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == [f"{step:07d}"]
    state = read_checkpoint(folder / "checkpoints" / f"{step:07d}")
    assert state.step == step
    actual = {
        f"{file}/{name}": value
        for file, tensors in state.tensors.items()
        for name, value in tensors.items()
    }
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.fixture(scope="module")
def after_two_steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    trainer = tiny_trainer()
    loop(trainer, tmp_path_factory.mktemp("run"), FaultyFeatures(2, disk_fails), max_steps=2)
    return state_tensors(trainer)


@pytest.mark.parametrize(
    ("fault", "num_workers", "error", "message"),
    [
        (disk_fails, 0, OSError, "Input/output error"),
        (file_is_damaged, 1, UserError, "cannot read 7.npy"),
    ],
)
def test_a_read_error_saves_the_steps_before(
    fault, num_workers, error, message, after_two_steps, tmp_path
):
    trainer = tiny_trainer()
    with pytest.raises(error, match=message):
        loop(trainer, tmp_path / "run", FaultyFeatures(2, fault), num_workers=num_workers)
    assert_saved(tmp_path / "run", after_two_steps, 2)
    with pytest.raises(error, match=message):  # at its first batch: there is nothing to save
        loop(trainer, tmp_path / "again", FaultyFeatures(0, fault))
    assert list_checkpoints(tmp_path / "again" / "checkpoints") == []
    assert multiprocessing.active_children() == []


def test_a_killed_reader_saves_the_steps_before(tmp_path):
    """It takes along the batches that it has read and not handed over: up to two steps."""
    trainer = tiny_trainer()
    with pytest.raises(UserError, match="a process that reads features in features was killed"):
        loop(trainer, tmp_path / "run", FaultyFeatures(2, worker_is_killed), num_workers=1)
    assert_saved(tmp_path / "run", state_tensors(trainer), trainer.step)


class PoisonedFeatures(FaultyFeatures):
    """Noise for ``good`` batches, and NaN afterwards."""

    def __init__(self, good: int) -> None:
        super().__init__(good, lambda: None)

    def _read(self, indices: np.ndarray, flips: np.ndarray) -> np.ndarray:
        images = super()._read(indices, flips)
        return images if self.left >= 0 else np.full_like(images, np.nan)

    def locate(self, index: int) -> str:
        return f"row {index}"


def test_too_many_skipped_steps_save_the_good_ones_before(after_two_steps, tmp_path):
    run = tmp_path / "run"
    message = r"3 steps in a row were not finite; the last good checkpoint is .*/0000005\."
    with pytest.raises(UserError, match=message):
        loop(tiny_trainer(), run, PoisonedFeatures(2), max_skipped_steps=3)
    assert_saved(run, after_two_steps, 5)
    # A run that is started again, and only skips, saves no more: it would prune good checkpoints.
    trainer = tiny_trainer()
    trainer.load_state(read_checkpoint(run / "checkpoints" / "0000005"))
    with pytest.raises(UserError, match=message):
        loop(trainer, run, PoisonedFeatures(0), max_skipped_steps=3)
    assert trainer.step == 8
    assert_saved(run, after_two_steps, 5)


def test_an_unexpected_error_after_a_step_saves_it(after_two_steps, tmp_path, monkeypatch):
    def log(values: dict, step: int) -> None:
        if step == 2:
            raise RuntimeError("the tracker is gone")

    trainer = tiny_trainer()
    monkeypatch.setattr(trainer.accelerator, "log", log)
    with pytest.raises(RuntimeError, match="the tracker is gone"):
        loop(trainer, tmp_path / "run", FaultyFeatures(9, disk_fails), log_every=1)
    assert_saved(tmp_path / "run", after_two_steps, 2)


def test_an_error_within_a_step_saves_the_step_before_or_nothing(
    after_two_steps, tmp_path, monkeypatch
):
    """Before the update the state is that of the last step; in its middle, of no step."""
    for name, saves in (("losses", True), ("update", False)):
        trainer = tiny_trainer()
        owner, method = {
            "losses": (trainer.diffusion, "losses"),
            "update": (trainer.timestep_sampler, "update"),
        }[name]
        works = getattr(owner, method)

        def fails_in_the_third_step(*args, trainer=trainer, works=works):
            if trainer.step == 2:
                raise RuntimeError("CUDA error")
            return works(*args)

        monkeypatch.setattr(owner, method, fails_in_the_third_step)
        with pytest.raises(RuntimeError, match="CUDA error"):
            loop(trainer, tmp_path / name, FaultyFeatures(9, disk_fails))
        if saves:
            assert_saved(tmp_path / name, after_two_steps, 2)
        else:
            assert list_checkpoints(tmp_path / name / "checkpoints") == []


def test_a_checkpoint_that_cannot_be_saved_does_not_hide_the_error(tmp_path, caplog):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoints").write_text("a file in the place of the folder")
    with pytest.raises(OSError, match="Input/output error"):
        loop(tiny_trainer(), folder, FaultyFeatures(1, disk_fails))
    assert "after that error: cannot write the checkpoint" in caplog.text


RECORDED, IGNORED, INTERRUPTED = 1, 0, 2


def receive(numbers: list[int], ignored: bool, same_key_press: float) -> None:
    """Exit with what became of these signals."""
    training_loop_module.SAME_KEY_PRESS = same_key_press
    if ignored:
        signal.signal(numbers[0], signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            for number in numbers:
                os.kill(os.getpid(), number)
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)
    os._exit(RECORDED if stop.number == numbers[0] else IGNORED)


@pytest.mark.parametrize(
    ("numbers", "ignored", "same_key_press", "code"),
    [
        ([signal.SIGTERM], False, 0, RECORDED),
        ([signal.SIGINT], False, 0, RECORDED),
        ([signal.SIGUSR1], False, 0, RECORDED),
        ([signal.SIGHUP], False, 0, RECORDED),
        ([signal.SIGHUP], True, 0, IGNORED),  # started with nohup
        ([signal.SIGTERM, signal.SIGINT], False, 0, RECORDED),
        ([signal.SIGINT, signal.SIGINT], False, 3600, RECORDED),  # one key press
        ([signal.SIGINT, signal.SIGINT], False, 0, INTERRUPTED),
        ([signal.SIGTERM, signal.SIGINT, signal.SIGINT], False, 0, INTERRUPTED),
    ],
)
def test_signals_that_stop_a_run(numbers, ignored, same_key_press, code):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=receive, args=(numbers, ignored, same_key_press))
    process.start()
    process.join()
    assert process.exitcode == code


def test_the_first_ctrl_c_says_what_the_second_does(caplog):
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert caplog.text == ""
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.number == signal.SIGTERM
    assert caplog.text.count("Ctrl-C again ends at once and loses the steps since the last") == 1

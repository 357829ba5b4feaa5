"""A training step and an image go through the documented files, down the floors.

A profiler notes every call from one file of the project to another during one step and one image.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from conftest import ROOT
from test_project import FLOOR_OF
from tiny_training import tiny_batch, tiny_trainer

from edt.data.vae import PixelVAE
from edt.registry import create_model
from edt.sampling.config import SamplingConfig
from edt.sampling.generate import generate
from edt.sampling.npz_writer import SampleArchive


def project_file(frame: FrameType | None) -> str | None:
    """The file of edt/ that a frame runs, relative to the root; None for other code."""
    if frame is None:
        return None
    path = Path(frame.f_code.co_filename)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT / "edt") else None


def record_calls(function: Callable[[], Any]) -> tuple[list[str], set[tuple[str, str]]]:
    """Files in the order in which they are entered, and (caller, callee) of calls between them."""
    files: list[str] = []
    calls = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        callee = project_file(frame)
        if event != "call" or callee is None:
            return
        caller_frame = frame.f_back
        while caller_frame is not None and project_file(caller_frame) is None:
            caller_frame = caller_frame.f_back
        if callee not in files:
            files.append(callee)
        caller = project_file(caller_frame)
        if caller is not None and caller != callee:
            calls.add((caller, callee))

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return files, calls


def documented_files(section: str) -> set[str]:
    """The files in the table of a section of docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    body = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| (edt/\S+\.py) \|", body, re.MULTILINE))


def floor(file: str) -> int:
    name = file.removeprefix("edt/").partition("/")[0].removesuffix(".py")
    return FLOOR_OF[name]


@pytest.fixture
def step() -> tuple[list[str], set[tuple[str, str]]]:
    trainer = tiny_trainer()
    trainer.train_step(tiny_batch(0))  # the first step fills the tables
    return record_calls(lambda: trainer.train_step(tiny_batch(1)))


@pytest.fixture
def image(tmp_path: Path) -> tuple[list[str], set[tuple[str, str]]]:
    model = create_model("EDT-Tiny/2", input_size=16, in_channels=3, num_classes=5).eval()
    model.set_amm("auto")
    config = SamplingConfig(num_sampling_steps="2", cfg_scale=2.0)
    archive = SampleArchive(tmp_path, (2, 16, 16, 3))
    archive.open()

    def draw() -> None:
        for batch in generate(model, PixelVAE(), config, torch.arange(2), 2):
            archive.write(batch.indices.numpy(), batch.images.numpy())
        assert archive.finish()

    return record_calls(draw)


@pytest.mark.parametrize("walk", ["step", "image"])
def test_calls_go_down_the_floors(walk, request):
    _, calls = request.getfixturevalue(walk)
    assert len(calls) > 10
    upward = [(caller, callee) for caller, callee in calls if floor(callee) > floor(caller)]
    assert upward == []


def test_a_training_step_goes_through_the_documented_files(step):
    files, _ = step
    around = {"edt/training/loop.py", "edt/data/batches.py"}
    assert {*files, *around} == documented_files("One training step")


def test_an_image_goes_through_the_documented_files(image):
    files, _ = image
    assert set(files) == documented_files("One image")

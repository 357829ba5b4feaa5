"""Inputs and small functions that the tests of the evaluation share."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from golden_rule import GOLDEN
from PIL import Image

ADM_GOLDEN = json.loads((GOLDEN / "evaluator.json").read_text())  # what ADM's evaluator computes


def golden_features(seed: int, count: int, scale: float, shift: float) -> np.ndarray:
    """Features (count, 2048) by the rule behind ``golden/evaluator.json``."""
    basis = np.random.default_rng(42).standard_normal((16, 2048), dtype=np.float32)
    r = np.random.default_rng(seed)
    mixed = r.standard_normal((count, 16), dtype=np.float32) @ basis
    noise = r.standard_normal((count, 2048), dtype=np.float32)
    return np.abs(scale * mixed / 4 + shift + 0.1 * noise).astype(np.float32)


@functools.cache
def golden_reference() -> np.ndarray:
    return golden_features(1, 1500, 0.4, 0.3)


@functools.cache
def golden_samples() -> np.ndarray:
    return golden_features(2, 1300, 0.45, 0.33)


def structured_images(seed: int, count: int, side: int) -> np.ndarray:
    """Smooth colours and noise, both of random strength, uint8 (count, side, side, 3)."""
    r = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        coarse = Image.fromarray(r.integers(0, 256, (*r.integers(2, 9, 2), 3), dtype=np.uint8))
        noise = r.normal(0, r.uniform(0, 40), (side, side, 3))
        image = np.clip(np.asarray(coarse.resize((side, side))) + noise, 0, 255)
        images.append(image.astype(np.uint8))
    return np.stack(images)


def write_pngs(folder: Path, images: np.ndarray) -> Path:
    """Write images as 000.png, 001.png, ...; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03}.png")
    return folder


def printed_scores(text: str) -> dict[str, float]:
    """Scores by their label from the evaluator's output."""
    lines = [line.rsplit(": ", 1) for line in text.splitlines()]
    return {label: float(value) for label, value in lines}


def refusal(main: Callable, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The error message of a command that must exit with code 2 and print no score."""
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert error.value.code == 2
    assert captured.out == ""
    message = captured.err.splitlines()[-1]
    assert "error: " in message
    return message

"""The evaluator as a command."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from evaluator import main

ROOT = Path(__file__).parents[2]


def random_images(seed: int, count: int = 40, side: int = 8, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, (count, side, side, 3), dtype=np.uint8)


@pytest.fixture
def files(tmp_path):
    np.savez(tmp_path / "ref.npz", random_images(0))
    np.savez(tmp_path / "gen.npz", random_images(1, 30, high=200))
    return tmp_path


def printed(text: str) -> dict[str, float]:
    return {
        label: float(value) for label, value in (line.rsplit(": ", 1) for line in text.splitlines())
    }


def test_command_prints_pixel_scores(files):
    command = [
        sys.executable,
        "evaluator.py",
        files / "ref.npz",
        files / "gen.npz",
        "--features",
        "pixels",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    scores = printed(result.stdout)
    assert list(scores) == [
        "Pixel-space Frechet distance",
        "Pixel-space precision",
        "Pixel-space recall",
    ]
    a, b = (
        np.load(files / name)["arr_0"].reshape(-1, 192) / 255 for name in ("ref.npz", "gen.npz")
    )
    lower_bound = ((a.mean(0) - b.mean(0)) ** 2).sum()
    upper_bound = lower_bound + a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum()
    assert lower_bound < scores["Pixel-space Frechet distance"] < upper_bound


def test_identical_sets_in_pixel_space(files, capsys):
    main([str(files / "ref.npz"), str(files / "ref.npz"), "--features", "pixels"])
    distance, precision, recall = printed(capsys.readouterr().out).values()
    assert distance == pytest.approx(0, abs=1e-6)
    assert precision == recall == 1


def test_json_report(files):
    (files / "recipe.json").write_text('{"cfg_scale": 1.5}')
    (files / "ref.npz").rename(files.parent / "ref.npz")
    (files / "gen.npz").rename(files / "samples_30.npz")
    report = files / "report.json"
    main(
        [
            str(files.parent / "ref.npz"),
            str(files),
            "--features",
            "pixels",
            "--json",
            str(report),
            "--pr",
            "adm",
        ]
    )
    report = json.loads(report.read_text())
    assert {"frechet_distance", "precision", "recall"} < report.keys()
    assert report["features"] == {"name": "pixels", "backend": "torch", "weights_sha256": None}
    assert report["samples"]["recipe"] == {"cfg_scale": 1.5}
    assert (report["reference"]["count"], report["samples"]["count"]) == (40, 30)
    assert report["precision_recall"] == {"k": 3, "mode": "adm"}


def refused(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert exit_.value.code == 2 and captured.out == ""
    message = captured.err.splitlines()[-1]
    assert "error: " in message
    return message


@pytest.mark.parametrize("features", ["pixels", "inception"])
def test_different_resolutions_are_refused(files, capsys, features):
    np.savez(files / "large.npz", random_images(2, side=16))
    message = refused(capsys, files / "ref.npz", files / "large.npz", "--features", features)
    assert "8x8" in message and "16x16" in message


def test_bad_files_are_refused_before_the_network_is_looked_for(files, capsys):
    np.savez(files / "nan.npz", np.full((4, 8, 8, 3), np.nan))
    assert "nan.npz holds NaN" in refused(capsys, files / "ref.npz", files / "nan.npz")
    assert "missing.npz" in refused(capsys, files / "missing.npz", files / "gen.npz")


def test_bad_flags_are_refused(files, capsys):
    pair = (files / "ref.npz", files / "gen.npz", "--features", "pixels")
    assert "--device" in refused(capsys, *pair, "--device", "abacus")
    assert "--batch-size" in refused(capsys, *pair, "--batch-size", "0")
    assert "--image-size" in refused(capsys, *pair, "--image-size", "0")

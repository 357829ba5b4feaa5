import json
import sys

import numpy as np
import pytest
from conftest import ROOT, run_script
from PIL import Image


@pytest.mark.slow
def test_solvers_are_compared_on_an_image_folder(trained, image_folder, tmp_path):
    pytest.importorskip("sklearn")
    for split in ("train", "test"):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / split).symlink_to(image_folder)
    paths = ["--ckpt", trained, "--images", tmp_path / "images", "--output-dir", tmp_path / "out"]
    options = ["--steps", 2, 4, "--num-images", 6]
    process = run_script(sys.executable, "benchmarks/bench_solvers.py", *paths, *options)
    assert process.returncode == 0, process.stderr
    report = json.loads((tmp_path / "out" / "solvers.json").read_text())
    assert [(row["solver"], row["steps"]) for row in report["rows"]] == [
        (solver, steps) for solver in ("ddpm", "ddim", "dpm++", "unipc") for steps in (2, 4)
    ]
    for row in report["rows"]:
        assert row["frechet_distance"] > 0, row
        assert 0 <= row["class_accuracy"] <= 1, row
    # Both splits are the same images.
    distance = report["held_back_real_images"]["frechet_distance"]
    assert distance == pytest.approx(0, abs=1e-6)
    assert np.asarray(Image.open(tmp_path / "out" / "solvers.png")).std() > 0


def test_solvers_are_compared_at_the_demos_guidance(monkeypatch):
    pytest.importorskip("sklearn")
    for folder in ("benchmarks", "tools"):
        monkeypatch.syspath_prepend(ROOT / folder)
    import bench_solvers
    import demo

    assert bench_solvers.parser().get_default("cfg_scale") == demo.CFG_SCALE


@pytest.mark.slow
def test_layouts_of_features_are_compared(tmp_path):
    options = ["--count", 600, "--seconds", 0.1, "--repeats", 1, "--folder", tmp_path]
    process = run_script(sys.executable, "benchmarks/bench_loader.py", *options)
    assert process.returncode == 0, process.stderr
    assert [line.split(" | ")[0] for line in process.stdout.splitlines()[2:6]] == [
        "| packed, once",
        "| packed, fresh",
        "| npy, once",
        "| npy, once, as the release reads it",
    ]
    assert not list(tmp_path.iterdir())

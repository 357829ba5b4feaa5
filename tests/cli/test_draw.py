"""Pictures of classes: which classes, and where the pictures go."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import fails, with_classes

import image_generator
from edt.cli.draw import grid_name


def draw(checkpoint: Path, out: Path, *more: object) -> int:
    """Draw one image per class in two steps."""
    argv = ["--ckpt", checkpoint, "--output-dir", out, "--num-sampling-steps", 2]
    return image_generator.main([str(part) for part in [*argv, "--num-variations", 1, *more]])


def test_a_number_that_is_another_classs_folder_is_refused(trained, tmp_path, capsys):
    checkpoint = with_classes(trained, tmp_path / "checkpoint", ["2", "1", "café"])
    argv = ["--ckpt", checkpoint, "--output-dir", tmp_path / "out", "--classes", 2]
    message = fails(image_generator.main, argv, capsys)
    assert "'café' has this number and class 0 has this name" in message
    assert "give index:2 or name:2" in message
    assert not (tmp_path / "out").exists()
    assert draw(checkpoint, tmp_path, "--classes", "index:2", "name:2", 1) == 0
    assert "rows: 2 café; 0 2; 1\n" in capsys.readouterr().out


def test_no_picture_overwrites_one_of_other_settings(trained, tmp_path, capsys):
    drawn = {}
    for more in (
        ("--classes", 0),
        ("--classes", 1),
        ("--classes", 0, 1),
        ("--classes", 0, "--solver", "ddim"),
        ("--classes", 0, "--num-sampling-steps", 1),
        ("--classes", 0, "--num-variations", 2),
        ("--classes", 0, "--cfg-interval", 0, 900),
        ("--classes", 0, "--amm-form", 512),
        ("--classes", 0, "--weights", "model"),
    ):
        draw(trained, tmp_path, *more)
        path = Path(capsys.readouterr().out.splitlines()[-1])
        assert path not in drawn, more
        drawn[path] = path.read_bytes()
        assert {file: file.read_bytes() for file in tmp_path.rglob("*.png")} == drawn
    draw(trained, tmp_path, "--classes", 0)  # the same again
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.png")} == drawn


def test_a_picture_has_its_recipe_beside_it(trained, tmp_path, capsys):
    draw(trained, tmp_path, "--classes", "cat", 0, "--seed", 7, "--solver", "unipc")
    path = Path(capsys.readouterr().out.splitlines()[-1])
    recipe = json.loads(path.with_suffix(".json").read_text())
    expected = {
        "classes": [2, 0],
        "num_variations": 1,
        "with_and_without_amm": True,
        "seed": 7,
        "solver": "unipc",
        "num_sampling_steps": "2",
        "cfg_scale": 4.0,
        "weights": "ema",
        "vae": "pixels",
    }
    assert {name: recipe[name] for name in expected} == expected
    assert recipe["amm"]["blocks"] == [4]
    assert len(recipe["weights_sha256"]) == 64
    assert set(recipe["versions"]) == {"python", "edt", "torch", "diffusers"}


@pytest.mark.parametrize(("rank", "pictures"), [("0", 1), ("1", 0)])
def test_one_of_many_processes_draws(rank, pictures, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert draw(trained, tmp_path / "out", "--classes", 0) == 0
    assert len(list(tmp_path.rglob("*.png"))) == pictures


def test_a_long_list_of_classes_makes_no_long_name():
    settings: dict[str, Any] = {"solver": "ddpm", "num_sampling_steps": "10,15,25" * 50}
    settings |= {"amm": {"blocks": list(range(22))}, "with_and_without_amm": True}
    names = [grid_name({**settings, "classes": [*range(1000), last]}) for last in (0, 1)]
    assert names[0] != names[1]
    assert max(map(len, names)) < 200

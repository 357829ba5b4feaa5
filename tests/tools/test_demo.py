"""The functions of tools/demo.py, on small inputs."""

import json

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

pytest.importorskip("sklearn")


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import demo

    return demo


@pytest.fixture
def real(demo, tmp_path):
    """The images that the demo trains on, and those that it holds back."""
    return demo.make_image_folders(tmp_path / "images")


def write_samples(demo, folder, name, images, labels):
    """A file of samples as the 50,000-image script writes it, with scores."""
    folder.mkdir()
    path = folder / "samples.npz"
    np.savez(path, arr_0=np.repeat(images[..., None], 3, axis=-1))
    np.save(folder / "labels.npy", labels)
    scores = {"frechet_distance": 1.25, "precision": 0.75, "recall": 0.5}
    return demo.Samples(name, path, scores)


def test_the_image_folders_hold_the_digits(real, tmp_path):
    counts = {split: len(images) for split, (images, _) in real.items()}
    assert counts == {"train": 1438, "test": 359}
    for split, (images, labels) in real.items():
        files = sorted((tmp_path / "images" / split).glob("*/*.png"), key=lambda path: path.name)
        assert [int(path.parent.name) for path in files] == labels.tolist()
        for position in (0, 7, len(files) - 1):
            assert np.array_equal(np.asarray(Image.open(files[position])), images[position])


def test_the_table_shows_scores_and_the_share_in_the_right_class(demo, real, tmp_path):
    images, labels = (values[:40] for values in real["train"])
    wrong_labels = (labels + 1) % 10
    samples = [
        write_samples(demo, tmp_path / "right", "right labels", images, labels),
        write_samples(demo, tmp_path / "wrong", "wrong labels", images, wrong_labels),
    ]
    header, *rows = demo.report(samples, real).splitlines()
    assert header.split()[:3] == ["distance", "precision", "recall"]
    for row in rows[:2]:
        assert row.split()[2:5] == ["1.250", "0.750", "0.500"]
    assert [row[:24].strip() for row in rows] == [
        "right labels",
        "wrong labels",
        "held-back real digits",
    ]
    right, wrong, held_back = (float(row.split()[-1].rstrip("%")) for row in rows)
    assert right > 90
    assert wrong < 10
    assert held_back > 90


def test_the_pictures_show_the_samples(demo, tmp_path):
    pytest.importorskip("matplotlib")
    shape = (80, demo.IMAGE_SIZE, demo.IMAGE_SIZE)
    grey = {"on": np.full(shape, 60, np.uint8), "off": np.full(shape, 180, np.uint8)}
    samples = [
        write_samples(demo, tmp_path / name, name, images, np.zeros(80, int))
        for name, images in grey.items()
    ]
    (tmp_path / "run").mkdir()
    row = {"step": 1, "loss_full": 0.5, "loss_masked": 0.6}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    demo.draw(tmp_path, samples)
    tile, scale = demo.IMAGE_SIZE + 2, demo.ENLARGEMENT
    grid = np.asarray(Image.open(tmp_path / "samples.png"))
    assert grid.shape == ((8 * tile + 2) * scale, (10 * tile + 2) * scale, 3)
    pairs = np.asarray(Image.open(tmp_path / "amm-on-off.png"))
    assert pairs.shape == ((6 * tile + 2) * scale, (10 * tile + 2) * scale, 3)
    centres = [(row * tile + tile // 2) * scale for row in range(6)]
    assert pairs[centres, tile // 2 * scale, 0].tolist() == [60, 180] * 3
    assert Image.open(tmp_path / "losses.png").width > 0


def test_options_become_flags(demo, capfd):
    demo.run_script("evaluator.py", help=True)
    assert "$ python evaluator.py --help\n" in capfd.readouterr().out

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


def write_samples(demo, folder, name, images, labels, distances=(1.25,)):
    """A file of samples for each seed as the 50,000-image script writes it, with scores."""
    row = demo.Samples(name, [], [])
    for seed, distance in enumerate(distances):
        path = folder / str(seed) / "samples.npz"
        path.parent.mkdir(parents=True)
        np.savez(path, arr_0=np.repeat(images[..., None], 3, axis=-1))
        np.save(path.with_suffix(".labels.npy"), labels)
        row.paths.append(path)
        row.scores.append({"frechet_distance": distance, "precision": 0.75, "recall": 0.5})
    return row


def test_the_image_folders_hold_the_digits(real, tmp_path):
    counts = {split: len(images) for split, (images, _) in real.items()}
    assert counts == {"train": 1438, "test": 359}
    for split, (images, labels) in real.items():
        files = sorted((tmp_path / "images" / split).glob("*/*.png"), key=lambda path: path.name)
        assert [int(path.parent.name) for path in files] == labels.tolist()
        for position in (0, 7, len(files) - 1):
            assert np.array_equal(np.asarray(Image.open(files[position])), images[position])


def test_the_table_shows_means_and_deviations_over_the_seeds(demo, real, tmp_path):
    images, labels = (values[:40] for values in real["train"])
    samples = [
        write_samples(demo, tmp_path / "on", "AMM on", images, labels, (1.0, 2.0, 6.0)),
        write_samples(
            demo, tmp_path / "off", "AMM off", images, (labels + 1) % 10, (2.0, 2.5, 6.0)
        ),
    ]
    header, *lines = demo.report(samples, real).splitlines()
    assert header.split()[:3] == ["distance", "precision", "recall"]
    rows = {line[:22].strip(): line[22:].replace("±", "").split() for line in lines[:4]}
    means = {name: [float(cell) for cell in cells[::2]] for name, cells in rows.items()}
    deviations = {name: [float(cell) for cell in cells[1::2]] for name, cells in rows.items()}
    assert means["AMM on"][:3] == [3.0, 0.75, 0.5]
    assert means["AMM off"][:3] == [3.5, 0.75, 0.5]
    assert deviations["AMM on"][0] == pytest.approx(np.std([1, 2, 6], ddof=1), abs=5e-4)
    assert deviations["AMM off"][0] == pytest.approx(np.std([2, 2.5, 6], ddof=1), abs=5e-4)
    # The spread of the difference is that of the pairs, not of the two sets.
    assert means["difference"][0] == -0.5
    assert deviations["difference"][0] == pytest.approx(np.std([-1, -0.5, 0], ddof=1), abs=5e-4)
    assert means["AMM on"][3] > 90
    assert means["AMM off"][3] < 10
    assert float(rows["held-back real digits"][0]) > 90


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

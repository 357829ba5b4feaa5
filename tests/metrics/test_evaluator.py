"""The evaluator as a command."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import HUGE_PNG, run_script
from evaluation_helpers import printed_scores, refusal, write_pngs

from edt.metrics import Backend, FeatureName, PrecisionRecallMode
from edt.utils.choices import choices
from evaluator import main, parse


def random_images(seed: int, count: int = 40, side: int = 8, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, (count, side, side, 3), dtype=np.uint8)


@pytest.fixture
def files(tmp_path):
    np.savez(tmp_path / "ref.npz", random_images(0))
    np.savez(tmp_path / "gen.npz", random_images(1, 30, high=200))
    return tmp_path


def test_command_prints_pixel_scores(files):
    command = ("evaluator.py", files / "ref.npz", files / "gen.npz", "--features", "pixels")
    process = run_script(sys.executable, *command)
    assert process.returncode == 0, process.stderr
    scores = printed_scores(process.stdout)
    assert list(scores) == [
        "Pixel-space Frechet distance",
        "Pixel-space precision",
        "Pixel-space recall",
    ]
    names = ("ref.npz", "gen.npz")
    a, b = (np.load(files / name)["arr_0"].reshape(-1, 192) / 255 for name in names)
    lower_bound = ((a.mean(0) - b.mean(0)) ** 2).sum()
    upper_bound = lower_bound + a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum()
    assert lower_bound < scores["Pixel-space Frechet distance"] < upper_bound


def test_identical_sets_in_pixel_space(files, capsys):
    main([str(files / "ref.npz"), str(files / "ref.npz"), "--features", "pixels"])
    distance, precision, recall = printed_scores(capsys.readouterr().out).values()
    assert distance == pytest.approx(0, abs=1e-6)
    assert precision == 1
    assert recall == 1


def test_json_report(files):
    (files / "recipe.json").write_text('{"cfg_scale": 1.5}')
    (files / "ref.npz").rename(files.parent / "ref.npz")
    (files / "gen.npz").rename(files / "samples_30.npz")
    path = files / "report.json"
    pair = [str(files.parent / "ref.npz"), str(files)]
    main([*pair, "--features", "pixels", "--json", str(path), "--pr", "adm"])
    report = json.loads(path.read_text())
    assert {"frechet_distance", "precision", "recall"} < report.keys()
    assert report["features"] == {"name": "pixels", "backend": "torch", "weights_sha256": None}
    assert report["samples"]["recipe"] == {"cfg_scale": 1.5}
    assert (report["reference"]["count"], report["samples"]["count"]) == (40, 30)
    assert report["precision_recall"] == {"k": 3, "mode": "adm"}


@pytest.mark.parametrize("features", ["pixels", "inception"])
def test_different_resolutions_are_refused(files, capsys, features):
    np.savez(files / "large.npz", random_images(2, side=16))
    message = refusal(main, capsys, files / "ref.npz", files / "large.npz", "--features", features)
    assert "8x8" in message
    assert "16x16" in message


def test_bad_files_are_refused_before_the_network_is_looked_for(files, capsys):
    np.savez(files / "nan.npz", np.full((4, 8, 8, 3), np.nan))
    assert "nan.npz holds NaN" in refusal(main, capsys, files / "ref.npz", files / "nan.npz")
    assert "missing.npz" in refusal(main, capsys, files / "missing.npz", files / "gen.npz")


def test_advice_of_the_command_followed_gives_distance_zero(files, capsys):
    images, command = random_images(0), (files / "ref.npz", files / "x.npz", "--features", "pixels")
    for array in (images / 255, images / 127.5 - 1, images.astype(np.int64), images * 257.0):
        np.savez(files / "x.npz", array)
        advice = refusal(main, capsys, *command).split("convert with ")[1]
        np.savez(files / "x.npz", eval(advice, {"np": np, "x": array}))
        main([str(argument) for argument in command])
        scores = printed_scores(capsys.readouterr().out)
        assert scores["Pixel-space Frechet distance"] == pytest.approx(0, abs=1e-6)


def test_what_cannot_be_compared_is_refused_before_the_network_is_looked_for(
    files, capsys, monkeypatch
):
    monkeypatch.setattr("edt.metrics.extractors.find_weights", None)  # a call: TypeError
    np.savez(files / "two.npz", random_images(3, 2))
    np.savez(files / "64.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez(files / "complex.npz", mu=np.zeros(2048), sigma=np.eye(2048) * (1 + 0j))
    for pair in (("ref.npz", "two.npz"), ("two.npz", "gen.npz")):
        message = refusal(main, capsys, *(files / name for name in pair))
        assert "two.npz holds 2 images, but precision and recall need at least 4" in message
    message = refusal(main, capsys, files / "64.npz", files / "gen.npz")
    assert "64 dimensions" in message
    assert "2048" in message
    message = refusal(main, capsys, files / "complex.npz", files / "gen.npz")
    assert "complex.npz, mu and sigma: the statistics hold complex128" in message


def test_bad_flags_are_refused(files, capsys):
    pair = (files / "ref.npz", files / "gen.npz", "--features", "pixels")
    assert "--device" in refusal(main, capsys, *pair, "--device", "abacus")
    assert "--batch-size" in refusal(main, capsys, *pair, "--batch-size", "0")
    assert "--image-size" in refusal(main, capsys, *pair, "--image-size", "0")


@pytest.mark.parametrize(
    "option, literal",
    [("--features", FeatureName), ("--backend", Backend), ("--pr", PrecisionRecallMode)],
)
def test_choices_of_the_command_line_are_those_of_the_library(capsys, option, literal):
    for value in choices(literal):
        _, args = parse(["ref.npz", "gen.npz", option, value])
        assert getattr(args, option.removeprefix("--")) == value
    message = refusal(main, capsys, "ref.npz", "gen.npz", option, "unknown")
    assert all(value in message for value in choices(literal))


def test_commands_are_parsed_with_their_own_arguments():
    command, args = parse(["make-ref", "photos", "ref.npz", "--num-images", "7"])
    assert command.__name__ == "make_ref"
    assert (args.images, args.num_images) == (Path("photos"), 7)
    command, args = parse(["convert-inception", "in.pb", "out.safetensors"])
    assert command.__name__ == "convert_inception"
    assert args.out.name == "out.safetensors"


def test_reference_of_statistics_alone_is_refused(tmp_path, capsys):
    np.savez(tmp_path / "s.npz", mu=np.zeros(4), sigma=np.eye(4))
    message = refusal(main, capsys, "make-ref", tmp_path / "s.npz", tmp_path / "ref.npz")
    assert "give images" in message


def test_make_ref_says_which_images_it_reads(tmp_path, capsys):
    images = random_images(0, 20)
    write_pngs(tmp_path / "elsewhere", images[:5])
    root = write_pngs(tmp_path / "root" / "bee", images[5:]).parent
    (root / "ant").symlink_to(tmp_path / "elsewhere")
    (root / "bee" / "moving.gif").touch()
    main(["make-ref", str(root), str(tmp_path / "ref.npz"), "--features", "pixels"])
    assert f"{root}: 20 images of 2 classes; left out: 1 .gif\n" in capsys.readouterr().err
    np.testing.assert_array_equal(np.load(tmp_path / "ref.npz")["arr_0"], images)
    (root / "bee").rename(root / "train")
    (root / "ant").rename(root / "val")
    message = refusal(main, capsys, "make-ref", root, tmp_path / "new.npz", "--features", "pixels")
    assert message.endswith(f"(train, val); give one of them, probably {root / 'train'}")


def test_pictures_that_cannot_be_read_end_in_one_line(tmp_path, capsys):
    folder = write_pngs(tmp_path / "images", random_images(0, 4))
    (folder / "bomb.png").write_bytes(HUGE_PNG)
    for argument in ([], ["--image-size", "8"]):
        command = (folder, folder, "--features", "pixels", *argument)
        message = refusal(main, capsys, *command)
        assert f"cannot read the image {folder / 'bomb.png'} (Image size" in message
    (folder / "bomb.png").rename(folder / "\udce9.png")
    assert r"\udce9.png" in refusal(main, capsys, *command)


def test_outputs_that_are_no_file_are_refused_before_work(tmp_path, capsys):
    folder = write_pngs(tmp_path / "images", random_images(0, 8))
    fifo, link = tmp_path / "fifo", tmp_path / "link"
    os.mkfifo(fifo)
    link.symlink_to(fifo)
    # The missing inputs would be refused next.
    for path in (fifo, link):
        for command in (
            ("make-ref", tmp_path / "absent", path, "--features", "pixels"),
            (tmp_path / "absent", tmp_path / "absent", "--features", "pixels", "--json", path),
        ):
            message = refusal(main, capsys, *command)
            assert f"{path} is a pipe, not a file; name a file" in message
    assert fifo.is_fifo()
    assert link.is_symlink()
    link.unlink()
    link.symlink_to(tmp_path / "new" / "scores.json")
    main([str(folder), str(folder), "--features", "pixels", "--json", str(link)])
    capsys.readouterr()
    assert link.is_symlink()
    assert "frechet_distance" in json.loads((tmp_path / "new" / "scores.json").read_text())
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    message = refusal(main, capsys, "make-ref", folder, tmp_path / "loop")
    assert f"({tmp_path / 'loop'})" in message

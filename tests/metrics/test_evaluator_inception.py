"""The evaluator as a command on Inception features, with a generated graph in place of the
published one.
"""

import hashlib
import json

import inception_graph
import numpy as np
import pytest
from evaluation_helpers import printed_scores, refusal, structured_images, write_pngs

from evaluator import main

ADM_LINES = ["Inception Score", "FID", "sFID", "Precision", "Recall"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A graph, a folder of photographs of 64 x 70 pixels, and samples of 32 pixels."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "graph.pb").write_bytes(inception_graph.random_graph(0))
    write_pngs(folder / "photos" / "class", structured_images(1, 12, 70)[:, :64])
    np.savez(folder / "samples.npz", structured_images(2, 10, 32))
    return folder


def run(folder, *arguments) -> None:
    main([str(argument) for argument in arguments] + ["--inception", str(folder / "graph.pb")])


def test_from_photographs_to_scores(folder, capsys, caplog):
    """make-ref crops as training does, its file has ADM's arrays, and its own images score as
    perfect samples.
    """
    photos, path, size = folder / "photos", folder / "ref.npz", ("--image-size", 32)
    run(folder, "make-ref", photos, path, *size, "--num-images", 5)
    with np.load(path) as reference:
        assert reference["arr_0"].shape == (5, 32, 32, 3)
        assert reference["mu"].shape == (2048,)
        assert reference["sigma"].shape == (2048, 2048)
        assert reference["mu_s"].shape == (2023,)
        assert reference["sigma_s"].shape == (2023, 2023)
    capsys.readouterr()
    run(folder, path, photos, *size, "--json", folder / "report.json")
    scores = printed_scores(capsys.readouterr().out)
    assert list(scores) == ADM_LINES
    assert scores["FID"] == pytest.approx(0, abs=1e-3)
    assert scores["sFID"] == pytest.approx(0, abs=1e-3)
    assert scores["Recall"] == 1  # the five images kept are among the samples
    assert "12 samples; published scores use 50000" in caplog.text

    report = json.loads((folder / "report.json").read_text())
    assert report["features"] == {
        "name": "inception",
        "backend": "torch",
        "weights_sha256": hashlib.sha256((folder / "graph.pb").read_bytes()).hexdigest(),
    }
    assert report["reference"]["moments"] == {"from": "file", "count": 12}
    assert (report["reference"]["count"], report["samples"]["count"]) == (5, 12)
    assert report["inception_score_splits"] == [report["inception_score"]]
    assert {"kid", "kid_std"} < report.keys()


def test_statistics_alone_give_fid_and_sfid(folder, capsys, caplog):
    run(folder, "make-ref", folder / "photos", folder / "ref.npz", "--image-size", 32)
    with np.load(folder / "ref.npz") as reference:
        moments = {name: reference[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez(folder / "only.npz", **moments)
    capsys.readouterr()
    run(folder, folder / "only.npz", folder / "samples.npz")
    scores = printed_scores(capsys.readouterr().out)
    assert list(scores) == ["Inception Score", "FID", "sFID"]
    assert scores["FID"] > 1
    assert "Precision: not computed" in caplog.text


def test_reference_of_another_network_is_refused(folder, tmp_path, capsys):
    run(folder, "make-ref", folder / "photos", tmp_path / "ref.npz", "--image-size", 32)
    with np.load(tmp_path / "ref.npz") as reference:
        np.savez(tmp_path / "other.npz", **{**reference, "weights_sha256": np.array("0" * 64)})
    pair = (tmp_path / "other.npz", folder / "samples.npz", "--inception", folder / "graph.pb")
    assert "other Inception weights" in refusal(main, capsys, *pair)


def test_missing_and_wrong_weights_are_refused(folder, tmp_path, capsys):
    pair = (folder / "samples.npz", folder / "samples.npz")
    assert "nowhere.pb" in refusal(main, capsys, *pair, "--inception", tmp_path / "nowhere.pb")
    (tmp_path / "html.pb").write_text("<html>")
    assert "html.pb" in refusal(main, capsys, *pair, "--inception", tmp_path / "html.pb")
    convert = ("convert-inception", folder / "graph.pb", tmp_path / "out.pt")
    assert ".safetensors" in refusal(main, capsys, *convert)


def test_converted_weights_give_the_same_report(folder, tmp_path):
    converted = tmp_path / "graph.safetensors"
    main(["convert-inception", str(folder / "graph.pb"), str(converted)])
    pair = (folder / "samples.npz", folder / "samples.npz")
    cache = tmp_path / "cache"
    reports = []
    for weights in (folder / "graph.pb", converted):
        report = tmp_path / f"{weights.suffix}.json"
        options = ("--inception", weights, "--json", report, "--cache-dir", cache)
        main([str(argument) for argument in (*pair, *options)])
        reports.append(report.read_text())
    assert reports[0] == reports[1]
    assert len(list(cache.iterdir())) == 1  # one set of images, one hash of the weights


@pytest.mark.slow
def test_backends_agree(folder, tmp_path, capsys):
    pytest.importorskip("tensorflow")
    np.savez(tmp_path / "ref.npz", structured_images(3, 100, 64))
    np.savez(tmp_path / "gen.npz", structured_images(4, 80, 64))
    scores = {}
    for backend in ("torch", "tensorflow"):
        run(folder, tmp_path / "ref.npz", tmp_path / "gen.npz", "--backend", backend)
        scores[backend] = printed_scores(capsys.readouterr().out)
    for name in ADM_LINES[:3]:
        assert scores["torch"][name] == pytest.approx(scores["tensorflow"][name], rel=1e-3)
    for name in ADM_LINES[3:]:
        # One image more or less may cross a radius: the features differ in the last bit, and half
        # precision rounds.
        assert scores["torch"][name] == pytest.approx(scores["tensorflow"][name], abs=1.01 / 80)

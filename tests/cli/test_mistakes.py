"""What a user can do wrong: one line that names the thing and the remedy, exit code 2, before work
starts.
"""

import argparse
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SAMPLE, TRAIN, fails, update_manifest
from safetensors.torch import load_file, save_file

import evaluator
import extract_features
import image_generator
import image_generator_ddp
import train_mask_adan
from edt.checkpoints.folder import list_checkpoints
from edt.cli.build import check_speed_options
from edt.utils.errors import UserError

PIXELS = ("--vae", "pixels", "--image-size", "16", "--num-workers", "0")  # of an extraction


def continued(run_folder: Path, features: Path, folder: Path, *more) -> list[str]:
    """The command that continues a copy of a run for one step."""
    shutil.copytree(run_folder, folder)
    argv = [*TRAIN, "--feature-path", features, "--run-dir", folder, "--max-steps", 3, *more]
    return [str(part) for part in argv]


def test_resume_without_a_checkpoint_is_refused(features, run_folder, tmp_path, capsys):
    base = [*TRAIN, "--feature-path", features, "--max-steps", 3]
    absent = tmp_path / "absent"
    for argv, message in (
        (["--run-dir", tmp_path / "run", "--resume"], "leave --resume out"),
        (["--run-dir", tmp_path / "run", "--resume", absent], f"{absent}/checkpoints"),
        (["--run-dir", tmp_path / "run", "--resume", features / "manifest.json"], "the file"),
        (["--run-dir", run_folder, "--resume", absent], f"{absent}/checkpoints"),
        (["--run-dir", run_folder, "--resume-step", 7], "no checkpoint of step 7"),
        (["--results-dir", tmp_path, "--resume"], "no run of EDT-Tiny/2"),
        (["--results-dir", tmp_path, "--resume-step", 2], "no run of EDT-Tiny/2"),
    ):
        assert message in fails(train_mask_adan.main, [*base, *argv], capsys)
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []


def test_a_run_folder_whose_path_is_not_utf8_is_refused(features, tmp_path, capsys):
    """safetensors would write its checkpoints, and not read them."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    for option in ("--run-dir", "--results-dir"):
        argv = [*TRAIN, "--feature-path", features, option, folder, "--max-steps", 3]
        assert "is not UTF-8, which files of weights need" in fails(
            train_mask_adan.main, argv, capsys
        )
    assert not folder.exists()


def test_resume_of_another_run_is_refused(features, run_folder, tmp_path, capsys):
    argv = continued(run_folder, features, tmp_path / "run")
    for change, message in (
        (["--init-lr", 0.01], "init_lr: 0.001 -> 0.01"),
        (["--global-batch-size", 8], "global_batch_size: 4 -> 8"),
        (["--model", "EDT-S/2"], "another model (depths"),
        (["--model", "EDT-S/2", "--allow-config-change"], "another model (depths"),
    ):
        assert message in fails(train_mask_adan.main, [*argv, *change], capsys)
    assert train_mask_adan.main([*argv, "--global-batch-size", "8", "--allow-config-change"]) == 0


def test_a_folder_of_samples_with_other_settings_is_refused(run_folder, tmp_path, capsys):
    argv = ["--ckpt", str(run_folder), *SAMPLE, "--output-dir", str(tmp_path)]
    image_generator_ddp.main(argv)
    assert "labels: uniform -> balanced" in fails(
        image_generator_ddp.main, [*argv, "--labels", "balanced"], capsys
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "imagenet_features" / "7.npy").write_bytes(b"\x93NUMPY"),
            "7.npy; it is damaged",
        ),
        (
            lambda folder: np.save(
                folder / "imagenet_features" / "7.npy", np.zeros((1, 3, 8, 8), np.float32)
            ),
            "7.npy has shape",
        ),
        (
            lambda folder: (folder / "imagenet_labels" / "39.npy").unlink(),
            "40 features but 39 labels",
        ),
        (
            lambda folder: np.save(folder / "imagenet_labels" / "39.npy", np.array([3])),
            "label 3, beyond",
        ),
        (lambda folder: shutil.rmtree(folder / "imagenet_features"), "no features in"),
        (
            lambda folder: [
                (folder / f"imagenet_{kind}" / "39.npy").unlink() for kind in ("labels", "features")
            ],
            "39 of 40",
        ),
    ],
)
def test_damaged_features_are_named(damage, message, image_folder, tmp_path, capsys):
    folder = tmp_path / "features"
    paths = ["--data-path", str(image_folder), "--features-path", str(folder)]
    extract_features.main([*paths, *PIXELS, "--layout", "npy"])
    damage(folder)
    argv = [*TRAIN, "--feature-path", folder, "--run-dir", tmp_path / "run"]
    argv += ["--epochs", 1, "--num-workers", 1]
    assert message in fails(train_mask_adan.main, argv, capsys)
    # The features are refused when they are opened; or step 10 meets image 7, and nine are saved.
    saved = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert saved in ([], ["0000009"])
    # A worker that still runs would hold up the end of the process.
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "EDT-M/2"], "unknown model 'EDT-M/2'"),
        (["--model", "DiT-S/8"], "DiT has no masking 'edt'; choose --masking none"),
        (["--masking", "mdt"], "EDT has no masking 'mdt'; choose --masking edt or none"),
        (["--num-classes", 2], "label 2, beyond --num-classes 2"),
        (["--global-batch-size", 41], "40 images are fewer"),
        (["--image-size", 32], "image_size 16, not 32"),
        (["--vae", "ema"], "vae pixels, not ema"),
        (["--init-from", "absent.pt"], "no checkpoint at absent.pt"),
    ],
)
def test_wrong_training_arguments_are_named(more, message, features, tmp_path, capsys):
    paths = ["--feature-path", features, "--run-dir", tmp_path / "run"]
    argv = [*TRAIN, *paths, "--max-steps", 1, *more]
    assert message in fails(train_mask_adan.main, argv, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests a machine without a GPU")
def test_speed_that_this_machine_cannot_give_is_refused(
    features, run_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))  # no compiler
    monkeypatch.delenv("CXX", raising=False)
    for more, message in (
        (["--attention", "triton"], "needs a GPU"),
        (["--compile", "block"], "C++ compiler"),
    ):
        paths = ["--feature-path", features, "--run-dir", tmp_path / "run"]
        train = [*TRAIN, *paths, "--max-steps", 1, *more]
        sample = ["--ckpt", run_folder, "--output-dir", tmp_path / "samples", *more]
        assert message in fails(train_mask_adan.main, train, capsys)
        assert message in fails(image_generator_ddp.main, sample, capsys)
        assert not (tmp_path / "run").exists()
        assert not (tmp_path / "samples").exists()


def test_bfloat16_is_refused_on_a_gpu_that_emulates_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    args = argparse.Namespace(precision="bf16", attention="auto", compile="off")
    with pytest.raises(UserError, match="Tesla T4"):
        check_speed_options(args, torch.device("cuda"))
    args.precision = "tf32"
    check_speed_options(args, torch.device("cuda"))


@pytest.mark.parametrize(
    ("main", "more", "message"),
    [
        (image_generator_ddp.main, ["--model", "EDT-S/2"], "not (1, 64, 312)"),
        (image_generator_ddp.main, ["--model", "SiT-S/2"], "unknown model"),
        (image_generator_ddp.main, ["--model", "DiT-S/2"], "of the family EDT, not DiT-S/2"),
        (image_generator_ddp.main, ["--image-size", 32], "images of 16 pixels, not 32"),
        (
            image_generator_ddp.main,
            ["--labels", "3"],
            "class 3 is outside the model's classes, 0 to 2",
        ),
        (image_generator_ddp.main, ["--cfg-scale", 0.9], "--cfg-scale must be 1"),
        (image_generator_ddp.main, ["--num-sampling-steps", "0"], "sampling steps"),
        (image_generator_ddp.main, ["--num-images", 0], "--num-images"),
        (image_generator_ddp.main, ["--amm-blocks", "9"], "block 9 does not exist"),
        (image_generator_ddp.main, ["--amm-blocks", "a"], "--amm-blocks"),
        (image_generator_ddp.main, ["--model", "EDT-Tiny/2_noAMM", "--amm"], "--amm-blocks"),
        (image_generator_ddp.main, ["--vae", "./absent"], "cannot load the VAE ./absent"),
        (image_generator_ddp.main, ["--num-images", 10**13], "GiB"),
        (image_generator_ddp.main, ["--amm", "--amm-radius", "-1"], "AMM radius"),
        (
            image_generator_ddp.main,
            ["--solver", "dpm++", "--num-sampling-steps", "10,15,25"],
            "plain number",
        ),
        (image_generator_ddp.main, ["--cfg-interval", 700, 100], "--cfg-interval"),
        (image_generator.main, ["--solver", "unipc", "--num-sampling-steps", "1001"], "1 to 999"),
        (image_generator.main, ["--classes", "0", "-1"], "class -1 is outside"),
        (image_generator.main, ["--classes", "3"], "class 3 is outside"),
        (image_generator.main, ["--classes", "bees"], "did you mean bee?"),
        (image_generator.main, ["--num-variations", 0], "--num-variations"),
        (image_generator.main, ["--amm-blocks", "9"], "block 9 does not exist"),
    ],
)
def test_wrong_sampling_arguments_are_named(
    main, more, message, run_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    argv = ["--ckpt", run_folder, "--num-sampling-steps", 2, "--output-dir", tmp_path / "out"]
    argv += more
    assert message in fails(main, argv, capsys)
    assert not list(tmp_path.rglob("*.npz"))
    if main is image_generator.main:
        assert not (tmp_path / "out").exists()


def test_wrong_images_are_named(image_folder, tmp_path, capsys):
    def extract(folder, *more):
        paths = ["--data-path", folder, "--features-path", tmp_path / "out"]
        return [*paths, "--vae", "pixels", "--num-workers", 1, *more]

    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    shutil.copy(next(image_folder.rglob("*.png")), tmp_path / "flat")
    for name in ("absent", "empty", "flat"):
        assert name in fails(
            extract_features.main, extract(tmp_path / name, "--image-size", 16), capsys
        )
    wrapped, splits = tmp_path / "images", tmp_path / "splits"
    shutil.copytree(image_folder, splits / "data" / "train")
    shutil.copytree(image_folder, splits / "data" / "val")
    shutil.copytree(image_folder, wrapped / "classes")
    for folder, meant in ((splits, "splits/data/train"), (wrapped, "images/classes")):
        message = fails(extract_features.main, extract(folder, "--image-size", 16), capsys)
        assert message.endswith(f" {tmp_path / meant}")
    command = ["make-ref", splits, tmp_path / "ref.npz", "--features", "pixels"]
    assert fails(evaluator.main, command, capsys).endswith(f" {splits / 'data' / 'train'}")
    assert "--image-size" in fails(
        extract_features.main, extract(image_folder, "--image-size", 0), capsys
    )
    assert "a multiple of 8" in fails(
        extract_features.main, extract(image_folder, "--image-size", 15), capsys
    )
    assert not (tmp_path / "out").exists()
    copied = shutil.copytree(image_folder, tmp_path / "copied")
    truncated = next(copied.rglob("*.png"))
    truncated.write_bytes(truncated.read_bytes()[:100])
    assert str(truncated) in fails(
        extract_features.main, extract(copied, "--image-size", 16), capsys
    )
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.endswith("tmp")]


@pytest.mark.parametrize(
    ("main", "option", "values"),
    [
        (train_mask_adan.main, "--max-steps", ["0", "-3"]),
        (train_mask_adan.main, "--global-batch-size", ["0"]),
        (train_mask_adan.main, "--log-every", ["0"]),
        (train_mask_adan.main, "--ckpt-every", ["0"]),
        (train_mask_adan.main, "--keep-every", ["0"]),
        (train_mask_adan.main, "--keep-last", ["0"]),
        (train_mask_adan.main, "--num-workers", ["-1"]),
        (train_mask_adan.main, "--mini-batch-size", ["-7"]),
        (train_mask_adan.main, "--init-lr", ["0", "-1", "nan", "inf", "fast"]),
        (train_mask_adan.main, "--lr-steps", ["0"]),
        (train_mask_adan.main, "--clip", ["0", "nan", "inf"]),
        (train_mask_adan.main, "--sample-every", ["-1"]),
        (train_mask_adan.main, "--ema-decay", ["2", "-1", "nan"]),
        (train_mask_adan.main, "--max-bad-steps", ["0"]),
        (extract_features.main, "--batch-size", ["0"]),
        (extract_features.main, "--num-workers", ["-1"]),
        (extract_features.main, "--shard-size", ["0"]),
        (image_generator_ddp.main, "--num-images", ["0", "1.5"]),
        (image_generator_ddp.main, "--num-sampling-steps", [""]),
        (image_generator.main, "--num-variations", ["0"]),
        (evaluator.main, "--batch-size", ["0"]),
    ],
)
def test_numbers_out_of_range_are_named(
    main, option, values, features, run_folder, image_folder, tmp_path, capsys
):
    out = tmp_path / "out"
    argv = {
        train_mask_adan.main: [*TRAIN, "--feature-path", features, "--run-dir", out],
        extract_features.main: ["--data-path", image_folder, "--features-path", out],
        evaluator.main: [image_folder, image_folder, "--features", "pixels"],
    }.get(main, ["--ckpt", run_folder, "--output-dir", out])
    for value in values:
        assert option in fails(main, [*argv, f"{option}={value}"], capsys)
    assert not out.exists()


def test_places_that_cannot_be_written_are_named(
    features, run_folder, image_folder, tmp_path, capsys, monkeypatch
):
    file = tmp_path / "file"
    file.touch()
    extract = ["--data-path", image_folder, *PIXELS]
    for main, argv in (
        (extract_features.main, [*extract, "--features-path", file]),
        (
            train_mask_adan.main,
            [*TRAIN, "--feature-path", features, "--max-steps", 1, "--run-dir", file / "run"],
        ),
        (image_generator_ddp.main, ["--ckpt", run_folder, *SAMPLE, "--output-dir", file]),
        (
            image_generator_ddp.main,
            ["--ckpt", run_folder, *SAMPLE, "--output-dir", tmp_path / ("x" * 300)],
        ),
        (image_generator.main, ["--ckpt", run_folder, "--output-dir", file]),
        (
            evaluator.main,
            [image_folder, image_folder, "--features", "pixels", "--json", file / "scores.json"],
        ),
    ):
        assert "choose another place" in fails(main, argv, capsys)
    scores = [image_folder, image_folder, "--features", "pixels", "--json", tmp_path]
    assert f"{tmp_path} is a folder" in fails(evaluator.main, scores, capsys)
    # Tests may run as the superuser, who may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert "Permission denied" in fails(
        extract_features.main, [*extract, "--features-path", tmp_path / "out"], capsys
    )


@pytest.mark.parametrize(
    "change", [["--schedule-sampler", "uniform"], ["--optimizer", "adan-pytorch"]], ids="=".join
)
def test_another_sampler_or_optimizer_starts_its_own_history(
    change, features, run_folder, tmp_path, capsys
):
    argv = continued(run_folder, features, tmp_path / "run", *change)
    assert f"-> {change[1]}" in fails(train_mask_adan.main, argv, capsys)
    assert train_mask_adan.main([*argv, "--allow-config-change"]) == 0
    assert f"-> {change[1]}" in (tmp_path / "run" / "log.txt").read_text()
    state = json.loads(
        (list_checkpoints(tmp_path / "run" / "checkpoints")[-1] / "state.json").read_text()
    )
    assert state["step"] == 3
    assert change[1] in state["config"].values()
    again = [*argv[: argv.index("--max-steps")], "--max-steps", "4", *change]
    assert train_mask_adan.main(again) == 0  # the new history is in the checkpoint


def test_other_features_are_noticed(run_folder, features, image_folder, tmp_path, capsys):
    images = shutil.copytree(image_folder, tmp_path / "images")
    os.rename(images / "cat", images / "cow")
    paths = ["--data-path", str(images), "--features-path", str(tmp_path / "features")]
    extract_features.main([*paths, *PIXELS, "--global-seed", "5", "--no-flip"])
    argv = continued(run_folder, tmp_path / "features", tmp_path / "run")
    message = fails(train_mask_adan.main, argv, capsys)
    assert "classes: ['ant', 'bee', 'cat'] -> ['ant', 'bee', 'cow']" in message
    assert "extraction_seed: 0 -> 5" in message
    assert "flips: once -> none" in message
    assert "images_sha256" in message
    assert "count" not in message
    assert train_mask_adan.main([*argv, "--allow-config-change"]) == 0


def test_a_checkpoint_that_knows_less_of_its_features_is_continued(
    run_folder, features, tmp_path, capsys
):
    argv = continued(run_folder, features, tmp_path / "run")
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    config = json.loads((checkpoint / "config.json").read_text())
    known = ("image_size", "scaling_factor", "classes", "draw", "vae")
    config["features"] = {name: config["features"][name] for name in known}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "manifest.json").write_text("{}")
    assert train_mask_adan.main(argv) == 0
    config = json.loads((list_checkpoints(checkpoint.parent)[-1] / "config.json").read_text())
    assert config["features"]["count"] == 40
    assert config["features"]["flips"] == "once"


def test_a_run_of_damaged_checkpoints_is_left_alone(run_folder, features, tmp_path, capsys):
    argv = continued(run_folder, features, tmp_path / "run")
    (checkpoint,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert "its steps: 2" in fails(train_mask_adan.main, [*argv, "--resume-step", 1], capsys)
    os.truncate(checkpoint / "ema.safetensors", 1000)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert "another --run-dir" in fails(train_mask_adan.main, argv, capsys)
    assert "every checkpoint in" in fails(
        image_generator_ddp.main, ["--ckpt", tmp_path / "run", *SAMPLE], capsys
    )
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert list_checkpoints(checkpoint.parent) == [checkpoint]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_downloads_that_failed_say_what_they_are(suffix, tmp_path, capsys):
    path = tmp_path / f"EDT-S{suffix}"
    torch.save({"ema": {"x": torch.zeros(1000)}}, tmp_path / "whole")
    for content, message in (
        (b"", "is empty; download it again"),
        (b"<!DOCTYPE html>", "is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ((tmp_path / "whole").read_bytes()[:3000], "is cut short after 3000 bytes"),
        (b'{"weight_map": {"x": "a-00001-of-00002.safetensors"}}', "a-00001-of-00002.safetensors"),
    ):
        path.write_bytes(content)
        assert message in fails(image_generator_ddp.main, ["--ckpt", path, *SAMPLE], capsys)


def test_files_of_another_format_are_named(run_folder, image_folder, tmp_path, capsys):
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "manifest.json").write_text('{"shards": 3}')
    argv = [*TRAIN, "--feature-path", tmp_path / "features", "--run-dir", tmp_path / "run"]
    assert "features/manifest.json" in fails(train_mask_adan.main, argv, capsys)
    argv = ["--data-path", image_folder, "--features-path", tmp_path / "features", *PIXELS]
    assert "features/manifest.json" in fails(extract_features.main, argv, capsys)
    torch.save({"ema": 5}, tmp_path / "a.pt")
    assert "a.pt holds no named tensors" in fails(
        image_generator_ddp.main, ["--ckpt", tmp_path / "a.pt", *SAMPLE], capsys
    )
    torch.save({"model": {}, "opt": {}}, tmp_path / "b.pt")
    assert "--weights model" in fails(
        image_generator_ddp.main, ["--ckpt", tmp_path / "b.pt", *SAMPLE], capsys
    )
    checkpoint = shutil.copytree(
        list_checkpoints(run_folder / "checkpoints")[-1], tmp_path / "checkpoint"
    )
    (checkpoint / "config.json").write_text("[]")
    assert "config.json" in fails(image_generator_ddp.main, ["--ckpt", checkpoint, *SAMPLE], capsys)
    np.savez(tmp_path / "floats.npz", np.random.default_rng(0).random((4, 8, 8, 3)))
    argv = [tmp_path / "floats.npz", tmp_path / "floats.npz", "--features", "pixels"]
    message = fails(evaluator.main, argv, capsys)
    assert "float64" in message
    assert "savez" not in message


def test_weights_of_which_nothing_fits_are_refused(features, run_folder, tmp_path, capsys):
    checkpoint = run_folder / "checkpoints" / "0000002"
    argv = [*TRAIN, "--feature-path", features, "--run-dir", tmp_path / "run", "--max-steps", 1]
    file = checkpoint / "optimizer.safetensors"
    message = fails(train_mask_adan.main, [*argv, "--init-from", file], capsys)
    assert f"none of the tensors in {file} fits" in message
    assert not (tmp_path / "run").exists()
    weights = load_file(checkpoint / "ema.safetensors")
    few = {name: weights[name] for name in sorted(weights)[:3]}
    save_file(few, tmp_path / "few.safetensors")
    shutil.copy(checkpoint / "config.json", tmp_path)
    argv = [str(part) for part in (*argv, "--init-from", tmp_path / "few.safetensors")]
    assert train_mask_adan.main(argv) == 0
    warning = f"fewer than half of the parameters come from {tmp_path / 'few.safetensors'}"
    assert warning in (tmp_path / "run" / "log.txt").read_text()


def test_a_checkpoint_with_nan_is_not_continued(run_folder, features, tmp_path, capsys):
    for name in ("model", "optimizer"):
        argv = continued(run_folder, features, tmp_path / name)
        (checkpoint,) = list_checkpoints(tmp_path / name / "checkpoints")
        file = checkpoint / f"{name}.safetensors"
        tensors = load_file(file)
        first = next(iter(tensors))
        tensors[first] = torch.full_like(tensors[first], torch.nan)
        save_file(tensors, file)
        update_manifest(checkpoint)
        message = fails(train_mask_adan.main, argv, capsys)
        assert f"{file}: 1 of {len(tensors)} tensors hold NaN or infinity, {first}" in message
        assert len(list_checkpoints(checkpoint.parent)) == 1

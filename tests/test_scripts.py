"""The scripts as users start them: real processes for each launcher, every other choice in process."""

import argparse
import importlib.util
import json
import multiprocessing
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TRAIN, run_script
from PIL import Image
from safetensors.torch import load_file

import extract_features
import image_generator
import image_generator_ddp
import train_mask_adan
from edt.checkpoint import list_checkpoints
from edt.cli import check_speed
from edt.errors import UserError
from edt.vae import PixelVAE

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")
SAMPLE = ("--num-sampling-steps", "3", "--num-images", "7", "--cfg-scale", "1.5")


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path, which: str = "ema") -> dict:
    return load_file(list_checkpoints(run / "checkpoints")[-1] / f"{which}.safetensors")


def fails(main, argv: list, capsys) -> str:
    """Run a script that must refuse: exit code 2, and one line, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        main([str(part) for part in argv])
    assert error.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and "Traceback" not in "".join(lines)
    return lines[-1]


@pytest.mark.parametrize("launcher", [(sys.executable,), TORCHRUN], ids=["python", "torchrun"])
def test_extraction(launcher, image_folder, tmp_path):
    layout = "packed" if launcher == TORCHRUN else "npy"
    common = ["--data-path", image_folder, "--vae", "pixels", "--image-size", 16, "--layout", layout, "--shard-size", 9]
    done = run_script(*launcher, "extract_features.py", *common, "--features-path", tmp_path / "a", "--num-workers", 1,
                      "--batch-size", 4)  # fmt: skip
    assert done.returncode == 0, done.stderr
    extract_features.main([str(part) for part in [*common, "--features-path", tmp_path / "b", "--num-workers", 0]])
    found, expected = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
        for folder in (tmp_path / "a", tmp_path / "b")
    )
    assert found == expected
    assert "40 images of 3 classes" in done.stdout


@pytest.mark.parametrize("launcher", [(sys.executable,), TORCHRUN, ACCELERATE], ids=["python", "torchrun", "accelerate"])
def test_training(launcher, features, run_folder, tmp_path):
    done = run_script(*launcher, "train_mask_adan.py", *TRAIN, "--features-path", features, "--results-dir", tmp_path,
                      "--max-steps", 2)  # fmt: skip
    run = tmp_path / "000-EDT-Tiny-2"
    assert done.returncode == 0 or (run / "checkpoints" / "0000002").is_dir(), done.stderr
    for row, expected in zip(metrics(run), metrics(run_folder), strict=True):
        assert row["loss_full"] == pytest.approx(expected["loss_full"], rel=1e-5)
        assert row["loss_masked"] == pytest.approx(expected["loss_masked"], rel=1e-5)
    for name, value in weights(run_folder).items():
        torch.testing.assert_close(weights(run)[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("launcher", [(sys.executable,), TORCHRUN], ids=["python", "torchrun"])
def test_sampling(launcher, trained, tmp_path, capsys):
    done = run_script(*launcher, "image_generator_ddp.py", *SAMPLE, "--ckpt", trained, "--per-proc-batch-size", 2,
                      "--output-dir", tmp_path / "a", "--amm", "True")  # fmt: skip
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip().splitlines()[-1])
    assert path.name == "samples_7x16x16x3.npz" and path.parent.name.endswith("-amm-4-6")
    image_generator_ddp.main([*SAMPLE, "--ckpt", str(trained), "--output-dir", str(tmp_path / "b"), "--amm"])
    other = Path(capsys.readouterr().out.strip().splitlines()[-1])
    a, b = (np.load(file)["arr_0"].astype(int) for file in (path, other))
    assert a.shape == (7, 16, 16, 3) and a.std() > 1
    assert np.abs(a - b).max() <= 1 and (a != b).mean() < 0.001
    assert np.array_equal(np.load(path.parent / "labels.npy"), np.load(other.parent / "labels.npy"))
    recipe = json.loads((path.parent / "recipe.json").read_text())
    assert recipe["amm"]["blocks"] == [4, 6] and recipe["cfg_scale"] == 1.5 and recipe["seed"] == 42
    assert recipe == json.loads((other.parent / "recipe.json").read_text())


def test_class_images(trained, tmp_path):
    done = run_script(sys.executable, "image_generator.py", "--ckpt", trained, "--num-sampling-steps", 2, "--classes", "Cat", 0,
                      "--num-variations", 3, "--output-dir", tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip().splitlines()[-1])
    assert path == tmp_path / "seed1-cfg4.0" / "grid-amm-4-and-without.png" and "rows: 2 cat; 0 ant" in done.stdout
    picture = np.asarray(Image.open(path)).astype(int)
    assert picture.shape == (20 + 2 * (20 + 132), 9 * 130 + 2, 3)
    rows = [picture[top : top + 128, 2:] for top in (42, 42 + 152)]
    images = np.stack([[row[:, 130 * i : 130 * i + 128] for i in range(9)] for row in rows])[:, :, ::8, ::8]
    on, off, difference = (images[:, i::3] for i in range(3))
    assert np.abs(on - off).max() > 10 and len(np.unique(on.reshape(6, -1), axis=0)) == 6
    assert np.array_equal(difference, 128 + (on - off) // 2)
    assert (picture[:20] < 128).any() and (picture[20:40] < 128).any()  # captions


@pytest.mark.parametrize(
    "choice",
    [
        ("--masking", "none"),
        ("--noise", "shared"),
        ("--schedule_sampler", "uniform"),
        ("--optimizer", "adan-pytorch"),
        ("--precision", "bf16"),
        ("--precision", "fp32", "--mini-batch-size", "3", "--num-workers", "1"),
        ("--init-lr", "1e-4", "--lr-steps", "10", "--ema-decay", "0.5", "--global-seed", "1"),
        ("--clip", "0.5"),
        ("--attention", "reference", "--separate-passes"),
        ("--num-classes", "0"),
        ("--num-classes", "5"),
        ("--epochs", "1", "--global-batch-size", "20", "--ckpt-every", "1"),
    ],
    ids=lambda choice: choice[0] + "=" + choice[1],
)
def test_training_choices(choice, features, run_folder, tmp_path):
    limit = () if "--epochs" in choice else ("--max-steps", "2")
    assert train_mask_adan.main([*TRAIN, "--feature-path", str(features), "--run-dir", str(tmp_path), *limit, *choice]) == 0
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2] and all(np.isfinite(row["loss"]) for row in rows)
    assert (rows[1]["loss_masked"] == 0) == (choice == ("--masking", "none"))
    assert any(
        not torch.equal(value, weights(run_folder).get(name, torch.empty(0))) for name, value in weights(tmp_path).items()
    )


@pytest.mark.parametrize(
    ("choice", "folder"),
    [
        ((), "noamm"),
        (("--no-amm",), "noamm"),
        (("--amm", "False"), "noamm"),
        (("--amm", "true"), "amm-4-6"),
        (("--amm", "--cfg-scale", "2"), "amm-4"),
        (("--amm-blocks", "3,5", "--amm-form", "512", "--amm-radius", "2.5"), "amm-3-5"),
        (("--amm-radius", "2"), "amm-4-6"),
        (("--solver", "ddim"), "noamm"),
        (("--solver", "dpm++", "--precision", "bf16"), "dpm++-3-noamm"),
        (
            ("--solver", "unipc", "--cfg-channels", "all", "--cfg-interval", "100", "700"),
            "cfg-1.5-all-t-100-700-seed-42-unipc-3-noamm",
        ),
        (("--num-sampling-steps", "ddim5", "--precision", "bf16"), "noamm"),
        (("--num-sampling-steps", "2,1", "--precision", "fp32", "--weights", "model"), "noamm"),
        (("--labels", "balanced", "--png", "--global-seed", "7"), "noamm"),
        (("--labels", "2,0", "--model", "EDT-Tiny/2", "--vae", "pixels", "--image-size", "16"), "noamm"),
        (
            (
                "--model",
                "EDT-Tiny/2_noAMM",
            ),
            "noamm",
        ),
    ],
    ids=" ".join,
)
def test_sampling_choices(choice, folder, run_folder, tmp_path, capsys):
    image_generator_ddp.main(["--ckpt", str(run_folder), *SAMPLE, "--output-dir", str(tmp_path), *choice])
    path = Path(capsys.readouterr().out.strip())
    assert path.parent.name.endswith(folder) and np.load(path)["arr_0"].shape == (7, 16, 16, 3)
    assert len(list(path.parent.glob("*.png"))) == (7 if "--png" in choice else 0)


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        (("--amm",), "amm-4"),
        (("--no-amm",), "noamm"),
        (("--amm", "True"), "amm-4"),
        (("--amm", "both"), "amm-4-and-without"),
        (("--amm-blocks", "0"), "amm-0-and-without"),
        (("--classes", "bee", "--solver", "unipc", "--cfg-channels", "all", "--cfg-interval", "0", "500"), "amm-4-and-without"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_class_image_choices(choice, name, run_folder, tmp_path):
    image_generator.main(["--ckpt", str(run_folder), "--num-sampling-steps", "2", "--num-variations", "1", "--output-dir",
                          str(tmp_path), *choice])  # fmt: skip
    assert [path.name for path in tmp_path.rglob("*.png")] == [f"grid-{name}.png"]


def test_the_same_command_continues_and_ends_where_an_uninterrupted_run_does(features, tmp_path):
    def train(run, steps, *more):
        return train_mask_adan.main([*TRAIN, "--feature-path", str(features), "--run-dir", str(tmp_path / run), "--max-steps",
                                     str(steps), "--global-batch-size", "12", *more])  # fmt: skip

    train("whole", 6)  # three steps an epoch
    train("parts", 2)
    train("parts", 4, "--resume")
    train("parts", 6)
    assert [row["step"] for row in metrics(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        assert a["loss"] == b["loss"] and a["lr"] == b["lr"]
    for which in ("model", "ema", "optimizer", "sampler"):
        expected, found = weights(tmp_path / "whole", which), weights(tmp_path / "parts", which)
        assert expected.keys() == found.keys() and all(torch.equal(value, found[name]) for name, value in expected.items())
    train("other", 3)
    train("from-a-path", 4, "--resume", str(tmp_path / "whole" / "checkpoints" / "0000006"))
    train("by-step", 1)
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "0000006", tmp_path / "by-step" / "checkpoints" / "0000006")
    train("by-step", 2, "--resume-step", "1")
    assert metrics(tmp_path / "by-step")[-1]["step"] == 2


def test_fine_tuning_takes_what_fits(features, run_folder, tmp_path):
    argv = [*TRAIN, "--feature-path", str(features), "--max-steps", "1", "--num-classes", "7", "--init-lr", "1e-9",
            "--lr-steps", "1", "--sample-every", "1"]  # fmt: skip
    assert train_mask_adan.main([*argv, "--run-dir", str(tmp_path / "tuned"), "--init-from", str(run_folder)]) == 0
    before, after = weights(run_folder), weights(tmp_path / "tuned")
    assert after["y_embedder.embedding_table.weight"].shape[0] == 8
    torch.testing.assert_close(after["y_embedder.embedding_table.weight"][-1], before["y_embedder.embedding_table.weight"][-1])
    for name in set(before) - {"y_embedder.embedding_table.weight"}:
        torch.testing.assert_close(after[name], before[name], msg=name)
    log = (tmp_path / "tuned" / "log.txt").read_text()
    assert "1 parameters resized: y_embedder.embedding_table.weight" in log and "0 parameters new" in log
    assert np.asarray(Image.open(tmp_path / "tuned" / "samples" / "0000001.png")).shape == (4 * 18 + 2, 8 * 18 + 2, 3)


def test_tracker(features, tmp_path, capsys):
    argv = [*TRAIN, "--feature-path", str(features), "--run-dir", str(tmp_path / "run"), "--max-steps", "1", "--tracker",
            "tensorboard"]  # fmt: skip
    if importlib.util.find_spec("tensorboard") is None:
        assert "pip install tensorboard" in fails(train_mask_adan.main, argv, capsys)
        assert not (tmp_path / "run").exists()
    else:
        assert train_mask_adan.main(argv) == 0
        assert any(path.stat().st_size > 100 for path in (tmp_path / "run").rglob("events.out.tfevents.*"))


def test_resume_without_a_checkpoint_or_of_another_run_is_refused(features, run_folder, tmp_path, capsys):
    base = [*TRAIN, "--feature-path", features, "--max-steps", 3]
    assert "no whole checkpoint" in fails(train_mask_adan.main, [*base, "--run-dir", tmp_path / "a", "--resume"], capsys)
    assert "no run of EDT-Tiny/2" in fails(train_mask_adan.main, [*base, "--results-dir", tmp_path, "--resume"], capsys)
    assert "absent" in fails(train_mask_adan.main, [*base, "--run-dir", tmp_path, "--resume", tmp_path / "absent"], capsys)
    copied = shutil.copytree(run_folder, tmp_path / "run")
    continued = [*base, "--run-dir", copied]
    assert "init_lr: 0.001 -> 0.01" in fails(train_mask_adan.main, [*continued, "--init-lr", 0.01], capsys)
    assert "global_batch_size: 4 -> 8" in fails(train_mask_adan.main, [*continued, "--global-batch-size", 8], capsys)
    assert train_mask_adan.main([str(part) for part in [*continued, "--global-batch-size", 8, "--allow-config-change"]]) == 0
    assert "another model (depths" in fails(train_mask_adan.main, [*continued, "--model", "EDT-S/2"], capsys)


def test_sampling_again_draws_only_what_is_missing(trained, tmp_path, capsys, monkeypatch):
    argv = ["--ckpt", str(trained), *SAMPLE, "--output-dir", str(tmp_path), "--per-proc-batch-size", "2"]
    image_generator_ddp.main([*argv[:-4], "--output-dir", str(tmp_path / "whole")])
    whole = np.load(capsys.readouterr().out.strip())["arr_0"].astype(int)
    decode, calls = PixelVAE.decode, []

    def dies_the_third_time(self, latents):
        calls.append(len(latents))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(self, latents)

    monkeypatch.setattr(PixelVAE, "decode", dies_the_third_time)
    with pytest.raises(KeyboardInterrupt):
        image_generator_ddp.main(argv)
    assert not list(tmp_path.glob("EDT*/*.npz"))
    image_generator_ddp.main(argv)
    path = capsys.readouterr().out.strip()
    assert calls == [2, 2, 2, 2, 1]
    assert np.abs(np.load(path)["arr_0"] - whole).max() <= 1
    image_generator_ddp.main(argv)  # nothing left to do
    assert len(calls) == 5 and capsys.readouterr().out.strip() == path


def test_a_folder_of_another_recipe_is_refused(run_folder, tmp_path, capsys):
    argv = ["--ckpt", str(run_folder), *SAMPLE, "--output-dir", str(tmp_path)]
    image_generator_ddp.main(argv)
    assert "labels: uniform -> balanced" in fails(image_generator_ddp.main, [*argv, "--labels", "balanced"], capsys)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "imagenet_features" / "7.npy").write_bytes(b"\x93NUMPY"), "7.npy; it is damaged"),
        (lambda folder: np.save(folder / "imagenet_features" / "7.npy", np.zeros((1, 3, 8, 8), np.float32)), "7.npy has shape"),
        (lambda folder: (folder / "imagenet_labels" / "39.npy").unlink(), "40 features but 39 labels"),
        (lambda folder: np.save(folder / "imagenet_labels" / "39.npy", np.array([3])), "label 3, beyond"),
        (lambda folder: shutil.rmtree(folder / "imagenet_features"), "no features in"),
        (lambda folder: [(folder / f"imagenet_{kind}" / "39.npy").unlink() for kind in ("labels", "features")], "39 of 40"),
    ],
)
def test_damaged_features_are_named(damage, message, image_folder, tmp_path, capsys):
    folder = tmp_path / "features"
    extract_features.main(["--data-path", str(image_folder), "--features-path", str(folder), "--vae", "pixels", "--image-size",
                           "16", "--num-workers", "0", "--layout", "npy"])  # fmt: skip
    damage(folder)
    argv = [*TRAIN, "--feature-path", folder, "--run-dir", tmp_path / "run", "--epochs", 1, "--num-workers", 1]
    assert message in fails(train_mask_adan.main, argv, capsys)
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")
    assert multiprocessing.active_children() == []  # a worker left over would hold up the end of the process


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "EDT-M/2"], "unknown model 'EDT-M/2'"),
        (["--num-classes", 2], "label 2, beyond --num-classes 2"),
        (["--global-batch-size", 41], "40 images are fewer"),
        (["--image-size", 32], "image_size 16, not 32"),
        (["--vae", "ema"], "vae pixels, not ema"),
        (["--init-from", "absent.pt"], "no checkpoint at absent.pt"),
    ],
)
def test_wrong_training_arguments_are_named(more, message, features, tmp_path, capsys):
    argv = [*TRAIN, "--feature-path", features, "--run-dir", tmp_path / "run", "--max-steps", 1, *more]
    assert message in fails(train_mask_adan.main, argv, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_speed_that_this_machine_cannot_give_is_refused(features, run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no compiler
    monkeypatch.delenv("CXX", raising=False)
    for more, message in ((["--attention", "triton"], "needs a GPU"), (["--compile", "block"], "C++ compiler")):
        train = [*TRAIN, "--feature-path", features, "--run-dir", tmp_path / "run", "--max-steps", 1, *more]
        sample = ["--ckpt", run_folder, "--output-dir", tmp_path / "samples", *more]
        assert message in fails(train_mask_adan.main, train, capsys)
        assert message in fails(image_generator_ddp.main, sample, capsys)
        assert not (tmp_path / "run").exists() and not (tmp_path / "samples").exists()


def test_bfloat16_is_refused_on_a_gpu_that_emulates_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    args = argparse.Namespace(precision="bf16", attention="auto", compile="off")
    with pytest.raises(UserError, match="Tesla T4"):
        check_speed(args, torch.device("cuda"))
    args.precision = "tf32"
    check_speed(args, torch.device("cuda"))


@pytest.mark.parametrize(
    ("main", "more", "message"),
    [
        (image_generator_ddp.main, ["--model", "EDT-S/2"], "not (1, 64, 312)"),
        (image_generator_ddp.main, ["--model", "DiT-S/2"], "unknown model"),
        (image_generator_ddp.main, ["--image-size", 32], "images of 16 pixels, not 32"),
        (image_generator_ddp.main, ["--labels", "3"], "class 3 is outside the model's classes, 0 to 2"),
        (image_generator_ddp.main, ["--cfg-scale", 0.9], "--cfg-scale must be 1"),
        (image_generator_ddp.main, ["--num-sampling-steps", "0"], "sampling steps"),
        (image_generator_ddp.main, ["--num-images", 0], "--num-images"),
        (image_generator_ddp.main, ["--amm-blocks", "9"], "block 9 does not exist"),
        (image_generator_ddp.main, ["--amm-blocks", "a"], "--amm-blocks"),
        (image_generator_ddp.main, ["--model", "EDT-Tiny/2_noAMM", "--amm"], "--amm-blocks"),
        (image_generator_ddp.main, ["--vae", "./absent"], "cannot load the VAE ./absent"),
        (image_generator_ddp.main, ["--num-images", 10**13], "GiB"),
        (image_generator_ddp.main, ["--amm", "--amm-radius", "-1"], "AMM radius"),
        (image_generator_ddp.main, ["--solver", "dpm++", "--num-sampling-steps", "10,15,25"], "plain number"),
        (image_generator_ddp.main, ["--cfg-interval", 700, 100], "--cfg-interval"),
        (image_generator.main, ["--solver", "unipc", "--num-sampling-steps", "1001"], "1 to 999"),
        (image_generator.main, ["--classes", "0", "-1"], "class -1 is outside"),
        (image_generator.main, ["--classes", "3"], "class 3 is outside"),
        (image_generator.main, ["--classes", "bees"], "did you mean bee?"),
        (image_generator.main, ["--num-variations", 0], "--num-variations"),
    ],
)
def test_wrong_sampling_arguments_are_named(main, more, message, run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    argv = ["--ckpt", run_folder, "--num-sampling-steps", 2, "--output-dir", tmp_path / "out", *more]
    assert message in fails(main, argv, capsys)
    assert not list(tmp_path.rglob("*.npz")) and not list(tmp_path.rglob("*.png"))


def test_wrong_images_are_named(image_folder, tmp_path, capsys):
    def extract(folder, *more):
        return ["--data-path", folder, "--features-path", tmp_path / "out", "--vae", "pixels", "--num-workers", 1, *more]

    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    shutil.copy(next(image_folder.rglob("*.png")), tmp_path / "flat")
    for name in ("absent", "empty", "flat"):
        assert name in fails(extract_features.main, extract(tmp_path / name, "--image-size", 16), capsys)
    assert "image size 0" in fails(extract_features.main, extract(image_folder, "--image-size", 0), capsys)
    assert not (tmp_path / "out").exists()
    copied = shutil.copytree(image_folder, tmp_path / "images")
    victim = next(copied.rglob("*.png"))
    victim.write_bytes(victim.read_bytes()[:100])
    assert str(victim) in fails(extract_features.main, extract(copied, "--image-size", 16), capsys)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.endswith("tmp")]

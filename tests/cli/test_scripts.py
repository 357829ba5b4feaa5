"""The scripts as users start them: real processes for each launcher, every other choice in
process.
"""

import importlib.util
import json
import re
import shutil
import sys
import time
from pathlib import Path

import golden_rule
import numpy as np
import pytest
import torch
from conftest import SAMPLE, TRAIN, fails, run_script
from PIL import Image
from safetensors.torch import load_file

import extract_features
import image_generator
import image_generator_ddp
import train_mask_adan
from edt.checkpoints.folder import list_checkpoints
from edt.checkpoints.loading import load_model
from edt.data.vae import PixelVAE
from edt.registry import create_model

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
# Its bf16 has no effect: --precision decides.
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")
ACCELERATE = (*ACCELERATE, "--mixed_precision", "bf16", "--dynamo_backend", "eager")


def choice_id(value: tuple[str, ...] | str) -> str:
    return value if isinstance(value, str) else " ".join(value)


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path, file: str = "ema") -> dict[str, torch.Tensor]:
    """The tensors of a file of the run's newest checkpoint."""
    return load_file(list_checkpoints(run / "checkpoints")[-1] / f"{file}.safetensors")


@pytest.mark.parametrize("launcher", [(sys.executable,), TORCHRUN], ids=["python", "torchrun"])
def test_extraction(launcher, image_folder, tmp_path):
    layout = "packed" if launcher == TORCHRUN else "npy"
    common = ["--data-path", image_folder, "--vae", "pixels", "--image-size", 16]
    common += ["--layout", layout, "--shard-size", 9]
    script = [*common, "--features-path", tmp_path / "a", "--num-workers", 1, "--batch-size", 4]
    done = run_script(*launcher, "extract_features.py", *script)
    assert done.returncode == 0, done.stderr
    in_process = [*common, "--features-path", tmp_path / "b", "--num-workers", 0]
    extract_features.main([str(part) for part in in_process])
    contents = [
        {
            path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*.*")
            if path.is_file()
        }
        for folder in (tmp_path / "a", tmp_path / "b")
    ]
    assert contents[0] == contents[1]
    assert "40 images of 3 classes" in done.stdout


@pytest.mark.parametrize(
    "launcher", [(sys.executable,), TORCHRUN, ACCELERATE], ids=["python", "torchrun", "accelerate"]
)
def test_training(launcher, features, run_folder, tmp_path):
    paths = ("--features-path", features, "--results-dir", tmp_path)
    done = run_script(*launcher, "train_mask_adan.py", *TRAIN, *paths, "--max-steps", 2)
    run = tmp_path / "000-EDT-Tiny-2"
    assert done.returncode == 0 or (run / "checkpoints" / "0000002").is_dir(), done.stderr
    for flag in ("--precision", "--compile"):
        warning = f"has no effect: {flag} decides"
        assert (warning in (run / "log.txt").read_text()) == (launcher == ACCELERATE)
        assert (warning in done.stderr) == (launcher == ACCELERATE)
    for row, expected in zip(metrics(run), metrics(run_folder), strict=True):
        assert row["loss_full"] == pytest.approx(expected["loss_full"], rel=1e-5)
        assert row["loss_masked"] == pytest.approx(expected["loss_masked"], rel=1e-5)
    for name, value in weights(run_folder).items():
        torch.testing.assert_close(weights(run)[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("launcher", [(sys.executable,), TORCHRUN], ids=["python", "torchrun"])
def test_sampling(launcher, trained, tmp_path, capsys):
    options = ("--per-proc-batch-size", 2, "--output-dir", tmp_path / "a", "--amm", "True")
    done = run_script(*launcher, "image_generator_ddp.py", *SAMPLE, "--ckpt", trained, *options)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip().splitlines()[-1])
    assert path.name == "samples_7x16x16x3.npz"
    assert path.parent.name.endswith("-amm-4-6")
    image_generator_ddp.main(
        [*SAMPLE, "--ckpt", str(trained), "--output-dir", str(tmp_path / "b"), "--amm"]
    )
    other = Path(capsys.readouterr().out.strip().splitlines()[-1])
    a, b = (np.load(file)["arr_0"].astype(int) for file in (path, other))
    assert a.shape == (7, 16, 16, 3)
    assert a.std() > 1
    assert np.abs(a - b).max() <= 1
    assert (a != b).mean() < 0.001
    labels, expected_labels = (np.load(file.with_suffix(".labels.npy")) for file in (path, other))
    assert np.array_equal(labels, expected_labels)
    settings = json.loads((path.parent / "recipe.json").read_text())
    assert settings["amm"]["blocks"] == [4, 6]
    assert settings["cfg_scale"] == 1.5
    assert settings["seed"] == 42
    assert settings == json.loads((other.parent / "recipe.json").read_text())


@pytest.mark.parametrize(
    ("name", "layout", "blocks"),
    [
        ("DiT-S/2", {"depth": 4}, [0, 2]),  # the published blocks, counted from the last one
        ("MDTv2-S/2", {"depth": 4, "decode_layer": 2}, [0]),
    ],
)
def test_sampling_of_the_baselines(name, layout, blocks, tmp_path, capsys):
    """A file of official layout goes through the same scripts as EDT's."""
    model = create_model(name, input_size=8, in_channels=3, num_classes=5, **layout)
    torch.save(golden_rule.fill(model).state_dict(), tmp_path / "official.pt")
    common = ["--model", name, "--ckpt", str(tmp_path / "official.pt"), "--vae", "pixels"]
    common += ["--num-sampling-steps", "3", "--output-dir", str(tmp_path)]
    images = []
    for amm in ("--amm", "--no-amm"):
        assert image_generator_ddp.main([*common, "--num-images", "4", amm]) == 0
        path = Path(capsys.readouterr().out.strip().splitlines()[-1])
        assert name.replace("/", "-") in path.parent.name
        images.append(np.load(path)["arr_0"])
        settings = json.loads((path.parent / "recipe.json").read_text())
        assert settings["amm"]["blocks"] == (blocks if amm == "--amm" else [])
        assert settings["model"]["family"] == model.config.family
        assert settings["model"]["depth"] == 4
    assert images[0].shape == (4, 8, 8, 3)
    assert (images[0] != images[1]).any()
    assert image_generator.main([*common, "--num-variations", "1"]) == 0


def test_class_images(trained, tmp_path):
    argv = ["--ckpt", trained, "--num-sampling-steps", 2, "--output-dir", tmp_path]
    argv += ["--classes", "Cat", 0, "--num-variations", 3]
    done = run_script(sys.executable, "image_generator.py", *argv)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip().splitlines()[-1])
    assert path.parent == tmp_path / "seed1-cfg4.0"
    assert re.fullmatch(r"grid-2-0-ddpm-2-amm-4-and-without-[0-9a-f]{8}\.png", path.name)
    assert "rows: 2 cat; 0 ant" in done.stdout
    picture = np.asarray(Image.open(path)).astype(int)
    assert picture.shape == (20 + 2 * (20 + 132), 9 * 130 + 2, 3)
    rows = [picture[top : top + 128, 2:] for top in (42, 42 + 152)]
    enlarged = np.stack([[row[:, 130 * i : 130 * i + 128] for i in range(9)] for row in rows])
    images = enlarged[:, :, ::8, ::8]
    on, off, difference = (images[:, i::3] for i in range(3))
    assert np.abs(on - off).max() > 10
    assert len(np.unique(on.reshape(6, -1), axis=0)) == 6
    assert np.array_equal(difference, 128 + (on - off) // 2)
    assert (picture[:20] < 128).any()  # captions of the columns
    assert (picture[20:40] < 128).any()  # the caption of a row


@pytest.mark.parametrize(
    "choice",
    [
        ("--masking", "none"),
        ("--noise", "shared"),
        ("--schedule-sampler", "uniform"),
        ("--optimizer", "adan-pytorch"),
        ("--precision", "bf16"),
        ("--precision", "fp32", "--micro-batch-size", "3", "--num-workers", "1"),
        ("--init-lr", "1e-4", "--lr-steps", "10", "--ema-decay", "0.5", "--global-seed", "1"),
        ("--max-grad-norm", "0.5"),
        ("--attention", "reference", "--separate-passes"),
        ("--num-classes", "0"),
        ("--num-classes", "5"),
        ("--epochs", "1", "--global-batch-size", "20", "--ckpt-every", "1"),
    ],
    ids=lambda choice: choice[0] + "=" + choice[1],
)
def test_training_choices(choice, features, run_folder, tmp_path):
    limit = () if "--epochs" in choice else ("--max-steps", "2")
    paths = ("--feature-path", str(features), "--run-dir", str(tmp_path))
    assert train_mask_adan.main([*TRAIN, *paths, *limit, *choice]) == 0
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert (rows[1]["loss_masked"] == 0) == (choice == ("--masking", "none"))
    assert any(
        not torch.equal(value, weights(run_folder).get(name, torch.empty(0)))
        for name, value in weights(tmp_path).items()
    )


@pytest.mark.parametrize(
    ("choice", "folder"),
    [
        ((), "noamm"),
        (("--no-amm",), "noamm"),
        (("--amm", "False", "--amm-blocks", "3"), "noamm"),
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
        (
            ("--labels", "2,0", "--model", "EDT-Tiny/2", "--vae", "pixels", "--image-size", "16"),
            "noamm",
        ),
        (("--model", "EDT-Tiny/2_noAMM"), "noamm"),
    ],
    ids=choice_id,
)
def test_sampling_choices(choice, folder, run_folder, tmp_path, capsys):
    image_generator_ddp.main(
        ["--ckpt", str(run_folder), *SAMPLE, "--output-dir", str(tmp_path), *choice]
    )
    path = Path(capsys.readouterr().out.strip())
    assert path.parent.name.endswith(folder)
    assert np.load(path)["arr_0"].shape == (7, 16, 16, 3)
    assert len(list(path.parent.glob("*.png"))) == (7 if "--png" in choice else 0)


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        (("--amm",), "amm-4"),
        (("--no-amm",), "noamm"),
        (("--amm", "True"), "amm-4"),
        (("--amm", "both"), "amm-4-and-without"),
        (("--amm-blocks", "0"), "amm-0-and-without"),
        (
            ("--solver", "unipc", "--cfg-channels", "all", "--cfg-interval", "0", "500"),
            "amm-4-and-without",
        ),
        (("--classes", "bee"), "amm-4-and-without"),
    ],
    ids=choice_id,
)
def test_class_image_choices(choice, name, run_folder, tmp_path):
    paths = ("--ckpt", str(run_folder), "--output-dir", str(tmp_path))
    image_generator.main([*paths, "--num-sampling-steps", "2", "--num-variations", "1", *choice])
    (path,) = tmp_path.rglob("*.png")
    assert re.fullmatch(rf"grid-[\d-]+-(ddpm|unipc)-2-{name}-[0-9a-f]{{8}}\.png", path.name)


def test_the_same_command_continues_and_ends_where_an_uninterrupted_run_does(features, tmp_path):
    def train(run, steps, *more):
        paths = ("--feature-path", str(features), "--run-dir", str(tmp_path / run))
        options = ("--max-steps", str(steps), "--global-batch-size", "12", *more)
        assert train_mask_adan.main([*TRAIN, *paths, *options]) == 0

    train("uninterrupted", 6)  # three steps an epoch
    train("parts", 2)
    train("parts", 4, "--resume")
    train("parts", 6)
    assert [row["step"] for row in metrics(tmp_path / "parts")] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(metrics(tmp_path / "uninterrupted"), metrics(tmp_path / "parts"), strict=True):
        assert a["loss"] == b["loss"]
        assert a["lr"] == b["lr"]
    for file in ("model", "ema", "optimizer", "sampler"):
        expected, tensors = (weights(tmp_path / run, file) for run in ("uninterrupted", "parts"))
        assert expected.keys() == tensors.keys()
        for name, value in expected.items():
            assert torch.equal(value, tensors[name]), f"{file}/{name}"


def test_a_demanded_checkpoint_is_where_training_continues(features, run_folder, tmp_path):
    def train(run: str, steps: int, *demand: str) -> list[int]:
        """The steps that the run logs."""
        paths = ("--feature-path", str(features), "--run-dir", str(tmp_path / run))
        assert train_mask_adan.main([*TRAIN, *paths, "--max-steps", str(steps), *demand]) == 0
        return [row["step"] for row in metrics(tmp_path / run)]

    checkpoint = str(run_folder / "checkpoints" / "0000002")
    assert train("of-a-checkpoint", 3, "--resume", checkpoint) == [3]
    assert train("of-a-run", 3, "--resume", str(run_folder)) == [3]
    shutil.copytree(run_folder, tmp_path / "by-step")
    assert train("by-step", 4) == [1, 2, 3, 4]
    assert train("by-step", 3, "--resume-step", "2") == [1, 2, 3]
    expected, tensors = weights(tmp_path / "of-a-run"), weights(tmp_path / "of-a-checkpoint")
    for name, value in expected.items():
        assert torch.equal(value, tensors[name]), name


def test_fine_tuning_keeps_the_weights_that_fit(features, run_folder, tmp_path):
    paths = ("--feature-path", str(features), "--run-dir", str(tmp_path / "tuned"))
    argv = [*TRAIN, *paths, "--max-steps", "1", "--init-lr", "1e-9", "--lr-steps", "1"]
    argv += ["--num-classes", "7", "--sample-every", "1", "--init-from", str(run_folder)]
    assert train_mask_adan.main(argv) == 0
    before, after = weights(run_folder), weights(tmp_path / "tuned")
    table = "y_embedder.embedding_table.weight"
    assert len(after[table]) == 8
    torch.testing.assert_close(after[table][-1], before[table][-1])  # the null class
    for name in set(before) - {table}:
        torch.testing.assert_close(after[name], before[name], msg=name)
    log = (tmp_path / "tuned" / "log.txt").read_text()
    assert f"1 parameters resized: {table}" in log
    assert "0 parameters new: none" in log
    kept = re.search(r"(\d+) parameters kept: (.*)", log)
    assert int(kept[1]) == len(kept[2].split(", "))
    names = {name for name, _ in load_model(run_folder)[0].named_parameters()}
    assert {table, *kept[2].split(", ")} == names
    # The run is continued, so that it needs the weights no longer.
    argv[-1] = str(tmp_path / "absent.pt")
    argv[argv.index("--max-steps") + 1] = "2"
    assert train_mask_adan.main(argv) == 0
    assert "at step 1" in (tmp_path / "tuned" / "log.txt").read_text()
    grid = np.asarray(Image.open(tmp_path / "tuned" / "samples" / "0000001.png"))
    assert grid.shape == (4 * 18 + 2, 8 * 18 + 2, 3)


def test_tracker(features, tmp_path, capsys):
    paths = ("--feature-path", str(features), "--run-dir", str(tmp_path / "run"))
    argv = [*TRAIN, *paths, "--max-steps", "1", "--tracker", "tensorboard"]
    if importlib.util.find_spec("tensorboard") is None:
        assert "pip install tensorboard" in fails(train_mask_adan.main, argv, capsys)
        assert not (tmp_path / "run").exists()
    else:
        assert train_mask_adan.main(argv) == 0
        assert any(
            path.stat().st_size > 100 for path in (tmp_path / "run").rglob("events.out.tfevents.*")
        )


def test_a_curve_of_tensorboard_goes_back_with_the_run(features, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    paths = ("--feature-path", str(features), "--run-dir", str(run), "--ckpt-every", "2")
    argv = [*TRAIN, *paths, "--tracker", "tensorboard", "--max-steps"]
    assert train_mask_adan.main([*argv, "4"]) == 0
    time.sleep(1.1)  # TensorBoard orders its files by the second
    assert train_mask_adan.main([*argv, "5", "--resume-step", "2"]) == 0
    curves = events.EventAccumulator(str(run / "edt"))
    curves.Reload()
    for name in ("loss", "images_seen", "skipped_steps", "loss_by_timestep_quartile/1"):
        assert [event.step for event in curves.Scalars(name)] == [1, 2, 3, 4, 5], name
    assert [event.value for event in curves.Scalars("images_seen")] == [4, 8, 12, 16, 20]


def test_sampling_again_draws_only_the_missing_images(trained, tmp_path, capsys, monkeypatch):
    argv = ["--ckpt", str(trained), *SAMPLE, "--output-dir"]
    image_generator_ddp.main([*argv, str(tmp_path / "uninterrupted")])
    expected = np.load(capsys.readouterr().out.strip())["arr_0"].astype(int)
    argv += [str(tmp_path / "again"), "--per-proc-batch-size", "2"]
    decode, calls = PixelVAE.decode, []

    def fail_the_third_time(self, latents):
        calls.append(len(latents))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(self, latents)

    monkeypatch.setattr(PixelVAE, "decode", fail_the_third_time)
    with pytest.raises(SystemExit):
        image_generator_ddp.main(argv)
    assert not list((tmp_path / "again").rglob("*.npz"))
    image_generator_ddp.main(argv)
    path = capsys.readouterr().out.strip()
    assert calls == [2, 2, 2, 2, 1]
    assert np.abs(np.load(path)["arr_0"] - expected).max() <= 1
    image_generator_ddp.main(argv)  # nothing is missing
    assert len(calls) == 5
    assert capsys.readouterr().out.strip() == path

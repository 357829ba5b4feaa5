import logging
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(autouse=True)
def fresh_process():
    """accelerate and logging keep their state for the life of a process; every test starts anew."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    for handler in logging.root.handlers[:]:  # of a script's main, whose stream ends with the test
        if type(handler) in (logging.StreamHandler, logging.FileHandler):
            logging.root.removeHandler(handler)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """40 images of 16 x 16 in three classes, of odd names."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(40):
        path = folder / ("ant", "bee", "cat")[i % 3] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="session")
def features(image_folder, tmp_path_factory) -> Path:
    """Pixel features of ``image_folder``."""
    import extract_features

    folder = tmp_path_factory.mktemp("features")
    extract_features.main(
        [
            "--data-path",
            str(image_folder),
            "--features-path",
            str(folder),
            "--vae",
            "pixels",
            "--image-size",
            "16",
            "--num-workers",
            "0",
        ]
    )
    return folder


TRAIN = (
    "--model",
    "EDT-Tiny/2",
    "--global-batch-size",
    "4",
    "--num-workers",
    "0",
    "--log-every",
    "1",
)
SAMPLE = ("--num-sampling-steps", "3", "--num-images", "7", "--cfg-scale", "1.5")


@pytest.fixture(scope="session")
def run_folder(features, tmp_path_factory) -> Path:
    """A run of the tiny model, two steps long."""
    import train_mask_adan

    folder = tmp_path_factory.mktemp("run") / "run"
    code = train_mask_adan.main(
        [*TRAIN, "--feature-path", str(features), "--run-dir", str(folder), "--max-steps", "2"]
    )
    assert code == 0
    return folder


@pytest.fixture(scope="session")
def trained(run_folder, tmp_path_factory) -> Path:
    """A checkpoint whose weights make a difference: the run's, with golden weights in place of the
    EMA.
    """
    from golden_rule import golden_weight

    folder = tmp_path_factory.mktemp("trained") / "checkpoint"
    shutil.copytree(run_folder / "checkpoints" / "0000002", folder)
    weights = load_file(folder / "ema.safetensors")
    for name, value in weights.items():
        if not name.endswith("pos_embed"):
            weights[name] = torch.from_numpy(golden_weight(name, tuple(value.shape)))
    save_file(weights, folder / "ema.safetensors")
    return folder


def run_script(*command, **options) -> subprocess.CompletedProcess:
    """Run a command from the project's root, as a user would."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
        timeout=300,
        **options,
    )


def limited(file_size: int) -> dict:
    """What `ulimit -f` does, in bytes: a write beyond it fails as on a full disk. For
    run_script.
    """
    return {
        "preexec_fn": lambda: resource.setrlimit(
            resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY)
        )
    }


def fails(main, argv: list, capsys) -> str:
    """Run a script that must refuse: exit code 2, and one line, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        main([str(part) for part in argv])
    assert error.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert re.match(r"(\S+: )?error: ", lines[-1]) and "Traceback" not in "".join(
        lines
    )  # argparse names the script first
    return lines[-1]

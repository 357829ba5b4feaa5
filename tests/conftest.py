"""Fixtures and helpers that many tests share."""

import edt.cli  # noqa: F401  # isort: skip  # before torch: threads then spin less

import json
import logging
import os
import re
import resource
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file

from edt.checkpoints.folder import MANIFEST, fingerprint

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))

TRAIN = (
    *("--model", "EDT-Tiny/2", "--global-batch-size", "4"),
    *("--num-workers", "0", "--log-every", "1"),
)
SAMPLE = ("--num-sampling-steps", "3", "--num-images", "7", "--cfg-scale", "1.5")


# ---------------------------------------------------------------------------------------------
# Fixtures


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    """Forget what accelerate and logging keep for the life of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    logging.getLogger("edt").setLevel(logging.NOTSET)  # a later process of several is quiet
    for handler in logging.root.handlers[:]:
        # Added by a script's main; the stream that it writes to is closed when the test ends.
        if type(handler) in (logging.StreamHandler, logging.FileHandler):
            logging.root.removeHandler(handler)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images of 16 x 16 pixels in three classes."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(40):
        path = folder / ("ant", "bee", "cat")[i % 3] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="session")
def features(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pixel features of ``image_folder``."""
    import extract_features

    folder = tmp_path_factory.mktemp("features")
    paths = ["--data-path", str(image_folder), "--features-path", str(folder)]
    options = ["--vae", "pixels", "--image-size", "16", "--num-workers", "0"]
    assert extract_features.main([*paths, *options]) == 0
    return folder


@pytest.fixture(scope="session")
def run_folder(features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of EDT-Tiny, two steps long."""
    import train_mask_adan

    folder = tmp_path_factory.mktemp("run") / "run"
    paths = ["--feature-path", str(features), "--run-dir", str(folder)]
    assert train_mask_adan.main([*TRAIN, *paths, "--max-steps", "2"]) == 0
    return folder


@pytest.fixture(scope="session")
def trained(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's checkpoint, with golden weights as its EMA.

    After two steps the EMA still predicts zero; the golden weights do not.
    """
    from golden_rule import golden_weight

    folder = tmp_path_factory.mktemp("trained") / "checkpoint"
    shutil.copytree(run_folder / "checkpoints" / "0000002", folder)
    weights = load_file(folder / "ema.safetensors")
    for name, value in weights.items():
        if not name.endswith("pos_embed"):
            weights[name] = torch.from_numpy(golden_weight(name, tuple(value.shape)))
    save_file(weights, folder / "ema.safetensors")
    update_manifest(folder)
    return folder


# ---------------------------------------------------------------------------------------------
# Helpers


def update_manifest(checkpoint: Path) -> None:
    """Record the files of a checkpoint as they are now, after a test changed one on purpose."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    content = {name: fingerprint(checkpoint / name) for name in manifest}
    (checkpoint / MANIFEST).write_text(json.dumps(content))


def with_classes(checkpoint: Path, folder: Path, classes: list[str]) -> Path:
    """A copy of a checkpoint whose features had these class folders."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["features"]["classes"] = classes
    (folder / "config.json").write_text(json.dumps(config))
    update_manifest(folder)
    return folder


def save_tiny_vae(folder: Path) -> None:
    """Save a VAE of the SD-VAE's form, with few channels: eight pixels to one."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    ).save_pretrained(folder)


def run_script(*command: object, **options: Any) -> subprocess.CompletedProcess:
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


def limited(file_size: int) -> dict[str, Callable[[], None]]:
    """An option of :func:`run_script` that stands for a full disk.

    A write beyond ``file_size`` bytes fails in the process, as with ``ulimit -f``.
    """
    limits = (file_size, resource.RLIM_INFINITY)
    return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)}


def png(bits: int, colour_type: int, rows: bytes = b"", width: int = 16, height: int = 12) -> bytes:
    """A PNG file of raw rows, for pixels that Pillow does not write and sizes that it refuses."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        checksum = zlib.crc32(kind + data)
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
    return content


HUGE_PNG = png(8, 2, width=60_000, height=60_000)


def fails(main: Callable[[list[str]], Any], argv: list, capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a script that refuses its arguments: one line, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        main([str(part) for part in argv])
    assert error.value.code == 2
    text = capsys.readouterr().err.strip()
    assert "Traceback" not in text
    last_line = text.splitlines()[-1]
    assert re.match(r"(\S+: )?error: ", last_line)  # argparse names the script first
    return last_line

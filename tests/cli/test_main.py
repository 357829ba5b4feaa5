"""How the scripts end after Ctrl-C, and where a path is bad. A real process is interrupted in
tests/sampling/test_sampling_runs.py.
"""

import errno
import os

import pytest
from conftest import SAMPLE, fails
from PIL import Image

import evaluator
import extract_features
import image_generator
import image_generator_ddp
from edt.cli.main import BAD_PATH, exit_on_user_error
from edt.data.vae import PixelVAE


def interrupt(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("script", ["extract", "sample", "draw", "evaluate"])
def test_ctrl_c_ends_in_one_line(script, image_folder, run_folder, tmp_path, capsys, monkeypatch):
    paths = ["--ckpt", run_folder, "--output-dir", tmp_path]
    images = ["--data-path", image_folder, "--features-path", tmp_path / "features"]
    pixels = ["--vae", "pixels", "--image-size", 16, "--num-workers", 0]
    main, argv = {
        "extract": (extract_features.main, [*images, *pixels]),
        "sample": (image_generator_ddp.main, [*paths, *SAMPLE]),
        "draw": (image_generator.main, [*paths, "--num-sampling-steps", 1]),
        "evaluate": (evaluator.main, [image_folder, image_folder, "--features", "pixels"]),
    }[script]
    monkeypatch.setattr(Image, "open", interrupt)
    monkeypatch.setattr(PixelVAE, "decode", interrupt)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as error:
        main([str(part) for part in argv])
    assert isinstance(error.value, SystemExit)
    assert error.value.code == 130
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("interrupted; finished files are complete")


@exit_on_user_error()
def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("code", BAD_PATH, ids=[errno.errorcode[code] for code in BAD_PATH])
def test_a_bad_path_ends_in_one_line(code, capsys):
    with pytest.raises(SystemExit) as error:
        fail(OSError(code, os.strerror(code), "some/file"))
    assert error.value.code == 2
    message = f"error: {os.strerror(code)} (some/file); check this path and its permissions\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOENT, os.strerror(errno.ENOENT)),  # names no path
        OSError(errno.EBADF, os.strerror(errno.EBADF), "some/file"),
        OSError("no code"),
        KeyError("some/file"),
    ],
    ids=repr,
)
def test_an_error_in_the_code_is_not_hidden(error):
    with pytest.raises(type(error)) as caught:
        fail(error)
    assert caught.value is error


def test_a_path_that_no_disk_can_hold_ends_in_one_line(tmp_path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    for name in ("x" * 300, "loop"):
        for main, argv in (
            (evaluator.main, [tmp_path / name, tmp_path / name]),
            (evaluator.main, ["make-ref", tmp_path, tmp_path / name]),
            (evaluator.main, ["convert-inception", tmp_path / name, tmp_path / "o.safetensors"]),
            (image_generator_ddp.main, ["--ckpt", tmp_path / name]),
            (extract_features.main, ["--data-path", tmp_path / name]),
        ):
            assert str(tmp_path / name) in fails(main, argv, capsys)

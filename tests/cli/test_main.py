"""How the scripts end after Ctrl-C. A real process is interrupted in
tests/sampling/test_sampling_runs.py.
"""

import pytest
from conftest import SAMPLE
from PIL import Image

import evaluator
import extract_features
import image_generator
import image_generator_ddp
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

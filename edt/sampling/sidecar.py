"""The sidecar that says how a folder of samples was made."""

import platform
from pathlib import Path

import diffusers
import torch

import edt
from edt.utils.files import write_or_check_settings

SIDECAR = "recipe.json"


def open_sample_folder(folder: Path, recipe: dict) -> None:
    """Record the recipe in a new folder of samples; in an old one, make sure that it is the same.

    Raises:
        UserError: the folder holds samples of another recipe, naming the fields that differ.
    """
    versions = {
        "python": platform.python_version(),
        "edt": edt.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    write_or_check_settings(
        folder / SIDECAR, recipe, "give another --output-dir", notes={"versions": versions}
    )

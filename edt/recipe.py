"""The sidecar that says how a folder of samples was made."""

import json
import platform
from pathlib import Path

import diffusers
import torch

import edt
from edt.errors import UserError
from edt.files import differences, read_json, write_json

SIDECAR = "recipe.json"


def open_sample_folder(folder: Path, recipe: dict) -> None:
    """Record the recipe in a new folder of samples; in an old one, make sure that it is the same.

    Raises:
        UserError: the folder holds samples of another recipe, naming the fields that differ.
    """
    recipe = json.loads(json.dumps(recipe))  # as it will be read back
    sidecar = folder / SIDECAR
    if sidecar.exists():
        found = read_json(sidecar)
        differing = differences({name: found.get(name) for name in recipe}, recipe)  # other versions may continue
        if differing:
            raise UserError(f"{folder} holds samples of another recipe ({differing}); give another --output-dir")
        return
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), "edt": edt.__version__, "torch": torch.__version__,
                "diffusers": diffusers.__version__}  # fmt: skip
    write_json(sidecar, {**recipe, "versions": versions})

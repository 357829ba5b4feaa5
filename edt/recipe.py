"""The sidecar that says how a folder of samples was made."""

import json
import platform
from pathlib import Path

import diffusers
import torch

import edt
from edt.errors import UserError
from edt.files import read_json, write_json

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
        differing = [name for name in recipe if found.get(name) != recipe[name]]
        if differing:
            shown = ", ".join(f"{name} {found.get(name)} there, {recipe[name]} here" for name in differing)
            raise UserError(f"{folder} holds samples of another recipe ({shown}); give another --output-dir")
        return
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), "edt": edt.__version__, "torch": torch.__version__,
                "diffusers": diffusers.__version__}  # fmt: skip
    write_json(sidecar, {**recipe, "versions": versions})

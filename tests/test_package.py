"""The public entry of the package."""

import subprocess
import sys

import edt
from edt.checkpoints.loading import load_model
from edt.registry import create_model
from edt.sampling.generate import generate


def test_the_public_entry_is_loaded_when_first_used():
    code = "import sys, edt; print('torch' in sys.modules); print(edt.create_model.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "create_model"]


def test_the_public_entry_is_the_functions_of_the_package():
    assert edt.create_model is create_model
    assert edt.load_model is load_model
    assert edt.generate is generate
    assert set(edt.__all__) <= set(dir(edt))

"""Before torch is loaded, every script tells OpenMP how long its threads spin."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = (
    "extract_features",
    "train_mask_adan",
    "image_generator_ddp",
    "image_generator",
    "evaluator",
)
# Print the setting at the moment in which torch would be loaded, and end there.
CODE = """
import os, sys

class AtTorch:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            sys.stdout.flush()
            os._exit(0)

sys.meta_path.insert(0, AtTorch)
import {script}
"""


def spin_count(script: str, **settings: str) -> str:
    """GOMP_SPINCOUNT of a script that is started with these environment variables."""
    hidden = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    run = subprocess.run(
        [sys.executable, "-c", CODE.format(script=script)],
        cwd=ROOT,
        env={**environment, **settings},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return run.stdout.strip()


@pytest.mark.parametrize("script", SCRIPTS)
def test_threads_spin_for_a_short_time(script):
    assert spin_count(script) == "5000"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_a_setting_of_the_user_wins(settings, expected):
    assert spin_count("train_mask_adan", **settings) == expected

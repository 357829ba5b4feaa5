"""The speed benchmarks run, and what they compare agrees; their figures are for
benchmarks/results.
"""

import json
import sys

import pytest
from conftest import ROOT, run_script

BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))


def run(script: str, *arguments) -> str:
    done = run_script(sys.executable, BENCHMARKS / script, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_fast_step_has_the_losses_and_gradients_of_the_released_arithmetic(precision, tmp_path):
    run(
        "bench_step.py",
        "--model",
        "EDT-Tiny/2",
        "--batch-size",
        2,
        "--steps",
        1,
        "--device",
        "cpu",
        "--precision",
        precision,
        "--json",
        tmp_path / "step.json",
    )
    result = json.loads((tmp_path / "step.json").read_text())
    assert list(result["rows"]) == [
        "reference",
        f"{precision}, independent",
        f"{precision}, shared",
    ]
    assert result["rows"]["reference"]["ratio"] == 1 and len(result["gates"]) == 4
    assert max(result["gates"].values()) < (1e-4 if precision == "fp32" else 0.1)


def test_sampling_has_the_latents_of_the_released_arithmetic(tmp_path):
    run(
        "bench_sampling.py",
        "--model",
        "EDT-Tiny/2",
        "--num-images",
        2,
        "--repeats",
        1,
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--json",
        tmp_path / "sampling.json",
    )
    result = json.loads((tmp_path / "sampling.json").read_text())
    assert result["gates"]["latents"] < 1e-4 and len(result["rows"]) == 2


@pytest.mark.slow
def test_three_hundred_steps_learn_alike():
    import loss_curve

    found = loss_curve.curves(300, "bf16", "shared")
    assert loss_curve.largest_difference(found) <= loss_curve.BAND
    assert found["fast"][-20:].mean() < 0.2 * found["fast"][:20].mean()


def test_the_readme_shows_the_newest_results():
    assert run("table.py", "--check") == ""

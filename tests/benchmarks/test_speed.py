"""The speed benchmarks run, and what they compare agrees.

Their figures are in benchmarks/results.
"""

import json
import sys

import pytest
from conftest import ROOT, run_script

BENCHMARKS = ROOT / "benchmarks"


def run(script: str, *arguments) -> str:
    process = run_script(sys.executable, BENCHMARKS / script, *arguments)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_fast_step_has_the_losses_and_gradients_of_the_released_arithmetic(precision, tmp_path):
    report = tmp_path / "step.json"
    options = ["--model", "EDT-Tiny/2", "--batch-size", 2, "--steps", 1, "--device", "cpu"]
    run("bench_step.py", *options, "--precision", precision, "--json", report)
    result = json.loads(report.read_text())
    fast_rows = [f"{precision}, independent", f"{precision}, shared"]
    assert list(result["rows"]) == ["reference", *fast_rows]
    assert result["rows"]["reference"]["ratio"] == 1
    assert len(result["gates"]) == 4
    assert max(result["gates"].values()) < (1e-4 if precision == "fp32" else 0.1)


def test_sampling_has_the_latents_of_the_released_arithmetic(tmp_path):
    report = tmp_path / "sampling.json"
    options = ["--model", "EDT-Tiny/2", "--num-images", 2, "--repeats", 1, "--device", "cpu"]
    run("bench_sampling.py", *options, "--precision", "fp32", "--json", report)
    result = json.loads(report.read_text())
    assert result["gates"]["latents"] < 1e-4
    assert len(result["rows"]) == 2


@pytest.mark.slow
def test_three_hundred_steps_learn_alike(monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(BENCHMARKS)
    import loss_curve

    losses = loss_curve.loss_curves(300, "bf16", "shared")
    assert loss_curve.largest_difference(losses) <= loss_curve.MAX_DIFFERENCE
    assert losses["fast"][-20:].mean() < 0.2 * losses["fast"][:20].mean()


def test_the_readme_shows_the_newest_results():
    assert run("table.py", "--check") == ""

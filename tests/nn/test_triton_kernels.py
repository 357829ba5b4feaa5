"""The kernels compile for every GPU, without one; and the two benchmarks of attention run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

pytest.importorskip("triton")


def report(*options: str) -> dict:
    """What benchmarks/report_kernels.py prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = str(ROOT / "benchmarks" / "report_kernels.py")
    process = subprocess.run(
        [sys.executable, script, "--json", *options],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def check_report(result: dict, count: int) -> None:
    """The kernels fit every GPU. The tiles are tuned for an H100, where no kernel may spill."""
    assert len(result["rows"]) == count
    for row in result["rows"]:
        assert row["shared_bytes"] <= result["shared_kib"] * 1024, row
        if result["target"] != "sm_90":
            assert row["spills"] < 100, row
            continue
        assert row["spills"] == 0, row
        if result["head_dim"] == 52:
            assert row["wgmma"] or row["tokens"] == 16 or row["arithmetic"] == "fp32", row


def test_kernels_compile_for_sm90():
    check_report(report("--image-sizes", "256", "--tokens", "256"), 3 * 8)


@pytest.mark.slow
def test_kernels_compile_for_sm90_at_every_shape():
    check_report(report(), 3 * 6 * 8)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [72, 128])
def test_wide_heads_compile_for_sm90(head_dim):
    options = ["--head-width", str(head_dim), "--image-sizes", "256", "--tokens", "256"]
    check_report(report(*options), 3 * 8)


@pytest.mark.slow
@pytest.mark.parametrize("sm", [80, 86, 89, 100, 120])
def test_kernels_compile_for_other_gpus(sm):
    check_report(report("--sm", str(sm), "--image-sizes", "256", "--tokens", "256"), 3 * 8)


def test_benchmark_measures_every_implementation(tmp_path: Path):
    report_path = tmp_path / "report.json"
    options = "--images 2 --tokens 16 --repeats 2 --json".split()
    command = [sys.executable, "benchmarks/bench_attention.py", *options, str(report_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    rows = json.loads(report_path.read_text())["implementations"]
    expected = ["released", "reference", "sdpa"] + ["triton"] * torch.cuda.is_available()
    assert list(rows) == expected
    for row in rows.values():
        assert row["forward"]["milliseconds"] > 0
        assert row["gradients"]["milliseconds"] > 0
        for name, error in row["relative_error"].items():
            assert error < 2e-2, name

import json

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from edt.training.plots import loss_figure, plot_losses  # noqa: E402


@pytest.fixture
def metrics(tmp_path):
    """A run's metrics of three logged steps."""
    rows = [
        {"step": 10, "loss_full": 1.0, "loss_masked": 1.5, "lr": 1e-3},
        {"step": 20, "loss_full": 0.5, "loss_masked": 0.75, "lr": 1e-3},
        {"step": 30, "loss_full": 0.25, "loss_masked": 0.5, "lr": 1e-3},
    ]
    path = tmp_path / "004-EDT-Tiny" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_figure_shows_both_losses_over_the_steps(metrics):
    (axes,) = loss_figure(metrics).axes
    full, masked = axes.lines
    assert full.get_label() == "full pass"
    assert masked.get_label() == "masked pass"
    np.testing.assert_array_equal(full.get_xydata(), [(10, 1.0), (20, 0.5), (30, 0.25)])
    np.testing.assert_array_equal(masked.get_xydata(), [(10, 1.5), (20, 0.75), (30, 0.5)])
    assert axes.get_yscale() == "log"
    assert axes.get_title() == "004-EDT-Tiny"


def test_the_figure_is_written_to_a_file(metrics, tmp_path):
    plot_losses(metrics, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")

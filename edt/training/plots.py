"""Pictures of a training run. Needs matplotlib (the ``demo`` extra)."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from edt.utils.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def loss_figure(metrics: str | Path) -> "Figure":
    """The losses of the full and the masked pass over the steps (paper, Figure 10).

    Args:
        metrics: a run's metrics.jsonl.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots need matplotlib: pip install 'edt[demo]'") from None
    metrics = Path(metrics)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, [row["loss_full"] for row in rows], label="full pass")
    axes.plot(steps, [row["loss_masked"] for row in rows], label="masked pass")
    axes.set(xlabel="step", ylabel="loss", yscale="log", title=metrics.parent.name)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def plot_losses(metrics: str | Path, picture: str | Path) -> None:
    """Write :func:`loss_figure` to a file.

    Args:
        metrics: a run's metrics.jsonl.
        picture: the PNG to write.

    Raises:
        UserError: matplotlib is not installed.
    """
    loss_figure(metrics).savefig(picture, dpi=120)

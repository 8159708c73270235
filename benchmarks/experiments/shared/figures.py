"""One look for all figures: frames, curves with bands, hues that colour-blind readers can tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

BLUE, SKY, GREEN, VERMILION, ORANGE, PURPLE, GREY = (
    *("#0072b2", "#56b4e9", "#009e73", "#d55e00", "#e69f00", "#cc79a7", "#777777"),
)
INK, FAINT, SHADE = "#333333", "#d9d9d9", "#f5f5f5"


def panels(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """Return a figure of this size in inches and its panels, framed: an array (rows, columns).

    Further options are those of matplotlib's ``Figure.subplots``.
    """
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)  # no window, wherever it runs
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    for panel in grid.flat:
        frame(panel)
    return figure, grid


def frame(panel: Axes) -> None:
    """Leave of a panel's frame what is needed to read it."""
    panel.grid(axis="y", color=FAINT, linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(INK)
    panel.tick_params(colors=INK)


def curve(
    panel: Axes, x: ArrayLike, runs: ArrayLike, *, colour: str, label: str, **style: Any
) -> None:
    """Draw the mean over ``runs`` (seeds, len(x)), and a band of one standard deviation."""
    values = np.asarray(runs, dtype=float)
    mean = values.mean(axis=0)
    panel.plot(x, mean, color=colour, label=label, **{"lw": 1.8} | style)
    if len(values) > 1:
        spread = values.std(axis=0, ddof=1)
        panel.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)


def legend(figure: Figure, panel: Axes, columns: int | None = None) -> None:
    """Write below all panels what the curves of one of them are."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns or len(labels), frameon=False
    )


def phases(panel: Axes, names: Sequence[str], length: float) -> None:
    """Mark stretches of equal length along x, each with its name above the panel."""
    panel.set_xlim(0, length * len(names))
    panel.set_xticks([length * number for number in range(len(names) + 1)])
    for boundary in range(1, len(names)):
        panel.axvline(boundary * length, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    for number, name in enumerate(names):
        panel.annotate(
            name,
            xy=((number + 0.5) * length, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            color=INK,
        )


def over_seeds(count: int) -> str:
    """Return what to say below curves with bands, in brackets; nothing of one seed."""
    return f" (mean of {count} seeds; bands: one standard deviation)" if count > 1 else ""

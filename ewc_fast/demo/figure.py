"""The comparison as a picture, after figure 2A of Kirkpatrick et al. 2017."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ewc_fast.demo.permuted import (
    PLAIN_EWC,
    PLAIN_SGD,
    PROXIMAL_EWC,
    SLOW_SGD,
    TASKS,
    UNIFORM_L2,
    Method,
    Results,
)

# The paper's red, green and blue, in hues that colour-blind readers can tell apart.
_COLOURS = {
    PLAIN_SGD: "#0072b2",
    SLOW_SGD: "#56b4e9",
    UNIFORM_L2: "#009e73",
    PLAIN_EWC: "#d55e00",
    PROXIMAL_EWC: "#e69f00",
}
_INK, _FAINT, _SHADE = "#333333", "#d9d9d9", "#f5f5f5"


def save(results: Results, path: Path) -> None:
    """Draw one panel a task: accuracy while this and the later tasks are learned, as a PNG."""
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(TASKS), 1, sharex=True, sharey=True)
    for task, panel in enumerate(panels):
        _frame(panel, results, task)
        for method in results.protocol.methods:
            _curve(panel, results, method, task)
    _name_phases(panels[0], results)
    panels[-1].set_xlabel(_caption(results), color=_INK)
    figure.suptitle(
        "Permuted MNIST: what a network still knows of earlier tasks", color=_INK, fontsize=14
    )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=160)


def _curve(panel: Axes, results: Results, method: Method, task: int) -> None:
    """Draw the mean over seeds and a band of one deviation, from the task's first epoch on."""
    start = task * results.protocol.epochs
    accuracy = results.accuracy[method][:, start:, task]
    epochs = start + 1 + np.arange(accuracy.shape[1])
    mean = accuracy.mean(axis=0)
    # Both forms of EWC nearly coincide: the dashes let one be seen on top of the other.
    dashes = (0, (2.5, 1.5)) if method.mode == "proximal" else "-"
    panel.plot(epochs, mean, color=_COLOURS[method], lw=1.8, linestyle=dashes, label=method.name)
    if results.seeds > 1:
        spread = accuracy.std(axis=0, ddof=1)
        low, high = mean - spread, np.minimum(mean + spread, 100)
        panel.fill_between(epochs, low, high, color=_COLOURS[method], alpha=0.15, linewidth=0)


def _frame(panel: Axes, results: Results, task: int) -> None:
    epochs = results.protocol.epochs
    panel.set_xlim(0, epochs * len(TASKS))
    panel.set_xticks([epochs * number for number in range(len(TASKS) + 1)])
    panel.set_ylim(_lowest_shown(results), 100)
    panel.set_ylabel(f"test accuracy\non task {TASKS[task]} (%)", color=_INK)
    panel.grid(axis="y", color=_FAINT, linewidth=0.6)
    panel.set_axisbelow(True)
    panel.axvspan(task * epochs, (task + 1) * epochs, color=_SHADE, linewidth=0, zorder=0)
    for boundary in range(1, len(TASKS)):
        panel.axvline(boundary * epochs, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(_INK)
    panel.tick_params(colors=_INK)


def _lowest_shown(results: Results) -> float:
    """Leave room below what is remembered at the end; first epochs may start further down."""
    last = len(TASKS) - 1
    ends = [results.after_task(method, last).mean(axis=0) for method in results.protocol.methods]
    return float(max(0, 10 * (np.min(ends) // 10) - 10))


def _name_phases(top: Axes, results: Results) -> None:
    for number, task in enumerate(TASKS):
        top.annotate(
            f"training on {task}",
            xy=((number + 0.5) * results.protocol.epochs, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            color=_INK,
        )


def _caption(results: Results) -> str:
    if results.seeds == 1:
        return "epochs of training"
    return f"epochs of training (mean of {results.seeds} seeds; bands: one standard deviation)"

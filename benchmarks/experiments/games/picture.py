"""The figure: each game's score, the mean of all, and the labels that were inferred."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..shared.figures import (
    BLUE,
    FAINT,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    curve,
    panels,
)
from .play import Run
from .scales import Scale, normalised
from .settings import Kind, Settings

_COLOURS = {Kind.GIVEN: VERMILION, Kind.INFERRED: ORANGE, Kind.PLAIN: BLUE}
_OF_LABELS = (GREEN, SKY, PURPLE, ORANGE, BLUE, VERMILION)  # then anew
_COLUMNS = 3


def draw(
    settings: Settings, scales: Mapping[str, Scale], runs: Mapping[Kind, Sequence[Run]]
) -> Figure:
    """Return the figure; blocks in which a game is learned are shaded in its panel."""
    rows = -(-(len(settings.games) + 3) // _COLUMNS)
    figure, grid = panels(rows, _COLUMNS, (11, 3.1 * rows))
    of_games, mean, labels, legend, *rest = _split(list(grid.flat), len(settings.games))
    for panel, game in zip(of_games, settings.games, strict=True):
        _draw_game(panel, game, settings, scales[game], runs)
    _draw_mean(mean, settings, scales, runs)
    _draw_labels(labels, settings, runs[Kind.INFERRED])
    legend.legend(*of_games[0].get_legend_handles_labels(), loc="center", frameon=False)
    for panel in (legend, *rest):
        panel.set_axis_off()
    return figure


def _split(panels: list[Any], games: int) -> list[Any]:
    return [panels[:games], *panels[games:]]


def _draw_game(
    panel: Any, game: str, settings: Settings, scale: Scale, runs: Mapping[Kind, Sequence[Run]]
) -> None:
    for kind, of_kind in runs.items():
        scores = [run.scores[game] for run in of_kind]
        curve(panel, _thousands(of_kind[0]), scores, colour=_COLOURS[kind], label=kind.value)
    style = {"color": INK, "linewidth": 0.9}
    panel.axhline(scale.expert, linestyle=(0, (4, 3)), label="the game learned alone", **style)
    panel.axhline(scale.random, linestyle=(0, (1, 2)), label="random play", **style)
    for turn, (start, end) in enumerate(_turns(settings, game)):
        label = None if turn else "its turns"
        panel.axvspan(start, end, color=FAINT, alpha=0.5, linewidth=0, zorder=0, label=label)
    _title(panel, game.replace("_", " "), "score", settings)


def _draw_mean(
    panel: Any, settings: Settings, scales: Mapping[str, Scale], runs: Mapping[Kind, Sequence[Run]]
) -> None:
    for kind, of_kind in runs.items():
        means = [np.mean(list(normalised(run, scales).values()), axis=0) for run in of_kind]
        curve(panel, _thousands(of_kind[0]), means, colour=_COLOURS[kind], label=kind.value)
    _title(panel, "mean of all games", "normalised score", settings)
    panel.set_ylim(bottom=min(0, panel.get_ylim()[0]))


def _draw_labels(panel: Any, settings: Settings, runs: Sequence[Run]) -> None:
    """One row for each seed, in a colour for each label; above them the games that were played."""
    length = settings.block * len(settings.sequence) / 1000
    for row, run in enumerate(runs):
        ends = [frame / 1000 for frame, _ in run.labels[1:]] + [length]
        for (frame, label), end in zip(run.labels, ends, strict=True):
            colour = _OF_LABELS[label % len(_OF_LABELS)]
            panel.broken_barh([(frame / 1000, end - frame / 1000)], (row - 0.35, 0.7), color=colour)
    for game in settings.games:
        for start, end in _turns(settings, game):
            name = game.replace("_", "\n")
            panel.text((start + end) / 2, len(runs) - 0.4, name, ha="center", fontsize=7, color=INK)
            panel.axvline(end, color=GREY, linewidth=0.8, linestyle=(0, (2, 2)))
    panel.set_ylim(-0.6, len(runs) + 0.3)
    panel.set_yticks(range(len(runs)), [f"seed {number}" for number in range(len(runs))])
    panel.grid(visible=False)
    _title(panel, "inferred labels", "", settings)


def _title(panel: Any, title: str, unit: str, settings: Settings) -> None:
    panel.set_title(title, fontsize=10, color=INK)
    panel.set_xlabel("thousand frames")
    panel.set_ylabel(unit)
    panel.set_xlim(0, settings.block * len(settings.sequence) / 1000)


def _turns(settings: Settings, game: str) -> list[tuple[float, float]]:
    """Return when it was a game's turn, in thousands of frames."""
    block = settings.block / 1000
    return [
        (turn * block, (turn + 1) * block)
        for turn, played in enumerate(settings.sequence)
        if played == game
    ]


def _thousands(run: Run) -> Sequence[float]:
    return [frames / 1000 for frames in run.frames]

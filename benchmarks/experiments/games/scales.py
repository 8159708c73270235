"""Scores on one scale for all games, and what a run comes down to on it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .play import Run
from .settings import Settings


@dataclass(frozen=True)
class Scale:
    """What random play scores in a game, and an agent of the same size that knows no other."""

    random: float
    expert: float

    def of(self, score: float) -> float:
        """Return the score where random play is 0 and the expert 1.

        An expert that is no better than random play measures nothing: everything is then 0.
        """
        span = self.expert - self.random
        return (score - self.random) / span if span > 0 else 0.0


@dataclass(frozen=True)
class Summary:
    """Normalised scores of one run."""

    games: Mapping[str, float]  # of each game, over the last block's evaluations
    last: float  # their mean
    left: float  # mean over the whole run of the games that were met before and not being played

    def plain(self) -> dict[str, Any]:
        """Return it as values for the record."""
        games = {game: round(score, 4) for game, score in self.games.items()}
        return {"games": games, "last": round(self.last, 4), "left": round(self.left, 4)}


def summary(run: Run, settings: Settings, scales: Mapping[str, Scale]) -> Summary:
    """Return what a run comes down to."""
    curves = normalised(run, scales)
    games = {game: statistics.mean(c[-settings.evaluations :]) for game, c in curves.items()}
    left = [
        curves[game][1 + turn * settings.evaluations + number]  # the first is before all play
        for turn, played in enumerate(settings.sequence)
        for game in {*settings.sequence[:turn]} - {played}
        for number in range(settings.evaluations)
    ]
    return Summary(games, statistics.mean(games.values()), statistics.mean(left or [0.0]))


def normalised(run: Run, scales: Mapping[str, Scale]) -> dict[str, list[float]]:
    """Return each game's curve on its scale."""
    return {game: [scales[game].of(s) for s in scores] for game, scores in run.scores.items()}

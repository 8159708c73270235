"""Who says which task is being played."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from .forget_me_not import ForgetMeNot
from .settings import Settings
from .worlds import Frames


class Labels(ABC):
    """Names tasks by numbers."""

    sure = True  # that the current frames are of the task last named

    @abstractmethod
    def observe(self, frames: Frames, game: str) -> int:
        """Return the task that is played now."""

    @abstractmethod
    def recognise(self, frames: Frames, game: str) -> int:
        """Return the task of other frames, those of an evaluation."""


class Given(Labels):
    """Told the game."""

    def __init__(self, settings: Settings) -> None:
        self._games = settings.games

    def observe(self, frames: Frames, game: str) -> int:
        """Return the game's number."""
        return self._games.index(game)

    recognise = observe


class Inferred(Labels):
    """Never told: by the forget-me-not process, believed once it has said the same for a while."""

    def __init__(self, settings: Settings) -> None:
        suite = settings.suite
        blank = np.zeros((1, *suite.frame), np.uint8)
        pixels = suite.pixels(blank).shape[1]
        self._process = ForgetMeNot(
            pixels, suite.levels, settings.prior, settings.window, settings.tasks
        )
        self._pixels, self._dwell = suite.pixels, settings.dwell
        self._task, self._rival, self._for = 0, 0, 0

    def observe(self, frames: Frames, game: str) -> int:
        """Return the task last believed in."""
        best = self._process.observe(self._pixels(frames))
        self._for = self._for + 1 if best == self._rival else 1
        self._rival = best
        if self._for >= self._dwell:
            self._task = best
        self.sure = best == self._task
        return self._task

    def recognise(self, frames: Frames, game: str) -> int:
        """Return the known task that explains these frames best."""
        return self._process.recognise(self._pixels(frames))


def accuracy(games: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """Return the share of labels that are right, in percent, if each game has one of its own.

    Which label is whose does not matter: the assignment that makes most of them right counts.
    """
    met, named = int(games.max()) + 1, max(int(labels.max()) + 1, int(games.max()) + 1)
    times = np.zeros((met, named), np.int64)
    np.add.at(times, (games, labels), 1)
    right = max(
        sum(int(times[game, label]) for game, label in enumerate(chosen))
        for chosen in permutations(range(named), met)
    )
    return 100 * right / len(games)

"""What an agent does other than what it thinks best: less and less, with a timer for each task."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .settings import Settings

_LONGEST = 50  # steps that an action is held for


class Exploration:
    """With probability epsilon a copy tries out any action, and holds it for a while.

    For how long, a zeta distribution says: MinAtar skips no frames, and rewards twenty steps ahead
    would else hardly be met (Dabney et al. 2021, https://arxiv.org/abs/2006.01782).
    """

    def __init__(self, settings: Settings, random: np.random.Generator) -> None:
        self._settings, self._random = settings, random
        self._played = dict.fromkeys(range(settings.tasks), 0)  # frames of each task
        self.let_go()

    def let_go(self) -> None:
        """Hold no action any longer."""
        self._held: NDArray[np.int64] = np.zeros(self._settings.copies, np.int64)
        self._steps: NDArray[np.int64] = np.zeros(self._settings.copies, np.int64)  # to hold it

    def instead_of(self, best: NDArray[np.int64], task: int) -> NDArray[np.int64]:
        """Return each copy's action: the best, or one that is tried out."""
        s, copies = self._settings, len(best)
        begin = (self._random.random(copies) < self._epsilon(task)) & (self._steps == 0)
        drawn = self._random.integers(s.suite.actions, size=copies)
        lengths = np.minimum(self._random.zipf(s.persistence, size=copies), _LONGEST)
        self._held = np.where(begin, drawn, self._held)
        self._steps = np.where(begin, lengths, self._steps)
        actions = np.where(self._steps > 0, self._held, best)
        self._steps = np.maximum(self._steps - 1, 0)
        self._played[task] += copies
        return actions

    def _epsilon(self, task: int) -> float:
        s = self._settings
        ends = [s.explore, s.greedy_from]
        return float(np.interp(self._played[task], ends, [1, s.least_epsilon]))

"""What an agent remembers of one task: its last transitions, drawn from uniformly."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .worlds import Frames, Step


class Transitions(NamedTuple):
    """Rows (N, ...): state, action, reward, next state, and whether the episode ended there."""

    states: Tensor  # uint8
    actions: Tensor  # int64
    rewards: Tensor  # float32
    next_states: Tensor  # uint8
    ends: Tensor  # float32, 1 where no next state counts


class Lookahead:
    r"""Joins n steps to one transition, so that rewards are learned from sooner.

    .. math:: R = \sum_{i < n} \gamma^i r_{t + i}, \qquad s' = s_{t + n}

    up to where the episode ends, if it does. For n = 1 these are the steps themselves.
    """

    def __init__(self, steps: int, discount: float) -> None:
        self._discount = discount
        self._waiting: deque[tuple[Frames, NDArray[np.int64], Step]] = deque(maxlen=steps)

    def add(
        self, frames: Frames, actions: NDArray[np.int64], step: Step
    ) -> tuple[Frames, NDArray[np.int64], Step] | None:
        """Take in one step of all copies; return the transition that is now complete, if any."""
        self._waiting.append((frames, actions, step))
        if len(self._waiting) < (self._waiting.maxlen or 1):
            return None
        first_frames, first_actions, _ = self._waiting[0]
        return first_frames, first_actions, self._joined()

    def clear(self) -> None:
        """Forget what is waiting: the next step does not follow on it."""
        self._waiting.clear()

    def _joined(self) -> Step:
        rewards = np.zeros(len(self._waiting[0][1]), np.float32)
        over = np.zeros(len(rewards), np.bool_)
        for ahead, (_, _, step) in enumerate(self._waiting):
            rewards += np.float32(self._discount**ahead) * step.rewards * ~over
            over |= step.ends
        return Step(self._waiting[-1][2].frames, rewards, over)


class Replay:
    """A ring of the last ``capacity`` transitions."""

    def __init__(self, capacity: int, frame: tuple[int, int, int]) -> None:
        self._states = np.zeros((capacity, *frame), np.uint8)
        self._next_states = np.zeros((capacity, *frame), np.uint8)
        self._actions = np.zeros(capacity, np.int64)
        self._rewards = np.zeros(capacity, np.float32)
        self._ends = np.zeros(capacity, np.float32)
        self._written = 0

    def __len__(self) -> int:
        return min(self._written, len(self._actions))

    def add(self, states: Frames, actions: NDArray[np.int64], step: Step) -> None:
        """Keep one transition of each copy; the oldest make room."""
        rows = np.arange(self._written, self._written + len(actions)) % len(self._actions)
        self._states[rows], self._next_states[rows] = states, step.frames
        self._actions[rows], self._rewards[rows], self._ends[rows] = (
            actions,
            step.rewards,
            step.ends,
        )
        self._written += len(actions)

    def sample(self, batch: int, random: np.random.Generator) -> Transitions:
        """Draw so many transitions, each as likely as any other, with replacement."""
        rows = random.integers(len(self), size=batch)
        kept = (self._states, self._actions, self._rewards, self._next_states, self._ends)
        return Transitions(*(torch.from_numpy(values[rows]) for values in kept))

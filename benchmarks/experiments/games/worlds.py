"""Games of MinAtar, or Atari's for those with time: several copies of one, played side by side.

One forward pass of the network then serves them all.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

Frames = NDArray[np.uint8]  # (copies, channels, height, width)


@dataclass(frozen=True)
class Suite:
    """What the games of one kind share."""

    name: str
    frame: tuple[int, int, int]  # channels, height, width
    actions: int
    scale: float  # from a frame's values to the network's
    levels: int = 8  # values that a recogniser tells apart in a pixel

    def world(self, game: str, seed: int) -> World:
        """Return one copy of a game; equal seeds and actions give equal frames."""
        return (_MinAtar if self.name == "minatar" else _Atari)(game, seed, self)

    def pixels(self, frames: Frames) -> NDArray[np.int64]:
        """Return what a recogniser sees: (copies, pixels), values from 0 to ``levels - 1``.

        Of MinAtar the last channel that is on, from 1, or 0 for none; of Atari eight shades of
        grey of the last frame at 42 by 42, as in the paper.
        """
        if self.name == "minatar":
            order = np.arange(1, len(frames[0]) + 1, dtype=np.uint8)
            seen = (frames * order[:, None, None]).max(axis=1)
        else:
            seen = frames[:, -1, ::2, ::2] // (256 // self.levels)
        return seen.reshape(len(frames), -1).astype(np.int64)


MINATAR = Suite("minatar", (7, 10, 10), actions=6, scale=1.0)
ALE = Suite("ale", (4, 84, 84), actions=18, scale=1 / 255)


class World(ABC):
    """One copy of a game, which begins anew where it ends."""

    @abstractmethod
    def reset(self) -> NDArray[np.uint8]:
        """Begin an episode; return its first frame."""

    @abstractmethod
    def act(self, action: int) -> tuple[NDArray[np.uint8], float, bool]:
        """Take an action; return the frame, the reward, and whether the episode has ended."""


@dataclass
class Step:
    """What one action in every copy led to."""

    frames: Frames  # after the action; of an episode's last frame, not of the next one's first
    rewards: NDArray[np.float32]
    ends: NDArray[np.bool_]


class Worlds:
    """Copies of one game; an episode that ends is followed by the next."""

    def __init__(self, suite: Suite, game: str, copies: int, seed: int) -> None:
        seeds = np.random.SeedSequence([seed, sum(game.encode())]).generate_state(copies)
        self._copies = [suite.world(game, int(each)) for each in seeds]
        self.frames: Frames = np.stack([world.reset() for world in self._copies])

    def act(self, actions: NDArray[np.int64]) -> Step:
        """Take one action in each copy; ``frames`` are then what to act on next."""
        found = [world.act(int(a)) for world, a in zip(self._copies, actions, strict=True)]
        frames, rewards, ends = (list(each) for each in zip(*found, strict=True))
        step = Step(np.stack(frames), np.array(rewards, np.float32), np.array(ends))
        self.frames = step.frames.copy() if any(ends) else step.frames
        for copy in np.flatnonzero(step.ends):
            self.frames[copy] = self._copies[copy].reset()
        return step


class _MinAtar(World):
    """Ten by ten pixels, a binary channel for each kind of object; those it lacks are empty."""

    def __init__(self, game: str, seed: int, suite: Suite) -> None:
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)  # it misses seaborn at import, to draw windows with
        try:
            from minatar.environment import Environment
        finally:
            logging.disable(before)
        self._game = Environment(game)
        self._game.seed(seed)
        self._shape = suite.frame

    def reset(self) -> NDArray[np.uint8]:
        self._game.reset()
        self._game.last_action = 0  # a sticky action must not outlive its episode
        return self._frame()

    def act(self, action: int) -> tuple[NDArray[np.uint8], float, bool]:
        reward, end = self._game.act(action)
        return self._frame(), float(reward), bool(end)

    def _frame(self) -> NDArray[np.uint8]:
        state = self._game.state()
        frame = np.zeros(self._shape, np.uint8)
        frame[: state.shape[2]] = state.transpose(2, 0, 1)
        return frame


class _Atari(World):
    """Four frames of 84 by 84 grey pixels, every action taken four times, as in the paper."""

    def __init__(self, game: str, seed: int, suite: Suite) -> None:
        import ale_py
        from ale_py import roms

        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self._game = ale_py.ALEInterface()
        self._game.setInt("random_seed", seed % 2**31)
        self._game.setFloat("repeat_action_probability", 0.0)
        self._game.loadROM(roms.get_rom_path(game))
        self._actions = self._game.getLegalActionSet()  # all 18, the same for every game
        self._stack = np.zeros(suite.frame, np.uint8)

    def reset(self) -> NDArray[np.uint8]:
        self._game.reset_game()
        self._stack[:] = self._seen(self._game.getScreenGrayscale())
        return self._stack.copy()

    def act(self, action: int) -> tuple[NDArray[np.uint8], float, bool]:
        reward, screens = 0, []
        for _ in range(4):
            reward += self._game.act(self._actions[action])
            screens.append(self._game.getScreenGrayscale())
        self._stack = np.roll(self._stack, -1, axis=0)
        self._stack[-1] = self._seen(np.maximum(*screens[-2:]))  # sprites blink
        return self._stack.copy(), float(np.clip(reward, -1, 1)), self._game.game_over()

    def _seen(self, screen: NDArray[np.uint8]) -> NDArray[np.uint8]:
        small = interpolate(torch.from_numpy(screen)[None, None].float(), (84, 84), mode="area")
        return small[0, 0].byte().numpy()

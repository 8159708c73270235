"""A run: one agent through all blocks of games, evaluated on every game as it goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .agent import Agent
from .labels import Given, Inferred, Labels, accuracy
from .settings import Kind, Settings
from .worlds import Frames, Worlds

_UNSEEN = 2**20  # seeds of evaluations, apart from those that are learned from


@dataclass(frozen=True)
class Job:
    """Which agent plays, with which seed; ``strength`` is not for the one without EWC."""

    kind: Kind
    settings: Settings
    seed: int
    strength: float = 0.0


@dataclass(frozen=True)
class Run:
    """What came of it."""

    frames: list[int]  # played before each evaluation
    scores: dict[str, list[float]]  # of each game, at each evaluation
    labels: list[tuple[int, int]]  # frames played before, and the label, where it changed
    accuracy: float  # of the labels over all frames, in percent
    tasks: int  # labels that there were

    def plain(self) -> dict[str, Any]:
        """Return it as values for the record."""
        rounded = {game: [round(s, 3) for s in each] for game, each in self.scores.items()}
        return vars(self) | {"scores": rounded, "accuracy": round(self.accuracy, 3)}


class _Diary:
    """Scores and labels, as a run goes."""

    def __init__(self, job: Job, agent: Agent, labels: Labels) -> None:
        self._job, self._agent, self._labels = job, agent, labels
        self._frames: list[int] = []
        self._scores: dict[str, list[float]] = {game: [] for game in job.settings.games}
        self._played: list[int] = []
        self._named: list[int] = []

    def note(self, game: str, label: int) -> None:
        self._played.append(self._job.settings.games.index(game))
        self._named.append(label)

    def evaluate(self) -> None:
        self._frames.append(len(self._named) * self._job.settings.copies)
        for game, scores in self._scores.items():
            scores.append(score(self._agent, self._labels, game, self._job))

    def run(self) -> Run:
        labels = np.array(self._named)
        changes = np.flatnonzero(np.diff(labels, prepend=-1))
        copies = self._job.settings.copies
        return Run(
            frames=self._frames,
            scores=self._scores,
            labels=[(int(at) * copies, int(labels[at])) for at in changes],
            accuracy=accuracy(np.array(self._played), labels),
            tasks=len(np.unique(labels)),
        )


def play(job: Job) -> Run:
    """Let the agent play and learn the games in their order."""
    settings = job.settings
    agent = Agent(settings, 0.0 if job.kind is Kind.PLAIN else job.strength, job.seed)
    labels = (Inferred if job.kind is Kind.INFERRED else Given)(settings)
    diary = _Diary(job, agent, labels)
    diary.evaluate()
    for turn, game in enumerate(settings.sequence):
        worlds = Worlds(settings.suite, game, settings.copies, job.seed * 1000 + turn)
        for until in _evaluated_at(settings):
            for played in until:
                diary.note(game, _move(agent, labels, worlds, game))
                for _ in range(settings.updates(played)):
                    agent.learn()
            diary.evaluate()
    return diary.run()


def _evaluated_at(settings: Settings) -> list[range]:
    """Return a block's frames, in steps of all copies, in stretches between evaluations."""
    length = settings.block // settings.evaluations // settings.copies * settings.copies
    return [
        range(number * length, (number + 1) * length, settings.copies)
        for number in range(settings.evaluations)
    ]


def _move(agent: Agent, labels: Labels, worlds: Worlds, game: str) -> int:
    """Take one action in each copy, in the task that the frames seem to be of; return it."""
    frames = worlds.frames
    task = labels.observe(frames, game)
    if task != agent.task:
        agent.switch(task)
    actions = agent.act(frames)
    step = worlds.act(actions)
    if labels.sure:  # what may be of another task would spoil this one's replay
        agent.remember(frames, actions, step)
    else:
        agent.skip()
    return task


def score(agent: Agent, labels: Labels, game: str, job: Job) -> float:
    """Return the mean return of first episodes without exploration; nothing is learned from them.

    The agent that infers labels does so here too: from the first four frames of each copy.
    """
    opening: list[Frames] = []
    task = 0

    def act(frames: Frames) -> NDArray[np.int64]:
        nonlocal task
        if len(opening) < 4:
            opening.append(frames)
            task = labels.recognise(np.concatenate(opening), game)
        return agent.best(frames, task)

    return _mean_return(act, game, job.settings, job.seed)


def score_at_random(game: str, settings: Settings, seed: int) -> float:
    """Return the same for actions drawn uniformly."""
    random = np.random.default_rng(seed)

    def act(frames: Frames) -> NDArray[np.int64]:
        return random.integers(settings.suite.actions, size=len(frames))

    return _mean_return(act, game, settings, seed)


def _mean_return(act: Any, game: str, settings: Settings, seed: int) -> float:
    worlds = Worlds(settings.suite, game, settings.evaluation_copies, _UNSEEN + seed)
    returns = np.zeros(settings.evaluation_copies)
    over = np.zeros(settings.evaluation_copies, bool)
    for _ in range(settings.evaluation_steps):
        step = worlds.act(act(worlds.frames))
        returns += step.rewards * ~over
        over |= step.ends
        if over.all():
            break
    return float(returns.mean())

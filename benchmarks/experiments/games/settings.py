"""What is played, by whom, for how long."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from .worlds import ALE, MINATAR, Suite


class Kind(Enum):
    """The agents: the same but for what is done when the task changes, and who tells them of it."""

    GIVEN = "EWC, labels given"
    INFERRED = "EWC, labels inferred"
    PLAIN = "no EWC, labels given"


@dataclass(frozen=True)
class Settings:
    """Of an experiment; frames are counted over all copies of a game together."""

    suite: Suite
    games: tuple[str, ...]
    block: int  # frames of a game before the next one's turn
    visits: int  # times that it is a game's turn
    seeds: int = 3
    strengths: tuple[float, ...] = (0.3, 3.0, 30.0, 300.0)  # lambda: tried on a seed of their own
    search_block: int = 30_000
    tasks: int = 6  # biases and gains that there are
    # the agent
    copies: int = 8
    batch: int = 32
    update_every: int = 8  # frames; the paper's 4 take twice the time
    capacity: int = 50_000  # transitions of each task
    learn_after: int = 1_000
    learning_rate: float = 1e-3
    discount: float = 0.99
    lookahead: int = 3  # steps that a transition spans; the paper's 1 learns too slowly here
    target_period: int = 100  # updates
    explore: int = 2_000  # frames of a task at epsilon = 1, which then falls
    greedy_from: int = 15_000  # until here, in proportion
    persistence: float = 2.0  # exponent: how soon an action that is tried out is let go
    least_epsilon: float = 0.01
    minibatches: int = 100  # for the Fisher information
    # who infers labels
    window: int = 4  # observations, of all copies
    prior: float = 0.5
    dwell: int = 32  # observations of another task before it is believed
    # evaluation: the mean return of each copy's first episode
    evaluations: int = 4  # in a block
    evaluation_copies: int = 16
    evaluation_steps: int = 300

    @property
    def sequence(self) -> tuple[str, ...]:
        """The games in the order of their turns."""
        return self.games * self.visits

    def updates(self, played: int) -> int:
        """Return how many updates there are after a step of all copies, ``played`` frames on."""
        return (played + self.copies) // self.update_every - played // self.update_every

    def of_one(self, game: str) -> Settings:
        """Return those of an agent that plays this game alone, for as many frames."""
        return replace(
            self,
            games=(game,),
            block=self.block * self.visits,
            visits=1,
            evaluations=self.evaluations * self.visits,
        )

    def of_search(self) -> Settings:
        """Return those of the short runs that lambda is chosen by."""
        return replace(self, block=self.search_block, visits=1, evaluations=3)


FULL = Settings(MINATAR, games=("freeway", "breakout", "space_invaders"), block=60_000, visits=2)
QUICK = replace(
    FULL,
    block=2_400,
    seeds=1,
    strengths=(100.0,),
    search_block=1_600,
    learn_after=400,
    explore=400,
    greedy_from=1_600,
    evaluations=1,
    evaluation_copies=4,
    evaluation_steps=100,
)
# The paper's size: days on a GPU.
ATARI = Settings(
    ALE,
    games=("breakout", "space_invaders", "pong"),
    block=2_000_000,
    visits=3,
    search_block=500_000,
    update_every=4,
    learn_after=50_000,
    learning_rate=2.5e-4,
    lookahead=1,
    persistence=10.0,  # one step: each is four frames
    target_period=7_500,
    explore=50_000,
    greedy_from=1_000_000,
    least_epsilon=0.01,
    evaluation_steps=4_000,
)
ATARI_QUICK = replace(
    ATARI,
    block=64,
    visits=1,
    seeds=1,
    strengths=(100.0,),
    search_block=64,
    copies=2,
    capacity=200,
    learn_after=32,
    minibatches=2,
    evaluations=1,
    evaluation_copies=1,
    evaluation_steps=20,
)

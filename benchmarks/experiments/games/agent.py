"""The agent: double Q-learning with a replay for each task, and EWC where the task changes."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import huber_loss
from torch.optim import Optimizer

from ewc_fast import EWC, EWCOptimizer

from .exploration import Exploration
from .network import QNetwork
from .protection import Protection, of_action
from .replay import Lookahead, Replay, Transitions
from .settings import Settings
from .worlds import Frames, Step

_LEAST_VARIANCE = 1e-4  # of a task whose targets were all met: nothing is certain


class Agent:
    """Plays and learns the task that it is told; ``strength`` 0 is the agent without EWC.

    Parameters
    ----------
    settings
        Its size, and how it learns.
    strength
        Lambda of the penalties that keep other tasks.
    seed
        Of its weights and of all that it draws.
    """

    def __init__(self, settings: Settings, strength: float, seed: int) -> None:
        self.settings, self.task = settings, 0
        self.network = QNetwork(settings.suite, settings.tasks, seed)
        self._random = np.random.default_rng([seed, 1])
        self._replays: dict[int, Replay] = {}
        self._lookahead = Lookahead(settings.lookahead, settings.discount)
        self._exploration = Exploration(settings, self._random)
        self._updates = 0
        self._protection = Protection(self.network) if strength else None
        self._strength = strength
        self._begin()

    def switch(self, task: int) -> None:
        """Leave a task for another: what the old one needs is from now on kept."""
        if self._protection is not None and self._ready(self._replay):
            batches = self._minibatches()
            errors = torch.cat([self._errors(batch) for batch in batches])
            variance = max(errors.square().mean().item(), _LEAST_VARIANCE)
            self._protection.memorise(self.task, batches, variance)
        self.task = task
        self._begin()

    def act(self, frames: Frames) -> NDArray[np.int64]:
        """Return an action for each copy: the best one, or one to explore by."""
        return self._exploration.instead_of(self.best(frames, self.task), self.task)

    @torch.no_grad()
    def best(self, frames: Frames, task: int) -> NDArray[np.int64]:
        """Return the action of the greatest value for each copy."""
        return self.network(torch.from_numpy(frames), task).argmax(dim=1).numpy()

    def remember(self, frames: Frames, actions: NDArray[np.int64], step: Step) -> None:
        """Keep what an action in each copy led to."""
        complete = self._lookahead.add(frames, actions, step)
        if complete is not None:
            self._replay.add(*complete)

    def skip(self) -> None:
        """Keep nothing of this step."""
        self._lookahead.clear()

    def learn(self) -> None:
        """Take one step on a minibatch of the task's replay, once there is enough in it."""
        if not self._ready(self._replay):
            return
        errors = self._errors(self._replay.sample(self.settings.batch, self._random))
        self._optimizer.zero_grad()
        huber_loss(errors, torch.zeros_like(errors)).backward()  # its gradient: errors up to 1
        self._optimizer.step()
        self._updates += 1
        if self._updates % self.settings.target_period == 0:
            self._target.load_state_dict(self.network.state_dict())

    def _errors(self, batch: Transitions) -> Tensor:
        """Return how far the values of the actions taken are above their targets."""
        discount = self.settings.discount**self.settings.lookahead
        targets = double_q_targets(batch, self.network, self._target, self.task, discount)
        return of_action(self.network(batch.states, self.task), batch.actions) - targets

    def _begin(self) -> None:
        """Start a task: moments and target network are those of no other."""
        s = self.settings
        self._target = deepcopy(self.network)
        self._lookahead.clear()
        self._exploration.let_go()
        if self.task not in self._replays:
            self._replays[self.task] = Replay(s.capacity, s.suite.frame)
        self._replay = self._replays[self.task]
        adam = torch.optim.Adam(self.network.parameters(), lr=s.learning_rate, eps=1e-4, fused=True)
        self._optimizer: Optimizer = adam
        if self._protection is not None:
            ewc: EWC = self._protection.of_all_but(self.task, self._strength)
            self._optimizer = EWCOptimizer(adam, ewc, mode="proximal")

    def _ready(self, replay: Replay) -> bool:
        return len(replay) >= self.settings.learn_after

    def _minibatches(self) -> list[Transitions]:
        s = self.settings
        return [self._replay.sample(s.batch, self._random) for _ in range(s.minibatches)]


@torch.no_grad()
def double_q_targets(
    batch: Transitions, network: nn.Module, target: nn.Module, task: int, discount: float
) -> Tensor:
    r"""Return what the values of the actions taken should have been (van Hasselt et al. 2016).

    .. math:: y = r + \gamma \, \bar Q\left(s', \arg\max_a Q(s', a)\right)

    The network picks the next action, the older target network says what it is worth; an episode
    that ended has no next one.
    """
    best = network(batch.next_states, task).argmax(dim=1)
    following = of_action(target(batch.next_states, task), best)
    return batch.rewards + discount * (1 - batch.ends) * following

"""The simulation: many linear units at once, taught by ``ewc_fast`` and by PyTorch's SGD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from ewc_fast import EWC, EWCOptimizer

from .theory import Array, Consolidation, Descent, Rule


@dataclass(frozen=True)
class Settings:
    """How large and how often; ``edges`` are the numbers of patterns after which is measured."""

    synapses: int
    edges: tuple[int, ...]
    runs: int  # for each seed
    seeds: int
    threshold: float = 1.0  # of signal over noise, for a pattern that counts as remembered
    within: float = 0.02  # of the analytic values

    @property
    def rules(self) -> tuple[Rule, ...]:
        """EWC, and gradient descent at two rates: about 1, and what EWC's is at t = n."""
        n = self.synapses
        return Consolidation(n), Descent(n, n / (n + 1)), Descent(n, 0.5)


@dataclass(frozen=True)
class Job:
    """One rule, and the seed of the patterns and their targets."""

    settings: Settings
    rule: Rule
    seed: int


@dataclass(frozen=True)
class Course:
    """What one job measured, as the mean over its runs.

    ``signals[e, b]`` is that of the patterns between edges b - 1 and b, after edge e; NaN for those
    not yet learned. ``noise[e]`` is the standard deviation of the response to an unseen pattern.
    """

    signals: Array
    noise: Array


def simulate(job: Job) -> Course:
    """Teach the patterns one by one to as many units as there are runs, all in one tensor."""
    settings, draw = job.settings, torch.Generator().manual_seed(job.seed)
    shape = settings.runs, settings.synapses
    weights = nn.Parameter(torch.zeros(shape))
    learn = _learner(job.rule, weights)
    count = len(settings.edges)
    signals, noise, blocks = np.full((count, count), np.nan), np.empty(count), []
    for edge, (begin, end) in enumerate(pairwise([0, *settings.edges])):
        block = torch.zeros(shape)  # the mean of y x over these patterns
        for _ in range(begin, end):
            patterns, targets = _pattern(shape, draw)
            learn(patterns, targets)
            block.add_(patterns * targets[:, None], alpha=1 / (end - begin))
        blocks.append(block)
        with torch.no_grad():
            signals[edge, : len(blocks)] = [(block * weights).sum(1).mean() for block in blocks]
            noise[edge] = weights.square().mean().sqrt()  # E|W|^2 / n
    return Course(signals, noise)


def _pattern(shape: tuple[int, int], draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return one pattern for each run, of length 1, and its target."""
    signs = torch.rand(shape[0], shape[1] + 1, generator=draw).round_().mul_(2).sub_(1)
    return signs[:, 1:] / shape[1] ** 0.5, signs[:, 0]


def _learner(rule: Rule, weights: nn.Parameter) -> Callable[[Tensor, Tensor], None]:
    if isinstance(rule, Descent):
        optimizer = SGD([weights], lr=rule.constant)
        return lambda patterns, targets: _step(weights, optimizer, patterns, targets)
    ewc = EWC([("weights", weights)], ewc_lambda=1.0, anchor="latest")
    consolidating = EWCOptimizer(SGD([weights], lr=1.0), ewc, mode="proximal")
    of_a_pattern = {"weights": torch.full_like(weights, 1 / weights.shape[1])}  # x_i^2
    ewc.consolidate_from(of_a_pattern)  # to begin with: the first step has t = 1

    def learn(patterns: Tensor, targets: Tensor) -> None:
        _step(weights, consolidating, patterns, targets)
        ewc.consolidate_from(of_a_pattern)

    return learn


def _step(weights: nn.Parameter, optimizer: Optimizer, patterns: Tensor, targets: Tensor) -> None:
    optimizer.zero_grad()
    (0.5 * ((patterns * weights).sum(1) - targets).square().sum()).backward()
    optimizer.step()

"""Permuted images: tasks that differ in the order of the pixels, and one network to learn them.

Each task shows all images with their pixels in an order of its own (Kirkpatrick et al. 2017,
section "EWC allows continual learning in a supervised learning context"): equally hard for a
perceptron, but nothing that its first layer found in one helps in another.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD

from ewc_fast import EWC, EWCOptimizer, fisher_diagonal

from . import mnist
from .experiment import Options
from .jobs import Result, run_all
from .training import perceptron, train_epoch

Part = Literal["validation", "test"]
FISHER_SAMPLES = 1000
CHOOSING = 100
"""The first seed of the trainings that choose a method's settings: permutations of their own."""


@dataclass(frozen=True)
class Method:
    """A way to train, and what is kept of a finished task (nothing: plain SGD).

    With ``dropout`` of the inputs and the hidden layers, and the paper's early stopping, where an
    experiment knows of them.
    """

    name: str
    lr: float = 0.2
    importance: Literal["fisher", "l2"] | None = None
    ewc_lambda: float = 0.0
    mode: Literal["gradient", "proximal"] = "gradient"
    dropout: bool = False

    @property
    def label(self) -> str:
        """The name, with what was chosen."""
        chosen = f"lr {self.lr:g}" if self.importance is None else f"lambda {self.ewc_lambda:g}"
        return f"{self.name}, {chosen}"


@dataclass(frozen=True)
class Protocol:
    """What every method goes through: so many tasks, epochs for each, and images (None: all)."""

    tasks: int
    epochs: int
    width: int = 100  # of both hidden layers
    train: int | None = None
    test: int | None = None


@dataclass(frozen=True)
class Training:
    """One training: all that its process must know. The seed draws tasks, weights and batches."""

    method: Method
    protocol: Protocol
    seed: int
    data: Path | None = None  # a folder with the whole MNIST
    judged_on: Part = "test"

    def tasks(self) -> list[Task]:
        """Return the tasks in turn."""
        images = mnist.load(self.data)
        images = images.at_most(train=self.protocol.train, test=self.protocol.test)
        pixels = np.arange(images.train.pixels.shape[1])
        draw = np.random.default_rng(self.seed)
        orders = [torch.from_numpy(draw.permutation(pixels)) for _ in range(self.protocol.tasks)]
        return [Task(images, order, self.judged_on) for order in orders]

    def network(self) -> nn.Sequential:
        """Return the network before the first task."""
        pixels = mnist.load(self.data).train.pixels.shape[1]
        width = self.protocol.width
        return perceptron([pixels, width, width, mnist.CLASSES], self.seed)


class Task:
    """Images in an order of their pixels: to learn from, to stop or choose by, to be judged on."""

    def __init__(self, images: mnist.Mnist, order: Tensor, judged_on: Part) -> None:
        self._images, self._order, self._judged_on = images, order, judged_on

    def images(self) -> mnist.Images:
        """Return those to learn from; made anew, for of a whole MNIST not all tasks' fit."""
        return self._permuted(self._images.train)

    @cached_property
    def validation(self) -> mnist.Images:
        """Those to stop or to choose by."""
        return self._permuted(self._images.validation)

    @cached_property
    def judged(self) -> mnist.Images:
        """Those to be judged on."""
        if self._judged_on == "validation":
            return self.validation
        return self._permuted(self._images.test)

    def _permuted(self, images: mnist.Images) -> mnist.Images:
        return mnist.Images(images.pixels[:, self._order], images.digits)


class Learner:
    """A network that learns by a method, and what the method keeps of finished tasks."""

    def __init__(self, model: nn.Module, method: Method, seed: int) -> None:
        self.model, self._importance = model, method.importance
        self._ewc = EWC(model, ewc_lambda=method.ewc_lambda, importance=method.importance or "l2")
        self._optimizer = EWCOptimizer(
            SGD(model.parameters(), lr=method.lr), self._ewc, mode=method.mode
        )
        self._order = torch.Generator().manual_seed(seed)

    def epoch(self, images: mnist.Images) -> None:
        """Learn from all images once."""
        train_epoch(self.model, self._optimizer, images, self._order)

    def finish(self, images: mnist.Images) -> None:
        """Keep of a task what the method keeps; no Fisher of a network that has diverged."""
        if self._importance == "l2":
            self._ewc.consolidate()
        elif self._importance == "fisher":
            some = images[:FISHER_SAMPLES]
            fisher = fisher_diagonal(self.model, [(some.pixels, some.digits)])
            if all(each.isfinite().all() for each in fisher.values()):
                self._ewc.consolidate_from(fisher)


@dataclass(frozen=True)
class Choice:
    """How well each candidate did on validation images, once for each seed; and who did best."""

    scores: dict[Method, list[float]]

    def best(self) -> list[Method]:
        """Return the best of each name, by the mean over the seeds, in the candidates' order."""
        by_name: dict[str, list[Method]] = {}
        for method in self.scores:
            by_name.setdefault(method.name, []).append(method)
        return [max(those, key=self._mean) for those in by_name.values()]

    def record(self) -> list[dict[str, Any]]:
        """Return all of it as plain values."""
        return [asdict(method) | {"scores": each} for method, each in self.scores.items()]

    def _mean(self, method: Method) -> float:
        return statistics.mean(self.scores[method])


def choose(
    score: Callable[[Training], float],
    candidates: Iterable[Method],
    protocol: Protocol,
    seeds: int,
    options: Options,
) -> Choice:
    """Score the candidates on validation images, over permutations that are not reported on."""
    trainings = [
        Training(method, protocol, seed, options.data, judged_on="validation")
        for method in candidates
        for seed in range(CHOOSING, CHOOSING + seeds)
    ]
    return Choice(_by_method(score, trainings, options, "choosing"))


def train(
    learn: Callable[[Training], Result],
    methods: Iterable[Method],
    protocol: Protocol,
    seeds: int,
    options: Options,
) -> dict[Method, list[Result]]:
    """Return what ``learn`` returns for each method and seed; a seed's tasks are all methods'."""
    trainings = [
        Training(method, protocol, seed, options.data)
        for method in methods
        for seed in range(seeds)
    ]
    return _by_method(learn, trainings, options, "learning")


def _by_method(
    learn: Callable[[Training], Result],
    trainings: Sequence[Training],
    options: Options,
    description: str,
) -> dict[Method, list[Result]]:
    mnist.load(options.data)  # what can't be read should say so before processes start
    learned = run_all(learn, trainings, workers=options.workers, description=description)
    found: dict[Method, list[Result]] = {}
    for training, result in zip(trainings, learned, strict=True):
        found.setdefault(training.method, []).append(result)
    return found

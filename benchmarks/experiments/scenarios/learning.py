"""Three scenarios: which outputs compete while a task is trained, and when it is tested."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ewc_fast import EWC, EWCOptimizer
from ewc_fast.fisher import Categorical
from ewc_fast.optim import Adam

from ..shared.digit_tasks import five_thousand, joined, permuted, relabelled, split
from ..shared.heads import accuracy, mask, train_steps
from ..shared.mnist import CLASSES, Mnist
from ..shared.training import perceptron

Softmax = Literal["own", "shared", "seen"]  # over which outputs, in training


@dataclass(frozen=True)
class Problem:
    """A sequence of tasks."""

    name: Literal["split", "permuted"]
    tasks: int
    classes: int  # of each task
    steps: int  # of training, for each task

    def draw(self, seed: int) -> list[Mnist]:
        """Return the tasks; labels are those within the task, from 0."""
        if self.name == "split":
            return split(five_thousand(), self.classes, seed)[: self.tasks]
        return permuted(five_thousand(), self.tasks, seed)


@dataclass(frozen=True)
class Scenario:
    """How networks are trained, and whether a test names the task."""

    name: str
    softmax: Softmax
    named: bool


@dataclass(frozen=True)
class Method:
    """What is remembered of a task, and the lambdas to choose from."""

    name: str
    importance: Literal["fisher", "si", "mas"] = "fisher"
    anchor: Literal["merged", "latest"] = "latest"
    lambdas: tuple[float, ...] = ()


SPLIT, PERMUTED = Problem("split", 5, 2, steps=100), Problem("permuted", 5, CLASSES, steps=150)
TASK, DOMAIN, CLASS, MASKED = SCENARIOS = (
    Scenario("task", "own", named=True),
    Scenario("domain", "shared", named=False),
    Scenario("class", "seen", named=False),
    Scenario("class, masked", "own", named=False),
)
FINE_TUNING, JOINT = Method("fine-tuning"), Method("joint training")
PLAIN_EWC = Method("EWC", anchor="merged", lambdas=(1e1, 1e2, 1e3, 1e4, 1e5))
METHODS = (
    FINE_TUNING,
    PLAIN_EWC,
    Method("SI", "si", lambdas=(1e0, 1e1, 1e2, 1e3, 1e4)),
    Method("MAS", "mas", lambdas=(1e-3, 1e-2, 1e-1, 1e0, 1e1)),
    JOINT,
)


@dataclass(frozen=True)
class Settings:
    """What is trained, and how."""

    problems: tuple[Problem, ...] = (SPLIT, PERMUTED)
    methods: tuple[Method, ...] = METHODS
    seeds: int = 3
    choosing: tuple[int, ...] = (100, 101)  # seeds that lambda is chosen on
    width: int = 100
    batch: int = 100
    lr: float = 1e-3
    samples: int = 500  # of each task, that importance is measured on


FULL = Settings()
QUICK = Settings(
    problems=(replace(SPLIT, steps=30), replace(PERMUTED, tasks=3, steps=30)),
    methods=(FINE_TUNING, replace(PLAIN_EWC, lambdas=(1e3, 1e5)), JOINT),
    seeds=1,
    choosing=(100,),
    width=30,
)


@dataclass(frozen=True)
class Job:
    """One training."""

    settings: Settings
    problem: Problem
    softmax: Softmax
    method: Method
    ewc_lambda: float
    seed: int


@dataclass(frozen=True)
class Trained:
    """Accuracies in percent at the end, means over tasks, for each scenario that the job serves."""

    validation: dict[Scenario, float]
    test: dict[Scenario, float]


def train(job: Job) -> Trained:
    """Learn the tasks, in turn or together, and test on all of them."""
    torch.manual_seed(job.seed)  # of whatever draws
    outputs = Outputs(job.softmax, job.problem.tasks, job.problem.classes)
    tasks = [
        relabelled(task, outputs.first(n)) for n, task in enumerate(job.problem.draw(job.seed))
    ]
    widths = [tasks[0].train.pixels.shape[1], job.settings.width, job.settings.width]
    model = perceptron([*widths, outputs.count], job.seed)
    learn = _learn_together if job.method == JOINT else _learn_in_turn
    learn(job, model, tasks, outputs)
    served = [scenario for scenario in SCENARIOS if scenario.softmax == job.softmax]
    return Trained(
        validation={each: _tested(model, tasks, outputs, each, "validation") for each in served},
        test={each: _tested(model, tasks, outputs, each, "test") for each in served},
    )


@dataclass(frozen=True)
class Outputs:
    """Which outputs stand for the classes of each task, and which compete: masks, shape (C,)."""

    softmax: Softmax
    tasks: int
    classes: int

    @property
    def count(self) -> int:
        """How many there are: those of one task, if the tasks share them."""
        return self.classes if self.softmax == "shared" else self.tasks * self.classes

    def first(self, task: int) -> int:
        """Return the output for a task's first class."""
        return 0 if self.softmax == "shared" else task * self.classes

    def of(self, task: int) -> Tensor:
        """Return those of a task."""
        return mask(range(self.first(task), self.first(task) + self.classes), self.count)

    @property
    def all(self) -> Tensor:
        """Those of every task."""
        return mask(range(self.count), self.count)

    def trained(self, task: int) -> Tensor:
        """Return those that the softmax is over while a task is trained after those before it."""
        if self.softmax == "seen":
            return mask(range(self.first(task) + self.classes), self.count)
        return self.of(task)

    def together(self, task: int) -> Tensor:
        """Return the same for images of a task that is trained together with all others."""
        return self.all if self.softmax == "seen" else self.of(task)


def _learn_in_turn(job: Job, model: nn.Module, tasks: list[Mnist], outputs: Outputs) -> None:
    """Learn each task under the penalty of those before: none for fine-tuning."""
    ewc = EWC(
        model,
        ewc_lambda=job.ewc_lambda,
        importance=job.method.importance,
        anchor=job.method.anchor,
    )
    order = torch.Generator().manual_seed(job.seed)
    for n, task in enumerate(tasks):
        # A new Adam for each task: the last one's moments would move weights that have no gradient.
        optimizer = EWCOptimizer(Adam(model.parameters(), lr=job.settings.lr), ewc)
        allowed, steps = outputs.trained(n), job.problem.steps
        train_steps(
            model, optimizer, task.train, allowed, order, steps=steps, batch=job.settings.batch
        )
        if job.ewc_lambda > 0 and n < len(tasks) - 1:
            some = task.train[: job.settings.samples]  # they come in no order
            ewc.consolidate([(some.pixels, some.digits)], **_measured_on(job.method, allowed))


def _measured_on(method: Method, allowed: Tensor) -> dict[str, Any]:
    """Return the options that restrict an importance to the outputs allowed."""
    if method.importance == "fisher":
        return {"likelihood": Categorical(classes=allowed)}
    if method.importance == "mas":
        return {"forward": lambda model, pixels: model(pixels)[:, allowed]}
    return {}  # SI was measured on the way


def _learn_together(job: Job, model: nn.Module, tasks: list[Mnist], outputs: Outputs) -> None:
    """Learn all tasks at once, in as many steps as they have in turn."""
    images = joined([task.train for task in tasks])
    allowed = torch.cat(
        [outputs.together(n).expand(len(task.train), -1) for n, task in enumerate(tasks)]
    )
    train_steps(
        model,
        Adam(model.parameters(), lr=job.settings.lr),
        images,
        allowed,
        torch.Generator().manual_seed(job.seed),
        steps=job.problem.steps * len(tasks),
        batch=job.settings.batch,
    )


def _tested(
    model: nn.Module,
    tasks: list[Mnist],
    outputs: Outputs,
    scenario: Scenario,
    part: Literal["validation", "test"],
) -> float:
    """Return the mean over tasks of the accuracy in a scenario."""
    accuracies = [
        accuracy(model, getattr(task, part), outputs.of(n) if scenario.named else outputs.all)
        for n, task in enumerate(tasks)
    ]
    return sum(accuracies) / len(accuracies)

"""The kinds of Fisher, and one training with one of them."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Literal, get_args

import torch

from ewc_fast import EWC, fisher_diagonal
from ewc_fast.fisher import Categorical, Estimator
from ewc_fast.optim import Adam

from ..shared.digit_tasks import five_thousand, relabelled, split
from ..shared.heads import accuracy, mask, train_steps
from ..shared.mnist import CLASSES, Images, Mnist
from ..shared.training import perceptron

CLASSES_A_TASK = 2
TASKS = CLASSES // CLASSES_A_TASK

Mode = Literal["gradient", "proximal"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class Kind:
    """A way to estimate the Fisher."""

    name: str
    estimator: Estimator
    max_samples: int | None = None


KINDS = (
    Kind("exact", "exact"),
    Kind("exact, 500 samples", "exact", max_samples=500),
    Kind("exact, 50 samples", "exact", max_samples=50),
    Kind("sampled", "sampled"),
    Kind("rademacher", "rademacher"),
    Kind("empirical", "empirical"),
    Kind("batched", "batched"),
)
EXACT, RADEMACHER, BATCHED = KINDS[0], KINDS[4], KINDS[6]


@dataclass(frozen=True)
class Settings:
    """What is tried, and how a task is trained."""

    lambdas: tuple[float, ...] = tuple(10.0**decade for decade in range(15))
    seeds: int = 3
    width: int = 100
    steps: int = 150
    batch: int = 64  # of training, and of what "batched" squares
    lr: float = 1e-3


FULL = Settings()
QUICK = Settings(lambdas=(1e2, 1e6, 1e10, 1e14), seeds=1, width=30, steps=40)


@dataclass(frozen=True)
class Job:
    """One training; ``kind`` is None without EWC."""

    settings: Settings
    seed: int
    kind: Kind | None = None
    mode: Mode = "gradient"
    ewc_lambda: float = 0.0


@dataclass(frozen=True)
class Training:
    """Accuracies in percent on each task after all; what the Fisher was, and took."""

    job: Job
    validation: list[float]
    test: list[float]
    fisher_seconds: float
    first_trace: float  # the Fisher's sum over all parameters, after the first task


def train(job: Job) -> Training:
    """Learn the tasks in turn, each under the penalty of those before."""
    torch.manual_seed(job.seed)  # of the labels and signs that are drawn
    settings, tasks = job.settings, digit_pairs(five_thousand(), job.seed)
    pixels = tasks[0].train.pixels.shape[1]
    model = perceptron([pixels, settings.width, settings.width, CLASSES], job.seed)
    ewc = EWC(model, ewc_lambda=job.ewc_lambda, anchor="latest")
    order = torch.Generator().manual_seed(job.seed)
    seconds, traces = 0.0, [0.0]
    for number, task in enumerate(tasks):
        # A new Adam for each task: the last one's moments would move weights that have no gradient.
        adam = Adam(model.parameters(), lr=settings.lr, ewc=ewc, mode=job.mode)
        head, steps, batch = head_of(number), settings.steps, settings.batch
        train_steps(model, adam, task.train, head, order, steps=steps, batch=batch)
        if job.kind is not None and number < TASKS - 1:
            begin = perf_counter()
            fisher = fisher_diagonal(
                model,
                batches(task.train, batch),
                likelihood=Categorical(classes=head),
                estimator=job.kind.estimator,
                max_samples=job.kind.max_samples,
            )
            seconds += perf_counter() - begin
            traces.append(sum(values.double().sum().item() for values in fisher.values()))
            ewc.consolidate_from(fisher)
    return Training(
        job,
        validation=[accuracy(model, t.validation, head_of(n)) for n, t in enumerate(tasks)],
        test=[accuracy(model, t.test, head_of(n)) for n, t in enumerate(tasks)],
        fisher_seconds=seconds,
        first_trace=traces[min(1, len(traces) - 1)],
    )


def digit_pairs(digits: Mnist, seed: int) -> list[Mnist]:
    """Return five tasks of two digits, labelled by their outputs: 2n and 2n + 1 in task n."""
    tasks = split(digits, CLASSES_A_TASK, seed)
    return [relabelled(task, n * CLASSES_A_TASK) for n, task in enumerate(tasks)]


def head_of(task: int) -> torch.Tensor:
    """Return the mask of a task's own outputs."""
    return mask(range(task * CLASSES_A_TASK, (task + 1) * CLASSES_A_TASK), CLASSES)


def batches(images: Images, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return images and labels, so many at a time."""
    return list(zip(images.pixels.split(size), images.digits.split(size), strict=True))

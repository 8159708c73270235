"""Three permuted tasks in turn: what does a network still know of the first ones?

After figure 2A of Kirkpatrick et al. 2017 (https://doi.org/10.1073/pnas.1611835114). One
perceptron learns tasks A, B and C, MNIST with its pixels in three orders, and never sees an earlier
task again. SGD forgets; springs of equal strength for every parameter (L2) hold what need not be
held, so that later tasks are not learned; springs as stiff as the Fisher information (EWC) hold
what earlier tasks need and leave the rest free.

Protocol: ReLU, two hidden layers of 100, SGD at 0.2 in batches of 100, 50 epochs a task, 3,500
images (with ``--data`` the whole MNIST, layers of 400, 5 epochs); exact Fisher of 1,000 images, one
penalty per task, merged. SGD's second rate and the strengths are chosen by accuracy on validation
images after C, over other permutations. Expect 65 to 70 % for SGD, 80 to 85 % for L2 and for SGD
at its best rate, 92 % for EWC in both modes: as much as each task alone.

:func:`demo` is the short form, with strengths chosen beforehand.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from .shared.experiment import Claim, Findings, Options
from .shared.figures import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    SHADE,
    SKY,
    VERMILION,
    curve,
    legend,
    over_seeds,
    panels,
    phases,
)
from .shared.permuted import Choice, Learner, Method, Protocol, Training, choose, train
from .shared.tables import mean_and_deviation, table
from .shared.training import accuracy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TASKS = "ABC"
PLAIN = Method("SGD")
SLOW = Method("SGD at its best rate", lr=0.02)
UNIFORM = Method("uniform L2", importance="l2", ewc_lambda=0.002)
GRADIENT = Method("EWC", importance="fisher", ewc_lambda=30.0)
PROXIMAL = Method("proximal EWC", importance="fisher", ewc_lambda=100.0, mode="proximal")
CHOSEN = (PLAIN, SLOW, UNIFORM, GRADIENT, PROXIMAL)
"""The demo's. Chosen as the experiment chooses, over permutations that neither reports on."""

COLOURS = {
    method.name: colour
    for method, colour in zip(CHOSEN, (BLUE, SKY, GREEN, VERMILION, ORANGE), strict=True)
}


@dataclass(frozen=True)
class Settings:
    """What is compared, how often, and by how many points each method must beat the one before."""

    protocol: Protocol
    seeds: int
    margin: float


@dataclass(frozen=True)
class Grids:
    """What the experiment chooses from, over so many seeds."""

    rates: tuple[float, ...]
    uniform: tuple[float, ...]
    gradient: tuple[float, ...]
    proximal: tuple[float, ...]
    seeds: int

    def candidates(self) -> list[Method]:
        """Return a method for each of them."""
        return [
            *(replace(SLOW, lr=rate) for rate in self.rates),
            *(replace(UNIFORM, ewc_lambda=strength) for strength in self.uniform),
            *(replace(GRADIENT, ewc_lambda=strength) for strength in self.gradient),
            *(replace(PROXIMAL, ewc_lambda=strength) for strength in self.proximal),
        ]


FULL = Settings(Protocol(len(TASKS), epochs=50), seeds=5, margin=3.0)
WHOLE_MNIST = Settings(Protocol(len(TASKS), epochs=5, width=400), seeds=3, margin=1.0)
# With one seed the margins vary: on each of 14 tried the order held, by 2 to 11 points.
QUICK = Settings(Protocol(len(TASKS), epochs=20, train=3500, test=1000), seeds=1, margin=0.0)
DEMO_SEEDS = 3

FULL_GRIDS = Grids(
    rates=(0.01, 0.02, 0.05),
    uniform=(0.0005, 0.001, 0.002, 0.005, 0.01),
    gradient=(10.0, 30.0, 100.0),
    proximal=(30.0, 100.0, 300.0),
    seeds=2,
)
QUICK_GRIDS = Grids((0.02,), (0.002, 0.02), (10.0, 30.0), (30.0, 100.0), seeds=1)


def run(options: Options) -> Findings:
    """Choose strengths on other permutations, then compare all methods."""
    settings, grids = settings_for(options), QUICK_GRIDS if options.quick else FULL_GRIDS
    candidates = grids.candidates()
    choice = choose(final_mean, candidates, settings.protocol, grids.seeds, options)
    return compare([PLAIN, *choice.best()], settings, options, choice)


def demo(options: Options) -> Findings:
    """Compare with the strengths that are known: the short form of the experiment."""
    settings = settings_for(options)
    if not options.quick:
        settings = replace(settings, seeds=options.seeds or DEMO_SEEDS)
    return compare((PLAIN, UNIFORM, GRADIENT) if options.quick else CHOSEN, settings, options)


def settings_for(options: Options) -> Settings:
    """Return the settings of the form that was asked for."""
    settings = QUICK if options.quick else FULL if options.data is None else WHOLE_MNIST
    return replace(settings, seeds=options.seeds or settings.seeds)


def compare(
    methods: Sequence[Method], settings: Settings, options: Options, choice: Choice | None = None
) -> Findings:
    """Train every method on the same tasks, from the same weights, once for each seed."""
    learned = train(learn, methods, settings.protocol, settings.seeds, options)
    found = {method: np.array(curves) for method, curves in learned.items()}
    accuracies = {method.label: record(each) for method, each in found.items()}
    return Findings(
        settings=asdict(settings) | {"data": str(options.data or "5,000 images")},
        results={"choice": choice.record() if choice else None, "accuracy": accuracies},
        table=summary(found),
        figure=figure(found),
        claims=claims(found, settings.margin),
    )


def learn(training: Training) -> list[list[float]]:
    """Learn the tasks in turn; return the accuracy on each of them after every epoch."""
    learner = Learner(training.network(), training.method, training.seed)
    tasks, curves = training.tasks(), []
    for task in tasks:
        images = task.images()
        for _ in range(training.protocol.epochs):
            learner.epoch(images)
            curves.append([accuracy(learner.model, each.judged) for each in tasks])
        learner.finish(images)
    return curves


def final_mean(training: Training) -> float:
    """Return the mean accuracy over the tasks after the last one."""
    return statistics.mean(learn(training)[-1])


# What was found, as arrays (seeds, epochs of all tasks, tasks)

Found = Mapping[Method, "np.ndarray[Any, np.dtype[np.float64]]"]


def after_tasks(accuracies: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the accuracies (seeds, tasks learned, tasks) at the end of each task."""
    return accuracies.reshape(len(accuracies), len(TASKS), -1, len(TASKS))[:, :, -1]


def final(accuracies: np.ndarray[Any, Any]) -> list[float]:
    """Return each seed's accuracy at the end, as the mean over the tasks."""
    return accuracies[:, -1].mean(axis=-1).tolist()


def record(accuracies: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Return plain values: each seed's at the ends of tasks, the curves as means over seeds."""
    return {
        "final_mean": final(accuracies),
        "after_each_task": after_tasks(accuracies).tolist(),
        "curves": accuracies.mean(axis=0).round(2).tolist(),
    }


def summary(found: Found) -> str:
    """Return the table: accuracy on the tasks learned so far, after each task."""
    header = ["", "after A: A", "after B: A", "B", "after C: A", "B", "C", "mean of A, B, C"]
    rows = []
    for method, accuracies in found.items():
        means = after_tasks(accuracies).mean(axis=0)
        known = [f"{means[task, old]:.1f}" for task in range(len(TASKS)) for old in range(task + 1)]
        rows.append([method.label, *known, mean_and_deviation(final(accuracies))])
    seeds = len(next(iter(found.values())))
    title = "Test accuracy in percent" + (f", mean of {seeds} seeds" if seeds > 1 else "")
    return table(title, header, rows)


def claims(found: Found, margin: float) -> list[Claim]:
    """Return the paper's order: SGD < L2 < EWC; and SGD at its best rate < EWC."""
    means = {method.name: statistics.mean(final(each)) for method, each in found.items()}
    orders = [*pairwise((PLAIN.name, UNIFORM.name, GRADIENT.name)), (SLOW.name, GRADIENT.name)]
    return [
        Claim(
            f"{worse} {means[worse]:.1f} < {better} {means[better]:.1f}, by more than {margin:g}",
            means[better] - means[worse] > margin,  # NaN is not
        )
        for worse, better in orders
        if worse in means
    ]


def figure(found: Found) -> Figure:
    """Draw one panel a task: accuracy while this and the later tasks are learned."""
    drawn, grid = panels(len(TASKS), 1, (9, 7.5), sharex=True, sharey=True)
    epochs = next(iter(found.values())).shape[1] // len(TASKS)
    for task, panel in enumerate(grid[:, 0]):
        start = task * epochs
        panel.axvspan(start, start + epochs, color=SHADE, linewidth=0, zorder=0)
        phases(panel, [f"training on {name}" if task == 0 else "" for name in TASKS], epochs)
        for method, accuracies in found.items():
            runs = accuracies[:, start:, task]
            # Both modes of EWC nearly coincide: the dashes let one be seen on top of the other.
            dashes = (0, (2.5, 1.5)) if method.mode == "proximal" else "-"
            colour = COLOURS[method.name]
            x = start + 1 + np.arange(runs.shape[1])
            curve(panel, x, runs, colour=colour, label=method.label, linestyle=dashes)
        panel.set_ylim(_lowest_shown(found), 100)
        panel.set_ylabel(f"test accuracy\non task {TASKS[task]} (%)", color=INK)
    seeds = len(next(iter(found.values())))
    grid[-1, 0].set_xlabel(f"epochs of training{over_seeds(seeds)}", color=INK)
    drawn.suptitle("Permuted MNIST: what a network still knows of earlier tasks", color=INK)
    legend(drawn, grid[0, 0], columns=3)
    return drawn


def _lowest_shown(found: Found) -> float:
    """Leave room below what is remembered at the end; first epochs may start further down."""
    least = min(accuracies[:, -1].mean(axis=0).min() for accuracies in found.values())
    return float(max(0, 10 * (least // 10) - 10))

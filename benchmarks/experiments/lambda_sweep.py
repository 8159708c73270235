"""Accuracy against lambda over six decades: which strengths work, in both modes of EWCOptimizer?

Two permuted tasks, protocol of :mod:`.permuted_mnist` with 20 epochs a task: learn A, consolidate,
learn B under the penalty, and take the mean test accuracy on both; once without a penalty, to
compare. SGD with ``mode="gradient"`` (the paper's form) diverges once ``lr * lambda * max(F) > 2``.
``mode="proximal"`` can't, and for large lambda only stops learning where task A needs a parameter.
Expect both a few points above no penalty over some decades, then chance for the gradient mode from
1,000 on, and little change for the proximal one.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from .shared import mnist
from .shared.experiment import Claim, Findings, Options
from .shared.figures import GREY, INK, ORANGE, VERMILION, curve, legend, over_seeds, panels
from .shared.permuted import Learner, Method, Protocol, Training, train
from .shared.tables import mean_and_deviation, table
from .shared.training import accuracy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WITHOUT = Method("SGD")
GRADIENT = Method('mode="gradient"', importance="fisher")
PROXIMAL = Method('mode="proximal"', importance="fisher", mode="proximal")
COLOURS = {GRADIENT.name: VERMILION, PROXIMAL.name: ORANGE}
CHANCE = 100 / mnist.CLASSES


@dataclass(frozen=True)
class Settings:
    """What is tried, and how often."""

    protocol: Protocol
    lambdas: tuple[float, ...]
    seeds: int

    def methods(self) -> list[Method]:
        """Return one without a penalty, and both modes with every lambda."""
        modes = (GRADIENT, PROXIMAL)
        return [WITHOUT, *(replace(m, ewc_lambda=each) for m in modes for each in self.lambdas)]


FULL = Settings(Protocol(2, epochs=20), tuple(10 ** (n / 2) for n in range(13)), seeds=3)
QUICK = Settings(Protocol(2, epochs=4, train=1000, test=500), (1.0, 1e3, 1e6), seeds=1)

Found = Mapping[Method, Sequence[float]]  # each seed's mean accuracy over the tasks


def run(options: Options) -> Findings:
    """Train once for each mode, lambda and seed."""
    settings = QUICK if options.quick else FULL
    settings = replace(settings, seeds=options.seeds or settings.seeds)
    found = train(learn, settings.methods(), settings.protocol, settings.seeds, options)
    return Findings(
        settings=asdict(settings),
        results={"accuracy": [asdict(method) | {"seeds": each} for method, each in found.items()]},
        table=summary(found),
        figure=figure(found),
        claims=claims(found),
    )


def learn(training: Training) -> float:
    """Learn the tasks in turn; return the mean accuracy over them at the end."""
    learner = Learner(training.network(), training.method, training.seed)
    tasks = training.tasks()
    for task in tasks:
        images = task.images()
        for _ in range(training.protocol.epochs):
            learner.epoch(images)
        learner.finish(images)
    return statistics.mean(accuracy(learner.model, task.judged) for task in tasks)


def by_lambda(found: Found, mode: Method) -> dict[float, Sequence[float]]:
    """Return one mode's accuracies by lambda."""
    return {method.ewc_lambda: each for method, each in found.items() if method.name == mode.name}


def summary(found: Found) -> str:
    """Return the table: a line for each lambda, a column for each mode."""
    gradient, proximal = by_lambda(found, GRADIENT), by_lambda(found, PROXIMAL)
    without = mean_and_deviation(found[WITHOUT])
    rows = [["none", without, without]] + [
        [f"{each:.3g}", mean_and_deviation(gradient[each]), mean_and_deviation(proximal[each])]
        for each in gradient
    ]
    title = "Test accuracy in percent, mean over both tasks after both"
    return table(title, ["lambda", GRADIENT.name, PROXIMAL.name], rows)


def claims(found: Found) -> list[Claim]:
    """Return what the largest lambda does to either mode."""
    gradient, proximal = by_lambda(found, GRADIENT), by_lambda(found, PROXIMAL)
    largest = max(gradient)
    collapsed, held = statistics.mean(gradient[largest]), statistics.mean(proximal[largest])
    return [
        Claim(
            f"lambda {largest:g}: gradient mode at chance, {collapsed:.1f}", collapsed < 2 * CHANCE
        ),
        Claim(f"lambda {largest:g}: proximal mode still learns, {held:.1f}", held > 4 * CHANCE),
    ]


def figure(found: Found) -> Figure:
    """Draw a curve for each mode, and the levels of chance and of no penalty."""
    drawn, grid = panels(1, 1, (7, 4.2))
    panel = grid[0, 0]
    for mode in (GRADIENT, PROXIMAL):
        accuracies = by_lambda(found, mode)
        runs = list(zip(*accuracies.values(), strict=True))
        curve(panel, [*accuracies], runs, colour=COLOURS[mode.name], label=mode.name)
    _level(panel, statistics.mean(found[WITHOUT]), "without a penalty")
    _level(panel, CHANCE, "chance")
    panel.set_xscale("log")
    panel.set_ylim(0, 100)
    panel.set_xlabel(
        f"lambda, with SGD at {WITHOUT.lr:g}{over_seeds(len(found[WITHOUT]))}", color=INK
    )
    panel.set_ylabel("mean test accuracy on\nboth tasks, after both (%)", color=INK)
    panel.set_title("Permuted MNIST, two tasks: which lambda works", color=INK)
    legend(drawn, panel)
    return drawn


def _level(panel: Axes, reached: float, name: str) -> None:
    panel.axhline(reached, color=GREY, lw=0.8, linestyle="--")
    panel.annotate(name, (1, reached - 4.5), color=GREY)

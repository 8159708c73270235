"""Accuracy against lambda over six decades, for both modes of ``EWCOptimizer``.

Two tasks of permuted MNIST (the demo's images, network and training): learn A, consolidate, learn B
under the penalty, and take the mean test accuracy on both; once without a penalty, to compare.
``mode="gradient"`` diverges once lr * lambda * max(F) > 2; ``mode="proximal"`` can't, and for large
lambda only stops learning where task A needs a parameter. Writes
``benchmarks/results/lambda/permuted_mnist.json`` and a plot beside it (extra ``demo``).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from harness import ROOT

from ewc_fast.demo.permuted import Method, Protocol, exact_fisher, learn
from ewc_fast.environment import environment
from ewc_fast.experiments.shared import mnist

Mode = Literal["gradient", "proximal"]
MODES: tuple[Mode, ...] = get_args(Mode)
TASKS = 2
WITHOUT = 0.0  # lambda: both modes are the same then, so that one is enough
COLOURS = {"gradient": "#d55e00", "proximal": "#0072b2"}


@dataclass(frozen=True)
class Sweep:
    """What is tried, and for how long each task is trained."""

    lambdas: tuple[float, ...]
    seeds: int
    epochs: int
    train: int  # images
    test: int
    width: int = 100
    lr: float = 0.2


FULL = Sweep(tuple(10.0**n for n in range(7)), seeds=2, epochs=20, train=3500, test=1000)
QUICK = Sweep((1.0, 1e3, 1e6), seeds=1, epochs=4, train=1000, test=500)


@dataclass(frozen=True)
class Run:
    """One training: the accuracies in percent after both tasks, on each."""

    mode: Mode
    ewc_lambda: float
    seed: int
    accuracies: list[float]

    @property
    def mean(self) -> float:
        """The mean over the tasks."""
        return statistics.mean(self.accuracies)


def runs(sweep: Sweep) -> Iterator[Run]:
    """Train once for each mode, lambda and seed."""
    images = mnist.five_thousand().at_most(train=sweep.train, test=sweep.test)
    protocol = Protocol((), width=sweep.width, epochs=sweep.epochs, margin=0.0)
    for mode in MODES:
        for ewc_lambda in (WITHOUT, *sweep.lambdas) if mode == MODES[0] else sweep.lambdas:
            method = Method(
                mode, lr=sweep.lr, remember=exact_fisher, ewc_lambda=ewc_lambda, mode=mode
            )
            for seed in range(sweep.seeds):
                epochs = learn(method, protocol, images, seed)
                *_, last = islice(epochs, TASKS * sweep.epochs)
                yield Run(mode, ewc_lambda, seed, last[:TASKS])


def means(found: list[Run], mode: Mode) -> dict[float, list[float]]:
    """Return the mean accuracies of one mode by lambda, one for each seed."""
    by_lambda: dict[float, list[float]] = {}
    for run in found:
        if run.mode == mode:
            by_lambda.setdefault(run.ewc_lambda, []).append(run.mean)
    return by_lambda


def table(found: list[Run]) -> str:
    """Return the means over seeds, a line for each lambda."""
    of_mode = {mode: means(found, mode) for mode in MODES}
    lines = [f"{'lambda':>8}" + "".join(f"{mode:>10}" for mode in MODES)]
    for ewc_lambda in of_mode[MODES[0]]:
        cells = [statistics.mean(of[ewc_lambda]) for of in of_mode.values() if ewc_lambda in of]
        lines.append(f"{ewc_lambda:8g}" + "".join(f"{cell:9.1f}%" for cell in cells))
    return "\n".join(lines)


def plot(found: list[Run], sweep: Sweep, to: Path) -> None:
    """Draw a line for each mode through the means over seeds, a dot for each seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    for mode in MODES:
        of_mode = means(found, mode)
        without = of_mode.pop(WITHOUT, None)
        if without is not None:
            _level(panel, sweep, statistics.mean(without), "without a penalty")
        line = [statistics.mean(each) for each in of_mode.values()]
        panel.plot([*of_mode], line, color=COLOURS[mode], lw=1.8, label=f'mode="{mode}"')
        for ewc_lambda, each in of_mode.items():
            panel.plot([ewc_lambda] * len(each), each, "o", color=COLOURS[mode], ms=4, alpha=0.7)
    _level(panel, sweep, 100 / mnist.CLASSES, "chance")
    panel.set_xscale("log")
    panel.set_ylim(0, 100)
    panel.set_xlabel(f"lambda (SGD, learning rate {sweep.lr:g}; dots: {sweep.seeds} seeds)")
    panel.set_ylabel("mean test accuracy on\nboth tasks, after both (%)")
    panel.set_title("Permuted MNIST, two tasks: which lambda works")
    panel.grid(axis="y", color="#d9d9d9", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, loc="center left")
    figure.savefig(to, dpi=160)


def _level(panel: Any, sweep: Sweep, accuracy: float, name: str) -> None:
    panel.axhline(accuracy, color="#999999", lw=0.8, linestyle="--")
    panel.annotate(name, (sweep.lambdas[0], accuracy - 4.5), color="#666666")


def run(sweep: Sweep, folder: Path) -> list[Run]:
    """Train everything, print the table, write record and plot into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    where = environment()
    found = list(runs(sweep))
    record = {
        "sweep": asdict(sweep), "runs": [asdict(run) for run in found], "environment": where,
    }  # fmt: skip
    (folder / "permuted_mnist.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(found, sweep, folder / "permuted_mnist.png")
    print(table(found))
    return found


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three lambdas, few images")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "lambda")
    options = parser.parse_args()
    torch.set_num_threads(1)  # products this small are slower on several
    run(QUICK if options.quick else FULL, options.out)


if __name__ == "__main__":
    main()

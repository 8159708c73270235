"""Which estimate of the Fisher, and how much lambda it wants.

The question is van de Ven's (2025, "On the computation of the Fisher Information in continual
learning", https://arxiv.org/abs/2502.11756): papers and codebases compute the Fisher in different
ways; what does that do to EWC? Split digits, task-incremental: five tasks of two digits, each with
two outputs of its own, a network with two hidden layers, Adam at 1e-3, online EWC with gamma = 1
(``anchor="latest"``), all as there; the pairs of digits vary with the seed. Smaller than there: 100
hidden units (400), 150 steps a task on 64 images (2,000 on 128), 5,000 images (60,000). A task has
about 700 training images where it had 12,000: "500 samples" are most of them here, "50 samples" are
about the share that 500 were there.

Each kind is tried for every decade of lambda, in both modes of the optimizer:

``gradient``
    lambda F (theta - a) is added to the gradient, before Adam divides by that gradient's own size.
    Adam bounds every step by about its rate, so that too large a lambda can't diverge, as it does
    under SGD: it only drowns the task's gradient.
``proximal``
    theta <- (theta + lr lambda F a) / (1 + lr lambda F) after Adam's step: the springs' strength is
    lr lambda F, whatever Adam divides by.

What to expect. The kinds differ less in what they reach than in the lambda that takes them there:
the smaller the estimate, the larger (the column "size" is the sum of the entries over that of the
exact Fisher's, after the first task). A network that is sure of its labels has next to no gradient
at them. Labels that are drawn ("sampled") are others rarely, and then count much: right on average,
but noisy; the data's ("empirical") may never be. "batched" squares the mean of a batch's gradients,
in which samples cancel: smaller again by the batch size or more. With two classes "rademacher" IS
exact: there is one direction, and its sign falls out of the square. In proximal mode lambda is
larger by about 1 / lr. It does not matter less there than in gradient mode, as it does under SGD
(the experiment on lambda): Adam's bound does for the one what the form itself does for the other.

Lambda is chosen by the mean accuracy on the validation images, for each kind and mode, the smallest
of equals; accuracies in table and figure are on the test images. Seconds are those of all calls of
``fisher_diagonal`` in a training (four), the median over trainings; most of each call is fixed cost
at this size, the comparison with single samples above all. For speed see ``benchmarks/README.md``.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..shared import figures
from ..shared.experiment import Claim, Findings, Options
from ..shared.jobs import run_all
from ..shared.tables import mean_and_deviation, table
from .learning import (
    BATCHED,
    EXACT,
    FULL,
    KINDS,
    MODES,
    QUICK,
    RADEMACHER,
    TASKS,
    Job,
    Kind,
    Mode,
    Settings,
    Training,
    train,
)
from .sweep import NEAR, Sweep, mean_accuracies, training_record


def run(options: Options) -> Findings:
    """Train with every kind, mode and lambda; compare."""
    settings = QUICK if options.quick else FULL
    settings = replace(settings, seeds=options.seeds or settings.seeds)
    trainings = run_all(
        train, list(_jobs(settings)), workers=options.workers, description="fisher-kinds"
    )
    without = [t for t in trainings if t.job.kind is None]
    sweeps = [
        Sweep(kind, mode, tuple(t for t in trainings if t.job.kind == kind and t.job.mode == mode))
        for kind in KINDS
        for mode in MODES
    ]
    return Findings(
        settings=asdict(settings),
        results={
            "without": [training_record(t) for t in without],
            "sweeps": [s.record() for s in sweeps],
        },
        table=_table(sweeps, without),
        figure=draw(sweeps, without),
        claims=[] if options.quick else claims(sweeps, without),
    )


def _jobs(settings: Settings) -> Iterator[Job]:
    for seed in range(settings.seeds):
        yield Job(settings, seed)
        for kind in KINDS:
            for mode in MODES:
                for ewc_lambda in settings.lambdas:
                    yield Job(settings, seed, kind, mode, ewc_lambda)


def claims(sweeps: Sequence[Sweep], without: Sequence[Training]) -> list[Claim]:
    """Return what the paper found, and what is ours to show."""
    found = {(sweep.kind, sweep.mode): sweep for sweep in sweeps}
    exact, batched = found[EXACT, "gradient"], found[BATCHED, "gradient"]
    same = found[RADEMACHER, "gradient"]
    plain = statistics.mean(mean_accuracies(without, "test"))
    worst = min(statistics.mean(sweep.test) for sweep in sweeps)
    best = max(statistics.mean(s.test) for s in sweeps if s.mode == "gradient")
    return [
        Claim(
            "with every kind and mode EWC beats no penalty by more than 1 point",
            worst > plain + 1,
        ),
        Claim(
            "the exact Fisher is within 1 point of the best kind (gradient mode)",
            statistics.mean(exact.test) > best - 1,
        ),
        Claim(
            "batched gradients need a lambda 1,000 times the exact Fisher's or more",
            batched.best >= 1e3 * exact.best,
        ),
        Claim(
            "with two classes rademacher is the exact Fisher, its sum within 1e-6",
            abs(same.size / exact.size - 1) < 1e-6,
        ),
        Claim(
            f"for every kind as many or more decades of lambda are within {NEAR:g} point of the "
            "best in proximal mode as in gradient mode, and for most more",
            _wider(found),
        ),
    ]


def _wider(found: dict[tuple[Kind, Mode], Sweep]) -> bool:
    gains = [found[kind, "proximal"].decades - found[kind, "gradient"].decades for kind in KINDS]
    return min(gains) >= 0 and sum(gain > 0 for gain in gains) > len(gains) / 2


def _table(sweeps: Sequence[Sweep], without: Sequence[Training]) -> str:
    exact = next(sweep for sweep in sweeps if sweep.kind == EXACT)
    rows = [["no penalty", "", mean_and_deviation(mean_accuracies(without, "test"), 2), *[""] * 3]]
    for mode in MODES:
        rows += [_row(sweep, exact) for sweep in sweeps if sweep.mode == mode]
    return table(
        f"Split digits, {TASKS} tasks: test accuracy (%) with the lambda chosen on validation "
        f"images; decades: lambdas within {NEAR:g} point of the best there",
        ["kind, mode", "lambda", "accuracy", "decades", "size", "Fisher, s"],
        rows,
    )


def _row(sweep: Sweep, exact: Sweep) -> list[str]:
    return [
        f"{sweep.kind.name}, {sweep.mode}",
        f"{sweep.best:.0e}",
        mean_and_deviation(sweep.test, 2),
        f"{sweep.decades}",
        f"{sweep.size / exact.size:.2g}",
        f"{sweep.seconds:.3f}",
    ]


def draw(sweeps: Sequence[Sweep], without: Sequence[Training]) -> Figure:
    """Draw accuracy against lambda, a panel for each mode and a line for each kind."""
    figure, grid = figures.panels(1, len(MODES), (9.6, 4.0), sharex=True, sharey=True)
    for panel, mode in zip(grid.flat, MODES, strict=True):
        panel.axhline(
            statistics.mean(mean_accuracies(without, "test")),
            color=figures.INK,
            lw=1,
            ls=(0, (4, 3)),
            label="no penalty",
        )
        for sweep, style in zip((s for s in sweeps if s.mode == mode), STYLES, strict=True):
            _draw_sweep(panel, sweep, style)
        panel.set_xscale("log")
        panel.set_xlabel("lambda")
        panel.set_title(f'mode="{mode}"')
    grid[0, 0].set_ylabel("test accuracy after all tasks,\nmean over them (%)")
    figures.legend(figure, grid[0, 0], columns=4)
    return figure


# Rademacher lies on exact: dots on its line.
STYLES: tuple[dict[str, Any], ...] = (
    {"colour": figures.BLUE, "lw": 2.6},
    {"colour": figures.SKY},
    {"colour": figures.SKY, "ls": ":"},
    {"colour": figures.GREEN},
    {"colour": figures.INK, "ls": "", "marker": "x", "ms": 4},
    {"colour": figures.ORANGE},
    {"colour": figures.VERMILION},
)


def _draw_sweep(panel: Axes, sweep: Sweep, style: dict[str, Any]) -> None:
    """Draw the mean over seeds: their spread is that of their pairs of digits, the same for all."""
    means = [statistics.mean(mean_accuracies(sweep.at(each), "test")) for each in sweep.lambdas]
    figures.curve(panel, sweep.lambdas, [means], label=sweep.kind.name, **style)

"""How long EWC takes: the Fisher diagonal and the penalty against parameters and samples.

Kirkpatrick et al. 2017 say that its run time is linear in the number of parameters and in that of
training examples. Here both are measured, on one thread, for perceptrons with two hidden layers:
lines of log time over log number, whose slope is 1 where the time is proportional.

Protocol: the empirical Fisher diagonal over batches of 256, beside a plain forward and backward
pass over the same data; the penalty's gradient and value, ``EWC.add_penalty_grad_()``, which reads
parameters, Fisher and anchor and reads and writes gradients, 20 bytes a parameter. (It sees no
data: samples cost it nothing.) A repetition measures all sizes in turn, several rounds each, and
keeps the fastest, since whatever else runs can only add; slopes are fitted to each repetition by
least squares.

Expect: slopes of 1, but for two things. Every call has a fixed price (the Fisher: milliseconds,
mostly to compare its first samples with single ones; the penalty: 10 microseconds), so that small
sizes are not fitted. And the penalty does hardly any arithmetic: its speed is that of the memory it
works in. Its line has a step where its 16 bytes a parameter leave the caches, and is fitted on
either side of it: within a third-level cache, and in main memory.

Measure on a quiet machine. One process does it all, whatever ``--workers`` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from math import log
from statistics import linear_regression, mean
from time import perf_counter
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ewc_fast import EWC, fisher_diagonal

from .shared import figures
from .shared.experiment import Claim, Findings, Options
from .shared.tables import mean_and_deviation, table
from .shared.training import perceptron

INPUTS, CLASSES, BATCH = 784, 10, 256
FISHER, PLAIN, PENALTY = "Fisher diagonal", "forward and backward", "penalty"
HELD = 16  # bytes a parameter: parameter, gradient, Fisher and anchor
MIB = 2**20
WITHIN = 0.15


@dataclass(frozen=True)
class Settings:
    """Sizes, and how often each is measured; ``seeds`` are repetitions of the whole.

    ``in_caches`` and ``in_memory`` are the sizes of the penalty's operands, in bytes, between and
    from which its two slopes are fitted.
    """

    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    width: int = 200  # while the samples vary
    widths: tuple[int, ...] = (50, 100, 200, 400, 800, 1600)
    width_batches: int = 2  # while the width varies
    parameters: tuple[int, ...] = tuple(2**n for n in range(10, 26))
    in_caches: tuple[float, float] = (2 * MIB, 16 * MIB)
    in_memory: float = 128 * MIB
    rounds: int = 5
    seeds: int = 5


FULL = Settings()
QUICK = Settings(
    batches=(1, 2, 4, 8), width=50, widths=(16, 64, 256), width_batches=1,
    parameters=tuple(2**n for n in range(10, 24)), in_memory=32 * MIB, rounds=3, seeds=1,
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """Seconds against a number: ``seconds`` (repetitions, sizes) for each of what is timed."""

    over: str
    sizes: Sequence[int]
    seconds: Mapping[str, Sequence[Sequence[float]]]


def run(options: Options) -> Findings:
    """Measure three lines, fit their slopes."""
    settings = QUICK if options.quick else FULL
    settings = replace(settings, seeds=options.seeds or settings.seeds)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # where others would join in, lines would have a kink
    try:
        lines = measure(settings)
    finally:
        torch.set_num_threads(threads)
    slopes = fitted(settings, lines)
    return Findings(
        settings=asdict(settings) | {"threads": 1},
        results={"lines": [asdict(line) for line in lines], "slopes": slopes},
        table=_table(slopes),
        figure=_draw(settings, lines),
        claims=[] if options.quick else _claims(slopes),
    )


# Measuring

Timed = Mapping[str, Callable[[], object]]
"""What competes at one size: made when it is measured, and then gone."""


def measure(settings: Settings) -> list[Line]:
    """Return the Fisher's line over samples and over parameters, and the penalty's."""
    width, batches = settings.width, settings.width_batches
    lines = [
        ("samples", {BATCH * n: partial(passes, width, n) for n in settings.batches}),
        ("parameters", {parameters(w): partial(passes, w, batches) for w in settings.widths}),
        ("parameters", {n: partial(penalty, n) for n in settings.parameters}),
    ]
    total = settings.seeds * sum(len(sizes) for _, sizes in lines)
    with tqdm(total=total, desc="timing", leave=False, disable=None) as bar:
        return [_line(settings, over, sizes, bar) for over, sizes in lines]


def _line(
    settings: Settings, over: str, sizes: Mapping[int, Callable[[], Timed]], bar: tqdm[object]
) -> Line:
    repetitions = []
    for _ in range(settings.seeds):
        fastest = []
        for make in sizes.values():
            fastest.append(_fastest(make(), settings.rounds))
            bar.update()
        repetitions.append(fastest)
    names = repetitions[0][0]
    return Line(
        over,
        [*sizes],
        {name: [[at[name] for at in each] for each in repetitions] for name in names},
    )


def _fastest(timed: Timed, rounds: int) -> dict[str, float]:
    """Return the least seconds of each, in turns, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(rounds + 1):
        for name, call in timed.items():
            began = perf_counter()
            call()
            if number > 0:
                seconds[name].append(perf_counter() - began)
    return {name: min(each) for name, each in seconds.items()}


def passes(width: int, batches: int) -> Timed:
    """Return the Fisher diagonal and the plain pass over random data."""
    model = perceptron([INPUTS, width, width, CLASSES], seed=0)
    draw = torch.Generator().manual_seed(0)
    pixels = torch.rand(BATCH, INPUTS, generator=draw)
    data = [(pixels, torch.randint(CLASSES, (BATCH,), generator=draw))] * batches

    def plain() -> None:
        for inputs, labels in data:
            model.zero_grad()
            cross_entropy(model(inputs), labels).backward()

    return {FISHER: lambda: fisher_diagonal(model, data, estimator="empirical"), PLAIN: plain}


def parameters(width: int) -> int:
    """Return how many a perceptron with hidden layers this wide has."""
    widths = [INPUTS, width, width, CLASSES]
    return sum((before + 1) * after for before, after in pairwise(widths))


def penalty(size: int) -> Timed:
    """Return the penalty's gradient and value for one flat tensor."""
    weights = nn.Parameter(torch.zeros(size))
    weights.grad = torch.zeros(size)
    ewc = EWC([("weights", weights)], ewc_lambda=1.0)
    ewc.consolidate_from({"weights": torch.ones(size)})
    return {PENALTY: ewc.add_penalty_grad_}


# Slopes


def fitted(settings: Settings, lines: Sequence[Line]) -> dict[str, list[float]]:
    """Return each repetition's slopes, by what they are of."""
    samples, passed, flat = lines
    low, high = (bound / HELD for bound in settings.in_caches)
    beyond = settings.in_memory / HELD
    slopes = {}
    for line in (samples, passed):
        least = line.sizes[len(line.sizes) // 2]
        for name in line.seconds:
            slopes[f"{name} over {line.over}"] = _slopes(line, name, least, line.sizes[-1])
    slopes[f"{PENALTY} over parameters, in the caches"] = _slopes(flat, PENALTY, low, high)
    slopes[f"{PENALTY} over parameters, in main memory"] = _slopes(
        flat, PENALTY, beyond, flat.sizes[-1]
    )
    return slopes


def _slopes(line: Line, name: str, least: float, most: float) -> list[float]:
    """Return each repetition's least-squares slope of log seconds over log size, in between."""
    chosen = [k for k, size in enumerate(line.sizes) if least <= size <= most]
    x = [log(line.sizes[k]) for k in chosen]
    return [
        linear_regression(x, [log(seconds[k]) for k in chosen]).slope
        for seconds in line.seconds[name]
    ]


# What is shown

STYLES: dict[str, dict[str, Any]] = {
    FISHER: {"colour": figures.BLUE, "marker": "o"},
    PLAIN: {"colour": figures.ORANGE, "marker": "s"},
    PENALTY: {"colour": figures.GREEN, "marker": "o"},
}


def _table(slopes: Mapping[str, list[float]]) -> str:
    rows = [[name, mean_and_deviation(each, 2)] for name, each in slopes.items()]
    return table("Slopes of log time over log number (1: proportional)", ["time of", "slope"], rows)


def _draw(settings: Settings, lines: Sequence[Line]) -> Figure:
    figure, grid = figures.panels(1, 3, (12.5, 4.2))
    titles = (
        f"Fisher, {parameters(settings.width):,} parameters",
        f"Fisher, {BATCH * settings.width_batches:,} samples",
        "Penalty: value and gradient",
    )
    for panel, line, title in zip(grid.flat, lines, titles, strict=True):
        for name, runs in line.seconds.items():
            milliseconds = 1e3 * np.array(runs)
            figures.curve(panel, line.sizes, milliseconds, label=name, ms=4.5, **STYLES[name])
        largest = 1e3 * mean(seconds[-1] for seconds in next(iter(line.seconds.values())))
        proportional = [largest * size / line.sizes[-1] for size in line.sizes]
        panel.plot(line.sizes, proportional, ":", color=figures.GREY, label="proportional")
        panel.set(xscale="log", yscale="log", xlabel=line.over, title=title)
        panel.legend(frameon=False, loc="upper left")
    grid[0, 0].set_ylabel("milliseconds")
    _mark_memory(grid[0, 2], settings)
    return figure


def _mark_memory(panel: Axes, settings: Settings) -> None:
    """Shade where the penalty's slopes are fitted."""
    low, high = (bound / HELD for bound in settings.in_caches)
    for name, begin, end in (
        ("in the caches", low, high),
        ("in memory", settings.in_memory / HELD, settings.parameters[-1]),
    ):
        panel.axvspan(begin, end, color=figures.SHADE, zorder=0)
        middle = (begin * end) ** 0.5
        panel.annotate(name, (middle, 0.03), xycoords=("data", "axes fraction"), ha="center")


def _claims(slopes: Mapping[str, list[float]]) -> list[Claim]:
    return [
        Claim(
            f"{name}: a slope of 1 within {WITHIN:g}, on average",
            abs(mean(each) - 1) < WITHIN,
        )
        for name, each in slopes.items()
        if not name.startswith(PLAIN)
    ]

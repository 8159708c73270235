"""How the time of a Fisher diagonal grows with the samples and with the parameters.

Kirkpatrick et al. 2017 say that the cost is linear in both. Here it is measured, on perceptrons
with two hidden layers over batches of 256: lines of log time over log number, their slopes (1 is
linear) fitted to the upper half, where fixed costs do not count. Writes
``benchmarks/results/growth/<processor>.json`` and a plot beside it (matplotlib, extra ``demo``).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from fisher_calls import EWC_FAST, FORWARD_AND_BACKWARD, ours
from fisher_case import Estimator, FisherCase
from fisher_models import dense
from harness import ROOT

from ewc_fast.environment import environment

INPUTS, CLASSES, BATCH = 784, 10, 256
ESTIMATOR: Estimator = "empirical"


@dataclass(frozen=True)
class Point:
    """One perceptron over one amount of data, and the median seconds of both passes."""

    samples: int
    parameters: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class Sweep:
    """What is varied, over which values, while the other stays."""

    over: str
    widths: Sequence[int]
    batches: Sequence[int]

    def points(self, rounds: int) -> list[Point]:
        """Measure every combination."""
        return [
            measured(width, batches, rounds) for width in self.widths for batches in self.batches
        ]


FULL = (
    Sweep("samples", widths=[400], batches=[1, 2, 4, 8, 16, 32, 64, 128]),
    Sweep("parameters", widths=[50, 100, 200, 400, 800, 1600, 3200], batches=[2]),
)
QUICK = (
    Sweep("samples", widths=[8], batches=[1, 2, 4]),
    Sweep("parameters", widths=[8, 32, 128], batches=[1]),
)


def measured(width: int, batches: int, rounds: int) -> Point:
    """Time both passes in turns, after one of each."""
    case = FisherCase(dense(BATCH, INPUTS, width, width, CLASSES), BATCH, batches)
    calls = {EWC_FAST: ours(case, ESTIMATOR), FORWARD_AND_BACKWARD: case.forward_and_backward}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            began = perf_counter()
            call()
            if number > 0:
                seconds[name].append(perf_counter() - began)
    return Point(
        samples=BATCH * batches,
        parameters=sum(param.numel() for param in case.model.parameters()),
        seconds={name: statistics.median(times) for name, times in seconds.items()},
    )


def slope(points: Sequence[Point], over: str, name: str) -> float:
    """Return the least-squares slope of log time over log number, of the upper half."""
    upper = points[len(points) // 2 :] if len(points) > 3 else points
    x = [math.log(getattr(point, over)) for point in upper]
    y = [math.log(point.seconds[name]) for point in upper]
    return statistics.linear_regression(x, y).slope


def plot(sweeps: dict[str, list[Point]], slopes: dict[str, dict[str, float]], to: Path) -> None:
    """Draw both lines of every sweep, with a dotted one of slope 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(sweeps), figsize=(5 * len(sweeps), 3.8))
    for axis, (over, points) in zip(axes, sweeps.items(), strict=True):
        numbers = [getattr(point, over) for point in points]
        for name, marker in ((EWC_FAST, "o"), (FORWARD_AND_BACKWARD, "s")):
            label = f"{name}, slope {slopes[over][name]:.2f}"
            axis.loglog(numbers, [point.seconds[name] for point in points], marker=marker,
                        label=label)  # fmt: skip
        last = points[-1].seconds[EWC_FAST]
        axis.loglog(numbers, [last * n / numbers[-1] for n in numbers], ":", color="grey",
                    label="linear")  # fmt: skip
        axis.set(xlabel=over, ylabel="seconds")
        axis.legend(frameon=False)
    figure.suptitle("Time of the Fisher diagonal (empirical, perceptron)")
    figure.tight_layout()
    figure.savefig(to, dpi=150)
    pyplot.close(figure)


def run(quick: bool, folder: Path) -> Path:
    """Measure, print the slopes, write both files; return the JSON's path."""
    at = environment()
    rounds = 3 if quick else 7
    sweeps = {sweep.over: sweep.points(rounds) for sweep in (QUICK if quick else FULL)}
    slopes = {
        over: {name: slope(points, over, name) for name in points[0].seconds}
        for over, points in sweeps.items()
    }
    for over, of in slopes.items():
        for name, value in of.items():
            print(f"time over {over:10}  {name:20}  slope {value:.2f}")
    folder.mkdir(parents=True, exist_ok=True)
    processor = re.sub(r"[^a-z0-9]+", "-", at["cpu"].lower()).strip("-")
    written = folder / f"{'quick-' * quick}{processor}.json"
    record: dict[str, Any] = {
        "environment": at,
        "estimator": ESTIMATOR,
        "slopes": slopes,
        "points": {over: [vars(point) for point in points] for over, points in sweeps.items()},
    }
    written.write_text(json.dumps(record, indent=1) + "\n")
    plot(sweeps, slopes, written.with_suffix(".png"))
    print(f"wrote {written} and its .png")
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it work?")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "growth")
    options = parser.parse_args()
    run(options.quick, options.out)

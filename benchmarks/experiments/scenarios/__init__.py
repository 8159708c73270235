"""What a network must know by itself: task-, domain- and class-incremental learning.

Van de Ven and Tolias (2019, https://arxiv.org/abs/1904.07734) ask the same tasks in three ways that
differ in what a network is told when it is tested; Hsu et al. (2018,
https://arxiv.org/abs/1810.12488) came to the same ones:

task      each task has outputs of its own, and the test names the task: choose among its outputs
domain    all tasks share the same outputs, and the test does not name the task
class     each task has outputs of its own, and the test does not name the task: choose among all

Split digits (five tasks of two digits, drawn by the seed) and permuted digits (five orders of the
pixels, ten digits each); a perceptron with two hidden layers, Adam at 1e-3. In class-incremental
learning the softmax is over the outputs of all tasks so far while a task is trained. The fourth
column, "class, masked", trains with the softmax over the task's own outputs only, as the first (the
same networks), and then does not name the task: new classes' training does not push the old ones'
logits down, but nothing compares classes of different tasks either.

Two lines frame the methods: fine-tuning (plain Adam, one task after another) from below, joint
training (as many steps, on the images of all tasks together) from above; that of the fourth column
has masks too, and shows what these alone cost. Between them EWC with one penalty per task
(``anchor="merged"``), synaptic intelligence (Zenke et al. 2017) and memory aware synapses (Aljundi
et al. 2018): the same penalty with another importance, ``EWC(importance=...)``; as in their papers,
at the latest anchor. Online EWC (Schwarz et al. 2018) would be one more ``Method``, with its name.

What to expect, in both papers' numbers for EWC on all of split MNIST (task, domain, class): 98.6,
64.0, 20.0 and 97.7, 58.9, 19.8. A penalty on the weights keeps what the network could do, task by
task. It never sees digits of two tasks side by side, so it can't learn to tell them apart. Where
that is the question, in class-incremental learning, EWC alone fails, as all such penalties do; it
takes replay, or another way to compare old and new classes.

Lambda is chosen for each method, problem and column by the accuracy on validation images, with two
seeds of its own (other pairs of digits, other permutations, other first weights); on 500 images
that is a choice to within a decade.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..shared import figures
from ..shared.experiment import Claim, Findings, Options
from ..shared.jobs import run_all
from ..shared.tables import mean_and_deviation, table
from .learning import (
    CLASS,
    DOMAIN,
    FINE_TUNING,
    FULL,
    JOINT,
    MASKED,
    PERMUTED,
    PLAIN_EWC,
    QUICK,
    SCENARIOS,
    SPLIT,
    TASK,
    Job,
    Method,
    Problem,
    Scenario,
    Settings,
    Trained,
    train,
)


@dataclass(frozen=True)
class Cell:
    """A method in a scenario of a problem."""

    problem: Problem
    scenario: Scenario
    method: Method

    def jobs(self, settings: Settings, ewc_lambda: float, seeds: Iterable[int]) -> list[Job]:
        """Return the trainings with this lambda; cells may share them."""
        how = (settings, self.problem, self.scenario.softmax, self.method, ewc_lambda)
        return [Job(*how, seed) for seed in seeds]


@dataclass(frozen=True)
class Found:
    """What was chosen in a cell, by which mean accuracies, and how each seed then did."""

    ewc_lambda: float
    scores: Mapping[float, float]
    accuracies: list[float]

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return statistics.mean(self.accuracies)


Compared = Mapping[Cell, Found]


def run(options: Options) -> Findings:
    """Choose each lambda, train with it on other seeds, and compare."""
    settings = QUICK if options.quick else FULL
    settings = replace(settings, seeds=options.seeds or settings.seeds)
    found = compare(settings, options.workers)
    return Findings(
        settings=asdict(settings),
        results={"cells": [_record(cell, each) for cell, each in found.items()]},
        table="\n\n".join(_table(problem, settings, found) for problem in settings.problems),
        figure=draw(settings, found),
        claims=[] if options.quick else claims(found),
    )


def compare(settings: Settings, workers: int | None) -> dict[Cell, Found]:
    """Return what was found for every method in every scenario of every problem."""
    cells = [
        Cell(problem, scenario, method)
        for problem in settings.problems
        for scenario in SCENARIOS
        for method in settings.methods
    ]
    scores = _scores(cells, settings, workers)
    chosen = {cell: _best(scores[cell]) for cell in cells}
    jobs = {cell: cell.jobs(settings, chosen[cell], range(settings.seeds)) for cell in cells}
    done = _train_all(jobs.values(), workers, "scenarios")
    return {
        cell: Found(
            chosen[cell], scores[cell], [done[job].test[cell.scenario] for job in jobs[cell]]
        )
        for cell in cells
    }


def _scores(
    cells: list[Cell], settings: Settings, workers: int | None
) -> dict[Cell, dict[float, float]]:
    """Return for each cell and lambda the mean accuracy on validation images."""
    jobs = {
        cell: {each: cell.jobs(settings, each, settings.choosing) for each in cell.method.lambdas}
        for cell in cells
    }
    wanted = (some for of_cell in jobs.values() for some in of_cell.values())
    tried = _train_all(wanted, workers, "scenarios: lambda")
    return {
        cell: {
            each: statistics.mean(tried[job].validation[cell.scenario] for job in some)
            for each, some in of_cell.items()
        }
        for cell, of_cell in jobs.items()
    }


def _best(scores: Mapping[float, float]) -> float:
    """Return the lambda of the best score, the smallest of equals; 0 where there is no choice."""
    return max(scores, key=lambda each: scores[each]) if scores else 0.0


def _train_all(
    wanted: Iterable[list[Job]], workers: int | None, description: str
) -> dict[Job, Trained]:
    """Train each job once, however many cells want it."""
    jobs = list(dict.fromkeys(job for some in wanted for job in some))
    done = run_all(train, jobs, workers=workers, description=description)
    return dict(zip(jobs, done, strict=True))


def claims(found: Compared) -> list[Claim]:
    """Return what both papers found, and where EWC fails."""

    def mean(problem: Problem, scenario: Scenario, method: Method) -> float:
        return found[Cell(problem, scenario, method)].mean

    def gain(problem: Problem, scenario: Scenario) -> float:
        plain = mean(problem, scenario, FINE_TUNING)
        return mean(problem, scenario, PLAIN_EWC) - plain

    def short(problem: Problem, scenario: Scenario) -> float:
        return mean(problem, scenario, JOINT) - mean(problem, scenario, PLAIN_EWC)

    return [
        Claim(
            "task-incremental, split: EWC is within 3 points of joint training",
            short(SPLIT, TASK) < 3 and gain(SPLIT, TASK) > 3,
        ),
        Claim(
            "permuted, task- and domain-incremental: EWC gains more than half of what "
            "fine-tuning lacks",
            all(gain(PERMUTED, each) > short(PERMUTED, each) for each in (TASK, DOMAIN)),
        ),
        Claim(
            "class-incremental, split: EWC alone fails, within 5 points of fine-tuning and more "
            "than 50 below joint training",
            abs(gain(SPLIT, CLASS)) < 5 and short(SPLIT, CLASS) > 50,
        ),
        Claim(
            "class-incremental, split, masked: better by more than 10 points than without masks, "
            "and still more than 20 below joint training",
            mean(SPLIT, MASKED, PLAIN_EWC) > mean(SPLIT, CLASS, PLAIN_EWC) + 10
            and mean(SPLIT, CLASS, JOINT) > mean(SPLIT, MASKED, PLAIN_EWC) + 20,
        ),
    ]


def _record(cell: Cell, found: Found) -> dict[str, object]:
    return {
        "problem": cell.problem.name,
        "scenario": cell.scenario.name,
        "method": cell.method.name,
        "ewc_lambda": found.ewc_lambda,
        "validation_by_lambda": {f"{each:g}": score for each, score in found.scores.items()},
        "test": found.accuracies,
    }


def _table(problem: Problem, settings: Settings, found: Compared) -> str:
    rows = [
        [method.name, *(_entry(found[Cell(problem, each, method)]) for each in SCENARIOS)]
        for method in settings.methods
    ]
    title = f"{problem.name.title()} digits, {problem.tasks} tasks: test accuracy (%)"
    return table(f"{title}, and lambda", ["", *(each.name for each in SCENARIOS)], rows)


def _entry(found: Found) -> str:
    accuracy = mean_and_deviation(found.accuracies)
    return f"{accuracy} at {found.ewc_lambda:.0e}" if found.scores else accuracy


COLOURS = (figures.BLUE, figures.GREEN, figures.ORANGE, figures.PURPLE)


def draw(settings: Settings, found: Compared) -> Figure:
    """Draw for each scenario the range from fine-tuning to joint training, and what is in it."""
    problems = settings.problems
    figure, grid = figures.panels(1, len(problems), (4.8 * len(problems), 4.2), sharey=True)
    for panel, problem in zip(grid.flat, problems, strict=True):
        for place, scenario in enumerate(SCENARIOS):
            cells = [Cell(problem, scenario, method) for method in settings.methods]
            _draw_scenario(panel, place, {cell.method: found[cell] for cell in cells})
        panel.set_title(f"{problem.name.title()} digits, {problem.tasks} tasks")
        panel.set_xticks(range(len(SCENARIOS)), [each.name for each in SCENARIOS])
        panel.set_ylim(0, 102)
    grid[0, 0].set_ylabel("test accuracy after all tasks,\nmean over them (%)")
    figures.legend(figure, grid[0, 0])
    return figure


def _draw_scenario(panel: Axes, place: int, found: Mapping[Method, Found]) -> None:
    """Draw the frame as a bar with two edges, each penalty as a dot for its mean, with its spread.

    Only the first place is labelled, for the legend.
    """
    low, high = found[FINE_TUNING].mean, found[JOINT].mean
    panel.bar(place, high - low, bottom=low, width=0.8, color=figures.SHADE)
    for level, style, method in ((high, "-", JOINT), (low, "--", FINE_TUNING)):
        panel.hlines(
            level, place - 0.4, place + 0.4, color=figures.INK, ls=style, lw=1.4,
            label="_" if place else method.name,
        )  # fmt: skip
    others = [method for method in found if method not in (FINE_TUNING, JOINT)]
    for number, (method, colour) in enumerate(zip(others, COLOURS, strict=False)):
        each = found[method].accuracies
        x = place + 0.17 * (number - (len(others) - 1) / 2)
        spread = statistics.stdev(each) if len(each) > 1 else 0.0
        panel.errorbar(
            x, found[method].mean, yerr=spread, color=colour, fmt="o", ms=6, lw=1.4,
            label="_" if place else method.name,
        )  # fmt: skip

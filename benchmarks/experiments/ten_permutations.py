"""Ten permuted tasks in turn: how many can one network hold?

After figure 2B of Kirkpatrick et al. 2017 (https://doi.org/10.1073/pnas.1611835114): the mean
accuracy over all tasks seen so far, against their number. SGD with dropout, stopped early, is what
was known to forget least without further memory (Goodfellow et al. 2014,
https://arxiv.org/abs/1312.6211); it falls steadily, while EWC stays near what each task reaches
alone, until the capacity of a network this small is used up.

Protocol: as :mod:`.permuted_mnist`, with ten tasks of 20 epochs. Dropout of 0.2 of the inputs and
half of the hidden units; there a task ends when the validation error, as the mean over all tasks so
far, has been above its lowest for more than 5 checks, one an epoch, and the network goes back to
where it was lowest. That method sees old tasks' validation images, no other does. Rates and
strengths are chosen for ten tasks by accuracy on validation images, over other permutations. Expect
half for SGD and L2, some 72 % for SGD with dropout, 80 to 84 % for EWC, 92 % for each task alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from .shared import mnist
from .shared.experiment import Claim, Findings, Options
from .shared.figures import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    VERMILION,
    curve,
    legend,
    over_seeds,
    panels,
)
from .shared.permuted import Learner, Method, Protocol, Task, Training, choose, train
from .shared.tables import mean_and_deviation, table
from .shared.training import accuracy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAIN = Method("SGD")
DROPOUT = Method("SGD + dropout", dropout=True)
UNIFORM = Method("uniform L2", importance="l2")
GRADIENT = Method("EWC", importance="fisher")
PROXIMAL = Method("proximal EWC", importance="fisher", mode="proximal")
ALONE = Method("each task alone")
COLOURS = {
    PLAIN.name: BLUE,
    DROPOUT.name: PURPLE,
    UNIFORM.name: GREEN,
    GRADIENT.name: VERMILION,
    PROXIMAL.name: ORANGE,
    ALONE.name: GREY,
}

DROPPED_INPUTS, DROPPED_HIDDEN = 0.2, 0.5
PATIENCE = 5  # checks
TARGET = 78.0  # percent for EWC after ten tasks: the issue that asked for these experiments


@dataclass(frozen=True)
class Settings:
    """How often everything is repeated, and what is chosen from, over so many seeds."""

    protocol: Protocol
    seeds: int
    choosing_seeds: int
    rates: tuple[float, ...]  # with dropout
    uniform: tuple[float, ...]
    gradient: tuple[float, ...]
    proximal: tuple[float, ...]

    def candidates(self) -> list[Method]:
        """Return a method for each value of its grid."""
        return [
            *(replace(DROPOUT, lr=rate) for rate in self.rates),
            *(replace(UNIFORM, ewc_lambda=strength) for strength in self.uniform),
            *(replace(GRADIENT, ewc_lambda=strength) for strength in self.gradient),
            *(replace(PROXIMAL, ewc_lambda=strength) for strength in self.proximal),
        ]


FULL = Settings(
    Protocol(tasks=10, epochs=20),
    seeds=3,
    choosing_seeds=1,
    rates=(0.05, 0.1, 0.2),
    uniform=(0.0003, 0.001, 0.003, 0.01),
    gradient=(10.0, 30.0),
    proximal=(10.0, 30.0, 100.0),
)
WHOLE_MNIST = replace(FULL, protocol=Protocol(tasks=10, epochs=5, width=400))
QUICK = Settings(
    Protocol(tasks=4, epochs=6, train=1500, test=500),
    seeds=1,
    choosing_seeds=1,
    rates=(0.2,),
    uniform=(0.001,),
    gradient=(10.0,),
    proximal=(10.0, 100.0),
)


def run(options: Options) -> Findings:
    """Choose rates and strengths on other permutations, then compare all methods."""
    settings = QUICK if options.quick else FULL if options.data is None else WHOLE_MNIST
    settings = replace(settings, seeds=options.seeds or settings.seeds)
    protocol, candidates = settings.protocol, settings.candidates()
    choice = choose(final_mean, candidates, protocol, settings.choosing_seeds, options)
    found = train(learn, (PLAIN, *choice.best(), ALONE), protocol, settings.seeds, options)
    return Findings(
        settings=asdict(settings) | {"data": str(options.data or "5,000 images")},
        results={
            "choice": choice.record(),
            "accuracy": {method.label: each for method, each in found.items()},
        },
        table=summary(found),
        figure=figure(found),
        claims=[] if options.quick else claims(found),
    )


# Learning: after each task the accuracies on all tasks so far, in percent


def learn(training: Training) -> list[list[float]]:
    """Learn all tasks; return after each the accuracies on those so far."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)  # for dropout, which draws from the global generator
        return learn_alone(training) if training.method == ALONE else learn_in_turn(training)


def learn_in_turn(training: Training) -> list[list[float]]:
    """Learn all tasks with one network."""
    method, tasks, accuracies = training.method, training.tasks(), []
    network = training.network()
    learner = Learner(with_dropout(network) if method.dropout else network, method, training.seed)
    for number, task in enumerate(tasks, start=1):
        images = task.images()
        if method.dropout:
            learn_until_worse(learner, images, tasks[:number], training.protocol.epochs)
        else:
            for _ in range(training.protocol.epochs):
                learner.epoch(images)
        learner.finish(images)
        accuracies.append([accuracy(learner.model, each.judged) for each in tasks[:number]])
    return accuracies


def learn_alone(training: Training) -> list[list[float]]:
    """Learn each task with a new network."""
    alone: list[float] = []
    for task in training.tasks():
        learner, images = Learner(training.network(), ALONE, training.seed), task.images()
        for _ in range(training.protocol.epochs):
            learner.epoch(images)
        alone.append(accuracy(learner.model, task.judged))
    return [alone[:number] for number in range(1, len(alone) + 1)]


def learn_until_worse(
    learner: Learner, images: mnist.Images, seen: Sequence[Task], epochs: int
) -> None:
    """Stop when the error over all seen tasks keeps above its lowest; return to where that was."""
    best, weights, worse = -1.0, {}, 0
    for _ in range(epochs):
        learner.epoch(images)
        reached = statistics.mean(accuracy(learner.model, task.validation) for task in seen)
        if reached > best:
            best, weights, worse = reached, deepcopy(learner.model.state_dict()), 0
        else:
            worse += 1
        if worse > PATIENCE:
            break
    learner.model.load_state_dict(weights)


def with_dropout(network: nn.Sequential) -> nn.Sequential:
    """Return the network, same weights, with dropout of its inputs and hidden units."""
    layers: list[nn.Module] = [nn.Dropout(DROPPED_INPUTS)]
    for layer in network:
        layers.append(layer)
        if isinstance(layer, nn.ReLU):
            layers.append(nn.Dropout(DROPPED_HIDDEN))
    return nn.Sequential(*layers)


def final_mean(training: Training) -> float:
    """Return the mean accuracy over the tasks after the last one."""
    return statistics.mean(learn(training)[-1])


# What was found: for each method and seed, the accuracies after each task on those so far

Found = Mapping[Method, Sequence[Sequence[Sequence[float]]]]


def means(seeds: Sequence[Sequence[Sequence[float]]]) -> np.ndarray[Any, Any]:
    """Return each seed's means over the tasks seen, (seeds, tasks)."""
    return np.array([[statistics.mean(seen) for seen in each] for each in seeds])


def summary(found: Found) -> str:
    """Return the table: mean accuracy over the tasks seen, after some of them and after all."""
    last = means(next(iter(found.values()))).shape[1]
    shown = sorted({1, 2, (last + 1) // 2, last})
    rows = [
        [
            method.label,
            *(mean_and_deviation(means(seeds)[:, number - 1].tolist()) for number in shown),
        ]
        for method, seeds in found.items()
    ]
    header = ["tasks seen", *map(str, shown)]
    return table("Test accuracy in percent, mean over the tasks seen", header, rows)


def claims(found: Found) -> list[Claim]:
    """Return what the paper's figure shows, and the target for EWC."""
    final = {method.name: float(means(seeds)[:, -1].mean()) for method, seeds in found.items()}
    ewc = final[GRADIENT.name]
    others = (PLAIN.name, DROPOUT.name, UNIFORM.name)
    return [
        Claim(f"EWC {ewc:.1f} >= {TARGET:g} after all tasks", ewc >= TARGET),
        *(Claim(f"EWC {ewc:.1f} > {name} {final[name]:.1f}", ewc > final[name]) for name in others),
    ]


def figure(found: Found) -> Figure:
    """Draw the mean accuracy over the tasks seen against their number, a curve a method."""
    drawn, grid = panels(1, 1, (8, 5))
    panel = grid[0, 0]
    for method, seeds in found.items():
        values = means(seeds)
        numbers = np.arange(1, values.shape[1] + 1)
        dashes = "--" if method == ALONE or method.mode == "proximal" else "-"
        label = method.name if method == ALONE else method.label
        colour = COLOURS[method.name]
        curve(panel, numbers, values, colour=colour, label=label, linestyle=dashes)
        panel.set_xticks(numbers)
    panel.set_ylim(0, 100)
    panel.set_ylabel("test accuracy, mean over the tasks seen (%)", color=INK)
    count = len(next(iter(found.values())))
    panel.set_xlabel(f"number of tasks learned in turn{over_seeds(count)}", color=INK)
    panel.set_title("Permuted MNIST: ten tasks, one network", color=INK)
    legend(drawn, panel, columns=3)
    return drawn

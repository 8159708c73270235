"""Which layers two tasks share: the overlap of their Fisher diagonals, layer by layer.

The question of figure 3C in Kirkpatrick et al. 2017: does a network that learned two tasks by EWC
use the same weights for both? Task A is MNIST; task B has the same digits with the pixels of a
central square permuted, 8 x 8 (similar) or 26 x 26 (dissimilar).

Protocol: six hidden layers of 100; Adam, which trains so deep a perceptron where plain SGD is slow
or diverges; A and then B under EWC, proximal. At the end both tasks' exact Fisher diagonals are
taken at the same parameters, those of the network that does both, and compared by
:func:`ewc_fast.fisher.fisher_overlap`: 1 - d^2 = sum sqrt(F_A F_B) at unit trace, weights and
biases of a layer together. (The results also hold the overlap with A's Fisher as EWC stored it, at
the parameters after A.) Two controls show the scale: two halves of A's images in one network, the
most that can be seen with so few; and two networks trained on A from other weights, which share
nothing but the task, as the units of hidden layers have no order of their own.

Expect: similar tasks overlap everywhere; dissimilar ones little in the first layers, which must see
other pixels, and more and more towards the output, whose task is the same.

lambda is chosen by the validation accuracy on both tasks, dissimilar ones, over seeds that are not
reported.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ewc_fast import EWC, fisher_diagonal
from ewc_fast.fisher import fisher_overlap
from ewc_fast.optim import Adam

from .shared import figures, mnist
from .shared.experiment import Claim, Findings, Options
from .shared.jobs import run_all
from .shared.mnist import CLASSES, Images, Mnist
from .shared.tables import mean_and_deviation, table
from .shared.training import accuracy, perceptron, train_epoch

SIDE = 28
SIMILAR, DISSIMILAR = "similar tasks", "dissimilar tasks"
HALVES, APART = "halves of one data set", "networks trained apart"
SQUARES = {SIMILAR: 8, DISSIMILAR: 26}
OTHER_SEEDS = 1000  # from here on: to choose lambda


@dataclass(frozen=True)
class Settings:
    """The network, its training, and how often."""

    hidden: int = 6
    width: int = 100
    lr: float = 0.001
    epochs: int = 20
    fisher_samples: int = 1000
    lambdas: tuple[float, ...] = (3e3, 3e4, 3e5)
    choosing_seeds: int = 2
    seeds: int = 5
    train: int = 3500

    @property
    def widths(self) -> list[int]:
        """Of all layers, input and output included."""
        return [SIDE**2, *[self.width] * self.hidden, CLASSES]


FULL = Settings()
QUICK = Settings(epochs=8, lambdas=(3e3, 3e4), choosing_seeds=1, seeds=1, fisher_samples=500)

Overlaps = dict[str, list[float]]
"""A comparison's name to the overlap of each layer, the first one first."""


@dataclass(frozen=True)
class Job:
    """One seed: of the permutations, the weights, and the order of images."""

    settings: Settings
    ewc_lambda: float
    seed: int


@dataclass(frozen=True)
class Found:
    """Of one seed: overlaps, and test accuracies on A and B at the end, in percent."""

    overlaps: Overlaps
    accuracies: Mapping[str, list[float]]


def run(options: Options) -> Findings:
    """Choose lambda, then measure every seed."""
    settings = QUICK if options.quick else FULL
    settings = replace(settings, seeds=options.seeds or settings.seeds)
    scores = _scores(settings, options.workers)
    ewc_lambda = max(scores, key=lambda tried: mean(scores[tried]))
    found = run_all(
        measure,
        [Job(settings, ewc_lambda, seed) for seed in range(settings.seeds)],
        workers=options.workers,
        description="Fisher overlap",
    )
    overlaps = {name: [one.overlaps[name] for one in found] for name in found[0].overlaps}
    accuracies = {name: [one.accuracies[name] for one in found] for name in found[0].accuracies}
    return Findings(
        settings=asdict(settings),
        results={
            "lambda": {"chosen": ewc_lambda, "scores": {f"{k:g}": v for k, v in scores.items()}},
            "overlaps": overlaps,
            "accuracies": accuracies,
        },
        table=_table(overlaps, accuracies),
        figure=_draw(settings, overlaps),
        claims=[] if options.quick else _claims(overlaps),
    )


# Training


def _scores(settings: Settings, workers: int | None) -> dict[float, list[float]]:
    """Return for each lambda the mean validation accuracy on both tasks, one for each seed."""
    jobs = [
        Job(settings, ewc_lambda, OTHER_SEEDS + seed)
        for ewc_lambda in settings.lambdas
        for seed in range(settings.choosing_seeds)
    ]
    found = run_all(score, jobs, workers=workers, description="choosing lambda")
    scores: dict[float, list[float]] = {}
    for job, one in zip(jobs, found, strict=True):
        scores.setdefault(job.ewc_lambda, []).append(one)
    return scores


def score(job: Job) -> float:
    """Return the mean validation accuracy on A and a dissimilar B, in percent."""
    images = _images(job.settings)
    model, stored = _learn_first(job, images)
    order = central_permutation(SQUARES[DISSIMILAR], job.seed)
    _learn_second(job, model, stored, _permuted(images.train, order))
    validation = images.validation
    return mean([accuracy(model, task) for task in (validation, _permuted(validation, order))])


def measure(job: Job) -> Found:
    """Train on A, then on each B from there, and on A once more from other weights."""
    settings, images = job.settings, _images(job.settings)
    first, stored = _learn_first(job, images)
    overlaps, accuracies = {}, {}
    for name, size in SQUARES.items():
        model, order = copy.deepcopy(first), central_permutation(size, job.seed)
        second = _permuted(images.train, order)
        _learn_second(job, model, stored, second)
        new = _fisher(model, second[: settings.fisher_samples])
        overlaps[name] = _by_layer(_fisher(model, images.train[: settings.fisher_samples]), new)
        overlaps[f"{name}, A's Fisher as stored"] = _by_layer(stored, new)
        tests = images.test, _permuted(images.test, order)
        accuracies[name] = [accuracy(model, test) for test in tests]
    half = min(settings.fisher_samples, len(images.train) // 2)
    overlaps[HALVES] = _by_layer(
        _fisher(first, images.train[:half]), _fisher(first, images.train[half : 2 * half])
    )
    other, of_other = _learn_first(replace(job, seed=job.seed + OTHER_SEEDS // 2), images)
    overlaps[APART] = _by_layer(stored, of_other)
    accuracies["A alone"] = [accuracy(model, images.test) for model in (first, other)]
    return Found(overlaps, accuracies)


def _learn_first(job: Job, images: Mnist) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a network that has learned A, and its Fisher diagonal."""
    settings = job.settings
    model = perceptron(settings.widths, job.seed)
    _train(job, model, images.train)
    return model, _fisher(model, images.train[: settings.fisher_samples])


def _learn_second(job: Job, model: nn.Module, fisher: Mapping[str, Tensor], task: Images) -> None:
    """Train a network that has learned A on B, under EWC."""
    ewc = EWC(model, ewc_lambda=job.ewc_lambda)
    ewc.consolidate_from(fisher)
    _train(job, model, task, ewc)


def _train(job: Job, model: nn.Module, task: Images, ewc: EWC | None = None) -> None:
    optimizer = Adam(model.parameters(), lr=job.settings.lr, ewc=ewc, mode="proximal")
    order = torch.Generator().manual_seed(job.seed)
    for _ in range(job.settings.epochs):
        train_epoch(model, optimizer, task, order)


def _fisher(model: nn.Module, images: Images) -> dict[str, Tensor]:
    return fisher_diagonal(model, [(images.pixels, images.digits)])


def _by_layer(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[float]:
    return [*fisher_overlap(first, second, group=lambda name: name.partition(".")[0]).values()]


def _images(settings: Settings) -> Mnist:
    return mnist.load(None).at_most(train=settings.train, test=1000)


def central_permutation(size: int, seed: int) -> Tensor:
    """Return an order of all pixels in which those of the central square are drawn at random."""
    pixels = np.arange(SIDE**2)
    margin = (SIDE - size) // 2
    inside = pixels.reshape(SIDE, SIDE)[margin : margin + size, margin : margin + size].ravel()
    pixels[inside] = np.random.default_rng(seed).permutation(inside)
    return torch.from_numpy(pixels)


def _permuted(images: Images, order: Tensor) -> Images:
    return Images(images.pixels[:, order], images.digits)


# What is shown

Seeds = Mapping[str, list[list[float]]]
"""A comparison's name to the overlaps of each seed, layer by layer."""

STYLES: dict[str, dict[str, Any]] = {
    SIMILAR: {"colour": figures.SKY, "marker": "o"},
    DISSIMILAR: {"colour": figures.BLUE, "marker": "s"},
    HALVES: {"colour": figures.GREY, "ls": ":", "marker": "^", "ms": 4},
    APART: {"colour": figures.VERMILION, "ls": "--", "marker": "v", "ms": 4},
}


def _table(overlaps: Seeds, accuracies: Seeds) -> str:
    layers = len(overlaps[SIMILAR][0])
    rows = [
        [name, *(mean_and_deviation([seed[layer] for seed in each], 2) for layer in range(layers))]
        for name, each in overlaps.items()
    ]
    reached = [
        f"Test accuracy on A and B after both, {name}: "
        + ", ".join(
            mean_and_deviation([seed[task] for seed in accuracies[name]]) for task in (0, 1)
        )
        for name in SQUARES
    ]
    header = ["layer", *(str(layer + 1) for layer in range(layers))]
    return "\n".join([table("Overlap of Fisher diagonals", header, rows), "", *reached])


def _draw(settings: Settings, overlaps: Seeds) -> Figure:
    figure, grid = figures.panels(1, 1, (7.0, 4.4))
    panel = grid[0, 0]
    layers = np.arange(1, len(settings.widths))
    for name, style in STYLES.items():
        size = f" (central {SQUARES[name]} x {SQUARES[name]})" if name in SQUARES else ""
        figures.curve(panel, layers, overlaps[name], label=name + size, **style)
    panel.set(ylim=(0, 1.03), xlabel="layer", ylabel="overlap of Fisher diagonals, $1 - d^2$")
    panel.set_xticks(layers, [*map(str, layers[:-1]), f"{layers[-1]}\n(output)"])
    panel.set_title(f"What two tasks share, by depth ({settings.seeds} seeds)")
    figures.legend(figure, panel, columns=2)
    return figure


def _claims(overlaps: Seeds) -> list[Claim]:
    similar, dissimilar, halves, apart = (
        np.array(overlaps[name]) for name in (SIMILAR, DISSIMILAR, HALVES, APART)
    )
    gap = similar[:, 0] - dissimilar[:, 0]
    rise = dissimilar[:, -2] - dissimilar[:, 0]
    return [
        Claim(
            "in the first layer, dissimilar tasks overlap less than similar ones, in every seed, "
            "and by more than two standard deviations on average",
            bool(gap.min() > 0 and gap.mean() > 2 * gap.std(ddof=1)),
        ),
        Claim(
            "the overlap of dissimilar tasks is larger in the last hidden layer than in the first, "
            "in every seed",
            bool(rise.min() > 0),
        ),
        Claim(
            "similar tasks overlap by more than 0.9 in every layer, on average",
            bool((similar.mean(axis=0) > 0.9).all()),
        ),
        Claim(
            "two halves of one data set overlap by more than 0.95 in every layer, on average",
            bool((halves.mean(axis=0) > 0.95).all()),
        ),
        Claim(
            "networks trained apart overlap less than one network's dissimilar tasks, on average, "
            "in every hidden layer but the first",
            bool((apart.mean(axis=0) < dissimilar.mean(axis=0))[1:].all()),
        ),
    ]

"""Which directions a network can bear noise in: does the Fisher diagonal know?

The question: is the inverse of the Fisher diagonal a fair picture of the posterior, as EWC takes it
to be? The supplement of Kirkpatrick et al. 2017 perturbs a trained network's weights with Gaussian
noise of several covariances and looks at how the score falls. There it is a deep Q-network, here a
perceptron on MNIST.

Protocol: train 784-100-100-10; take the exact Fisher diagonal F on the training images; add
s * sqrt(v) * N(0, 1) to all weights and biases, v being

    uniform                    1 everywhere
    inverse Fisher             1 / (F + damping)
    shuffled inverse Fisher    the same values, dealt out to the parameters at random
    null space                 1 where F = 0 exactly, 0 elsewhere
    less / more important half 1 where F is below / above its median, 0 elsewhere

each scaled to a mean of 1 over all parameters. So s is the root mean square of the noise, curves at
one s compare noise vectors of the same expected length, and what differs is where the noise goes.
For every network, s and v the test accuracy is the mean over several draws. The tolerance is where
it first falls below 80 %, log s interpolated.

Expect: noise shaped by the inverse Fisher is borne much longer than uniform noise of the same size,
and that is due to where it is large: shuffled, the advantage is gone. The null space is harmless
only for the images that F was taken on, and only to first order: other images light other pixels,
and units that were silent wake up.

The damping is chosen by the tolerance on validation images, on networks that are not reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from math import exp, log
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import SGD

from ewc_fast import fisher_diagonal

from .shared import figures, mnist
from .shared.experiment import Claim, Findings, Options
from .shared.jobs import run_all
from .shared.mnist import CLASSES, Images
from .shared.tables import mean_and_deviation, table
from .shared.training import accuracy, perceptron, train_epoch

OTHER_SEEDS = 1000  # from here on: to choose the damping


@dataclass(frozen=True)
class Settings:
    """The network, its training, and what is tried on it."""

    width: int = 100
    lr: float = 0.2
    epochs: int = 40
    sizes: tuple[float, ...] = tuple(float(f"{0.01 * 10 ** (n / 8):.3g}") for n in range(19))
    draws: int = 5
    dampings: tuple[float, ...] = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
    choosing_seeds: int = 2
    seeds: int = 5
    least: float = 80.0  # percent: the tolerance is where the accuracy falls below


FULL = Settings()
QUICK = Settings(
    epochs=8, sizes=FULL.sizes[::2], draws=3, dampings=(1e-6, 1e-4), choosing_seeds=1, seeds=2
)

UNIFORM, INVERSE, SHUFFLED = "uniform", "inverse Fisher", "shuffled inverse Fisher"
NULL, LESS, MORE = "null space", "less important half", "more important half"
NULL_SEEN = "null space, on the images of F"


def variances(fisher: Tensor, damping: float, draw: torch.Generator) -> dict[str, Tensor]:
    """Return each kind's variances for a flat Fisher diagonal, in its shape: their mean is 1."""
    inverse = 1 / (fisher + damping)
    more = fisher > fisher.median()
    kinds = {
        UNIFORM: torch.ones_like(fisher),
        INVERSE: inverse,
        SHUFFLED: inverse[torch.randperm(len(inverse), generator=draw)],
        NULL: (fisher == 0).to(fisher),
        LESS: (~more).to(fisher),
        MORE: more.to(fisher),
    }
    return {kind: v / v.mean() for kind, v in kinds.items()}


@dataclass(frozen=True)
class Start:
    """A network to be trained: its weights and the order of images are drawn from the seed."""

    settings: Settings
    seed: int


@dataclass(frozen=True)
class Job:
    """One network, and the damping of the inverse."""

    start: Start
    damping: float


@dataclass(frozen=True)
class Found:
    """Of one network: accuracies in percent at each size of the noise, by its kind."""

    curves: Mapping[str, list[float]]
    unperturbed: float
    null: float  # share of parameters whose Fisher is 0


def run(options: Options) -> Findings:
    """Choose the damping, then perturb every network in every way."""
    settings = QUICK if options.quick else FULL
    settings = replace(settings, seeds=options.seeds or settings.seeds)
    scores = _scores(settings, options.workers)
    damping = max(scores, key=lambda tried: mean(scores[tried]))
    found = run_all(
        perturb,
        [Job(Start(settings, seed), damping) for seed in range(settings.seeds)],
        workers=options.workers,
        description="perturbing",
    )
    curves = {kind: [one.curves[kind] for one in found] for kind in found[0].curves}
    tolerances = {
        kind: [tolerance(settings, curve) for curve in seeds] for kind, seeds in curves.items()
    }
    return Findings(
        settings=asdict(settings),
        results={
            "damping": {"chosen": damping, "tolerances": {f"{k:g}": v for k, v in scores.items()}},
            "accuracy": curves,
            "tolerance": tolerances,
            "unperturbed": [one.unperturbed for one in found],
            "share of F = 0": [one.null for one in found],
        },
        table=_table(damping, found, tolerances),
        figure=_draw(settings, curves),
        claims=[] if options.quick else _claims(tolerances),
    )


def _scores(settings: Settings, workers: int | None) -> dict[float, list[float]]:
    """Return for each damping the tolerance on validation images, one for each network."""
    starts = [Start(settings, OTHER_SEEDS + seed) for seed in range(settings.choosing_seeds)]
    found = run_all(try_dampings, starts, workers=workers, description="choosing the damping")
    return {damping: [one[damping] for one in found] for damping in settings.dampings}


def try_dampings(start: Start) -> dict[float, float]:
    """Return the tolerance to inverse-Fisher noise on validation images, for each damping."""
    network = Network(start)
    curves = {
        damping: network.curve(network.variances(damping)[INVERSE], network.images.validation)
        for damping in start.settings.dampings
    }
    return {damping: tolerance(start.settings, curve) for damping, curve in curves.items()}


def perturb(job: Job) -> Found:
    """Return one network's test accuracies under all kinds of noise."""
    network = Network(job.start)
    test, kinds = network.images.test, network.variances(job.damping)
    curves = {kind: network.curve(variances, test) for kind, variances in kinds.items()}
    curves[NULL_SEEN] = network.curve(kinds[NULL], network.images.train)
    null = (network.fisher == 0).double().mean().item()
    return Found(curves, accuracy(network.model, test), null)


class Network:
    """A trained network, its Fisher diagonal as one vector, and its noise."""

    def __init__(self, start: Start) -> None:
        self.images = mnist.load(None)
        self._settings = settings = start.settings
        self._draw = torch.Generator().manual_seed(start.seed)
        train = self.images.train
        self.model = perceptron(
            [train.pixels.shape[1], settings.width, settings.width, CLASSES], start.seed
        )
        optimizer = SGD(self.model.parameters(), lr=settings.lr)
        for _ in range(settings.epochs):
            train_epoch(self.model, optimizer, train, self._draw)
        fisher = fisher_diagonal(self.model, [(train.pixels, train.digits)])
        self.fisher = torch.cat([values.flatten() for values in fisher.values()])

    def variances(self, damping: float) -> dict[str, Tensor]:
        """Return those of each kind."""
        return variances(self.fisher, damping, self._draw)

    @torch.no_grad()
    def curve(self, variances: Tensor, images: Images) -> list[float]:
        """Return the mean accuracy over draws of this noise, at each of its sizes."""
        parameters = [*self.model.parameters()]
        learned, deviation = parameters_to_vector(parameters), variances.sqrt()
        accuracies = []
        for size in self._settings.sizes:
            each = []
            for _ in range(self._settings.draws):
                noise = torch.randn(len(learned), generator=self._draw) * deviation
                vector_to_parameters(learned + size * noise, parameters)
                each.append(accuracy(self.model, images))
            accuracies.append(mean(each))
        vector_to_parameters(learned, parameters)
        return accuracies


def tolerance(settings: Settings, curve: Sequence[float]) -> float:
    """Return the size of noise at which the accuracy first falls below ``settings.least``.

    Between two sizes log size is interpolated; the largest or smallest tried where it never falls,
    or is below from the first on.
    """
    points = [*zip(map(log, settings.sizes), curve, strict=True)]
    if curve[0] < settings.least:
        return settings.sizes[0]
    for (before, high), (after, low) in pairwise(points):
        if low < settings.least:
            return exp(before + (after - before) * (high - settings.least) / (high - low))
    return settings.sizes[-1]


# What is shown

STYLES: dict[str, dict[str, Any]] = {
    MORE: {"colour": figures.PURPLE, "marker": "v"},
    UNIFORM: {"colour": figures.INK, "marker": "o"},
    SHUFFLED: {"colour": figures.ORANGE, "marker": "x"},
    LESS: {"colour": figures.GREEN, "marker": "^"},
    INVERSE: {"colour": figures.BLUE, "marker": "s"},
    NULL: {"colour": figures.VERMILION, "marker": "D"},
    NULL_SEEN: {"colour": figures.VERMILION, "ls": ":"},
}


def _table(damping: float, found: Sequence[Found], tolerances: Mapping[str, list[float]]) -> str:
    title = (
        "Root mean square of the noise at which the accuracy falls below 80 %\n"
        f"(damping {damping:g}; without noise "
        f"{mean_and_deviation([one.unperturbed for one in found])} %; "
        f"F is 0 for {mean(one.null for one in found):.0%} of the parameters)"
    )
    rows = [[kind, mean_and_deviation(tolerances[kind], 3)] for kind in STYLES]
    return table(title, ["noise", "tolerance"], rows)


def _draw(settings: Settings, curves: Mapping[str, list[list[float]]]) -> Figure:
    figure, grid = figures.panels(1, 1, (7.5, 4.8))
    panel = grid[0, 0]
    for kind, style in STYLES.items():
        figures.curve(panel, settings.sizes, curves[kind], label=kind, ms=4, **style)
    panel.axhline(settings.least, color=figures.GREY, lw=0.8, ls="--")
    panel.set(xscale="log", ylim=(0, 100), ylabel="accuracy (%)")
    panel.set_xlabel("root mean square of the noise over all parameters")
    panel.set_title(f"Where a network bears noise ({settings.seeds} networks)")
    figures.legend(figure, panel, columns=3)
    return figure


def _claims(tolerances: Mapping[str, list[float]]) -> list[Claim]:
    mean_of = {kind: mean(each) for kind, each in tolerances.items()}
    return [
        Claim(
            "inverse-Fisher noise is borne at twice the size of uniform noise and more",
            mean_of[INVERSE] > 2 * mean_of[UNIFORM],
        ),
        Claim(
            "shuffled inverse-Fisher noise is borne no better than uniform noise, within 10 %",
            mean_of[SHUFFLED] < 1.1 * mean_of[UNIFORM],
        ),
        Claim(
            "the more important half bears less noise than all parameters together, the less "
            "important half more, in every network",
            all(
                more < uniform < less
                for more, uniform, less in zip(
                    tolerances[MORE], tolerances[UNIFORM], tolerances[LESS], strict=True
                )
            ),
        ),
        Claim(
            "noise in the null space is borne better on the images that F was taken on than on "
            "others, in every network",
            all(
                seen > unseen
                for seen, unseen in zip(tolerances[NULL_SEEN], tolerances[NULL], strict=True)
            ),
        ),
    ]

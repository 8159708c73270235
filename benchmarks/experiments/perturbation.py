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
    inverse Fisher, F > 0      the same where F > 0, and 0 elsewhere
    null space                 1 where F = 0 exactly, 0 elsewhere
    less / more important half 1 where F is below / above its median, 0 elsewhere

each scaled to a mean of 1 over all parameters. So s is the root mean square of the noise, curves at
one s compare noise vectors of the same expected length, and what differs is where the noise goes.
For every network, s and v the test accuracy is the mean over several draws, the same for all v. The
tolerance is the s where it first falls below 80 %, log s interpolated.

No damping is the best one: it leads from uniform noise (large) towards the null space (small), and
the right panel shows the way. The curves are those of 1e-6, for which nothing was tuned.

Expect: noise shaped by the inverse Fisher is borne much longer than uniform noise of the same size,
and that is due to where it is large: shuffled, the advantage is gone. The null space bears most,
but is harmless to first order only: large noise there wakes units that were silent, on the very
images that F was taken on as well; networks without such units bear any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from math import exp, log
from statistics import mean, median
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


@dataclass(frozen=True)
class Settings:
    """The network, its training, and what is tried on it."""

    width: int = 100
    lr: float = 0.2
    epochs: int = 40
    sizes: tuple[float, ...] = tuple(float(f"{0.01 * 10 ** (n / 8):.3g}") for n in range(19))
    draws: int = 5
    damping: float = 1e-6
    dampings: tuple[float, ...] = tuple(10.0**n for n in range(-9, 1))  # of the right panel
    seeds: int = 5
    least: float = 80.0  # percent: the tolerance is where the accuracy falls below


FULL = Settings()
QUICK = Settings(epochs=8, sizes=FULL.sizes[::3], draws=2, dampings=(1e-6, 1e-3), seeds=1)

UNIFORM, INVERSE, SHUFFLED = "uniform", "inverse Fisher", "shuffled inverse Fisher"
NULL, LESS, MORE = "null space", "less important half", "more important half"
NULL_SEEN = "null space, on the images of F"
POSITIVE = "inverse Fisher, F > 0"


def variances(fisher: Tensor, damping: float, draw: torch.Generator) -> dict[str, Tensor]:
    """Return each kind's variances for a flat Fisher diagonal, in its shape: their mean is 1."""
    inverse = 1 / (fisher + damping)
    more = fisher > fisher.median()
    kinds = {
        UNIFORM: torch.ones_like(fisher),
        INVERSE: inverse,
        SHUFFLED: inverse[torch.randperm(len(inverse), generator=draw)],
        POSITIVE: inverse * (fisher > 0),
        NULL: (fisher == 0).to(fisher),
        LESS: (~more).to(fisher),
        MORE: more.to(fisher),
    }
    return {kind: v / v.mean() for kind, v in kinds.items()}


@dataclass(frozen=True)
class Job:
    """A network to be trained: its weights, the order of images and the noise are by the seed."""

    settings: Settings
    seed: int


@dataclass(frozen=True)
class Found:
    """Of one network: accuracies in percent at each size of the noise, by its kind."""

    curves: Mapping[str, list[float]]
    dampings: Mapping[float, list[float]]  # the inverse Fisher's, with each damping
    unperturbed: float
    null: float  # share of parameters whose Fisher is 0


def run(options: Options) -> Findings:
    """Perturb every network in every way."""
    settings = QUICK if options.quick else FULL
    settings = replace(settings, seeds=options.seeds or settings.seeds)
    jobs = [Job(settings, seed) for seed in range(settings.seeds)]
    found = run_all(perturb, jobs, workers=options.workers, description="perturbing")
    curves = {kind: [one.curves[kind] for one in found] for kind in STYLES}
    tolerances = {
        kind: [tolerance(settings, curve) for curve in seeds] for kind, seeds in curves.items()
    }
    dampings = {
        damping: [tolerance(settings, one.dampings[damping]) for one in found]
        for damping in settings.dampings
    }
    return Findings(
        settings=asdict(settings),
        results={
            "accuracy": curves,
            "tolerance": tolerances,
            "tolerance by damping": {f"{damping:g}": each for damping, each in dampings.items()},
            "unperturbed": [one.unperturbed for one in found],
            "share of F = 0": [one.null for one in found],
        },
        table=_table(settings, found, tolerances),
        figure=_draw(settings, curves, tolerances, dampings),
        claims=[] if options.quick else _claims(tolerances),
    )


def perturb(job: Job) -> Found:
    """Return one network's test accuracies under all kinds of noise."""
    network, settings = Network(job), job.settings
    test, kinds = network.images.test, network.variances(settings.damping)
    curves = {kind: network.curve(variances, test) for kind, variances in kinds.items()}
    curves[NULL_SEEN] = network.curve(kinds[NULL], network.images.train)
    dampings = {
        damping: network.curve(network.variances(damping)[INVERSE], test)
        for damping in settings.dampings
    }
    null = (network.fisher == 0).double().mean().item()
    return Found(curves, dampings, accuracy(network.model, test), null)


class Network:
    """A trained network, its Fisher diagonal as one vector, and its noise."""

    def __init__(self, job: Job) -> None:
        self.images = mnist.load(None)
        self._settings = settings = job.settings
        self._seed = job.seed
        train = self.images.train
        self.model = perceptron(
            [train.pixels.shape[1], settings.width, settings.width, CLASSES], job.seed
        )
        optimizer = SGD(self.model.parameters(), lr=settings.lr)
        order = torch.Generator().manual_seed(job.seed)
        for _ in range(settings.epochs):
            train_epoch(self.model, optimizer, train, order)
        fisher = fisher_diagonal(self.model, [(train.pixels, train.digits)])
        self.fisher = torch.cat([values.flatten() for values in fisher.values()])

    def variances(self, damping: float) -> dict[str, Tensor]:
        """Return those of each kind."""
        return variances(self.fisher, damping, torch.Generator().manual_seed(self._seed))

    @torch.no_grad()
    def curve(self, variances: Tensor, images: Images) -> list[float]:
        """Return the mean accuracy over draws of this noise, at each of its sizes."""
        parameters = [*self.model.parameters()]
        learned, deviation = parameters_to_vector(parameters), variances.sqrt()
        draw, accuracies = torch.Generator().manual_seed(self._seed), []
        for size in self._settings.sizes:
            each = []
            for _ in range(self._settings.draws):
                noise = torch.randn(len(learned), generator=draw) * deviation
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
    POSITIVE: {"colour": figures.SKY, "marker": "s"},
    INVERSE: {"colour": figures.BLUE, "marker": "s"},
    NULL: {"colour": figures.VERMILION, "marker": "D"},
    NULL_SEEN: {"colour": figures.VERMILION, "ls": ":"},
}


def _table(
    settings: Settings, found: Sequence[Found], tolerances: Mapping[str, list[float]]
) -> str:
    title = (
        f"Root mean square of the noise at which the accuracy falls below {settings.least:g} %\n"
        f"(without noise {mean_and_deviation([one.unperturbed for one in found])} %; F is 0 for "
        f"{mean(one.null for one in found):.0%} of the parameters;\n"
        f"{settings.sizes[-1]:g}, the largest tried, where it never does)"
    )
    rows = [
        [kind, mean_and_deviation(each, 3), " ".join(f"{one:.3f}" for one in each)]
        for kind, each in tolerances.items()
    ]
    return table(title, ["noise", "tolerance", "of each network"], rows)


def _draw(
    settings: Settings,
    curves: Mapping[str, list[list[float]]],
    tolerances: Mapping[str, list[float]],
    dampings: Mapping[float, list[float]],
) -> Figure:
    figure, grid = figures.panels(1, 2, (11.5, 5.0), width_ratios=[3, 2])
    left, right = grid[0]
    for kind, style in STYLES.items():
        figures.curve(left, settings.sizes, curves[kind], label=kind, ms=4, **style)
    left.axhline(settings.least, color=figures.GREY, lw=0.8, ls="--")
    left.set(xscale="log", ylim=(0, 101), ylabel="accuracy (%)")
    left.set_xlabel("root mean square of the noise over all parameters")
    left.set_title(f"Where a network bears noise ({settings.seeds} networks)")
    by_network = [list(each) for each in zip(*dampings.values(), strict=True)]
    figures.curve(right, [*dampings], by_network, label=INVERSE, ms=4, **STYLES[INVERSE])
    for kind in (UNIFORM, NULL):
        right.axhline(median(tolerances[kind]), color=STYLES[kind]["colour"], lw=1, ls="--")
        right.annotate(kind, (1, median(tolerances[kind])), xytext=(0, 4), ha="right",
                       textcoords="offset points", color=STYLES[kind]["colour"])  # fmt: skip
    right.axvline(settings.damping, color=figures.GREY, lw=0.8, ls=":")
    right.set_ylim(settings.sizes[0], 1.2 * settings.sizes[-1])  # first: equal values have no range
    right.set(xscale="log", yscale="log", xlabel="damping of the inverse Fisher")
    right.set_title(f"Noise borne, to {settings.least:g} %")
    figures.legend(figure, left, columns=4)
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
            "not only due to the null space: where F > 0 alone, inverse-Fisher noise is borne "
            "better than uniform noise, in every network",
            all(
                positive > uniform
                for positive, uniform in zip(tolerances[POSITIVE], tolerances[UNIFORM], strict=True)
            ),
        ),
    ]

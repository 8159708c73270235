r"""A language model learns a second domain: what it still knows of the first.

Question: a small GPT over bytes has learned Python's documentation (English prose). It then learns
the standard library's code, and sees no prose any more. How much of the prose does it forget, with
and without EWC, in its full weights and in low-rank adapters?

Protocol. Both domains come with Python (:mod:`.text`), split by whole topics and modules. The
Fisher information is per sequence, as Kirkpatrick et al. 2017 have it per image,

.. math:: F_i = E_{x, \, y \sim p(\cdot \mid x)}
    \Big( \frac{\partial}{\partial \theta_i} \sum_t \log p(y_{t+1} \mid x_{\le t}) \Big)^2,

its labels drawn from the model. It grows with a sequence's length while the loss is a mean over
bytes, so lambda is smaller by that length than with a Fisher per byte. From the same first model,
by AdamW:

    fine-tuning              the second domain alone: the lower line
    uniform L2               EWC with 1 for every Fisher entry
    EWC, gradient            the penalty's gradient goes through AdamW's moments
    EWC, proximal            the penalty's exact step after AdamW's own
    LoRA                     adapters for the blocks' linear layers; all else is frozen
    LoRA with EWC            the same with lambda/2 sum F (s B A)^2: the base model's Fisher alone
    both domains together    as many sequences of the first as of the second: the upper line

Lambda is chosen for each method on a seed of its own and on validation text: the least geometric
mean of the two perplexities. What is reported is the other seeds', on test text.

What to expect: fine-tuning forgets; every method that holds something trades prose for code, and
what tells methods apart is where their curves of all lambdas lie, the figure's right side.

References: Kirkpatrick et al. 2017, https://doi.org/10.1073/pnas.1611835114; Hu et al. 2022 (LoRA),
https://arxiv.org/abs/2106.09685; Xiang et al. 2023 (EWC on LoRA's product),
https://arxiv.org/abs/2305.10626.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..shared.experiment import Findings, Options
from ..shared.jobs import run_all
from . import report
from .training import (
    GRADIENT,
    HELD_LORA,
    METHODS,
    PROXIMAL,
    UNIFORM,
    First,
    Learned,
    Second,
    Settings,
    learn_first,
    learn_second,
)

CHOOSING_SEED = 100  # not among those reported

FULL = Settings(
    width=96,
    blocks=3,
    heads=4,
    length=96,
    batch=8,
    first_steps=1000,
    first_lr=2e-3,
    second_steps=200,
    second_lr=1e-3,
    adapters_rank=8,
    adapters_scaling=2.0,
    adapters_lr=3e-3,
    fisher_sequences=512,
    tested_sequences=160,
    points=4,
    seeds=3,
    grids={
        UNIFORM: (0.03, 0.1, 0.3),
        GRADIENT: (0.1, 0.3, 1.0),
        PROXIMAL: (30.0, 100.0, 300.0),
        HELD_LORA: (0.1, 0.3, 1.0),
    },
)
QUICK = replace(
    FULL,
    width=64,
    blocks=2,
    first_steps=200,
    second_steps=40,
    fisher_sequences=64,
    tested_sequences=64,
    points=2,
    seeds=1,
    grids={UNIFORM: (0.1,), GRADIENT: (0.3,), PROXIMAL: (100.0,), HELD_LORA: (0.3,)},
)


def run(options: Options) -> Findings:
    """Train the first models, choose each lambda, train the second domain by every method."""
    settings = QUICK if options.quick else FULL
    seeds = list(range(options.seeds or settings.seeds))
    choosing, *learned = run_all(
        learn_first,
        [First(settings, seed) for seed in (CHOOSING_SEED, *seeds)],
        workers=options.workers,
        description="first domain",
    )
    tried = _try(settings, choosing, options)
    chosen = {method: _best(scores) for method, scores in tried.items()}
    curves = _report_on(settings, learned, chosen, options)
    study = report.Study(settings, learned, tried, chosen, curves)
    return report.findings(study, claims=() if options.quick else report.claims(study))


def _try(settings: Settings, learned: Learned, options: Options) -> report.Tried:
    jobs = [
        Second(settings, learned, method, ewc_lambda, "validation", points=1)
        for method in METHODS
        for ewc_lambda in settings.grids.get(method, (0.0,))
    ]
    ends = run_all(learn_second, jobs, workers=options.workers, description="choosing lambda")
    tried: dict[str, dict[float, tuple[float, float]]] = {method: {} for method in METHODS}
    for job, curve in zip(jobs, ends, strict=True):
        tried[job.method][job.ewc_lambda] = curve[-1]
    return tried


def _best(scores: Mapping[float, tuple[float, float]]) -> float:
    """Return the lambda with the least product of perplexities, hence geometric mean."""
    return min(scores, key=lambda ewc_lambda: math.prod(scores[ewc_lambda]))


def _report_on(
    settings: Settings, learned: Sequence[Learned], chosen: Mapping[str, float], options: Options
) -> report.Curves:
    jobs = [
        Second(settings, each, method, chosen[method], "test", settings.points)
        for method in METHODS
        for each in learned
    ]
    curves = run_all(learn_second, jobs, workers=options.workers, description="second domain")
    count = len(learned)
    return {
        method: curves[number * count : (number + 1) * count]
        for number, method in enumerate(METHODS)
    }

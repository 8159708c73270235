"""The vectors that each estimator sends backward from the outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ewc_fast import _checks
from ewc_fast.fisher.likelihoods import NAMED, Likelihood

MOST_EXACT_PASSES = 1000


def vectors_of(
    likelihood: str | Likelihood,
    estimator: str,
    draws: int,
    generator: torch.Generator | None,
) -> Callable[[Tensor, Tensor | None], Iterable[Tensor]]:
    """Return the function from outputs and targets to the vectors to send backward.

    The squares of their gradients, summed over the vectors, are the estimate for each sample.
    """
    if isinstance(likelihood, str):
        _checks.one_of("likelihood", likelihood, tuple(NAMED))
        likelihood = NAMED[likelihood]
    known: Any = likelihood

    def exact(outputs: Tensor, targets: Tensor | None) -> Iterable[Tensor]:
        if not hasattr(known, "directions"):
            raise ValueError(
                "estimator: 'exact' needs a likelihood with directions(outputs), got "
                f"{type(known).__name__}; use estimator='sampled'"
            )
        if known.count(outputs) > MOST_EXACT_PASSES:
            raise ValueError(
                f"estimator: 'exact' would take {known.count(outputs):,} backward passes, more "
                f"than {MOST_EXACT_PASSES:,}; use estimator='sampled' (unbiased for it) or "
                "'empirical'"
            )
        directions: Iterable[Tensor] = known.directions(outputs)
        return directions

    def sampled(outputs: Tensor, targets: Tensor | None) -> Iterable[Tensor]:
        for _ in range(draws):
            yield _score(known, outputs, known.sample(outputs, generator)) / math.sqrt(draws)

    def empirical(outputs: Tensor, targets: Tensor | None) -> Iterable[Tensor]:
        if targets is None:
            raise ValueError(
                "estimator: 'empirical' needs targets, got batches without; yield (inputs, "
                "targets), or use estimator='exact' or 'sampled'"
            )
        yield _score(known, outputs, targets)

    return {"exact": exact, "sampled": sampled, "empirical": empirical}[estimator]


def _score(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return d log p / d outputs, each sample's own."""
    leaf = outputs.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(likelihood.log_prob(leaf, targets).sum(), leaf)
    return gradient


class Scores:
    batched = False

    def __init__(self, likelihood, estimator, draws=1, generator=None):
        self._v = vectors_of(likelihood, estimator, draws, generator)
        self._e, self._d, self._k = estimator, draws, likelihood

    def vectors(self, outputs, batch):
        return self._v(outputs.detach(), batch.targets)

    def count(self, outputs, batch):
        if self._e == "exact":
            return NAMED[self._k].count(outputs)
        return self._d if self._e == "sampled" else 1

    def samples(self, outputs, batch):
        return float(batch.size)

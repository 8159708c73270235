"""The vectors that each estimator sends backward from the outputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from ewc_fast import _checks
from ewc_fast.fisher.batches import Batch
from ewc_fast.fisher.likelihoods import NAMED, Known, Likelihood, Own
from ewc_fast.fisher.likelihoods.base import MOST_EXACT_PASSES, per_entry

Estimator = Literal["exact", "sampled", "rademacher", "empirical", "batched"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)
DRAWING = ("sampled", "rademacher")
NEEDS = {
    "exact": ("directions",),
    "sampled": ("log_prob", "sample"),
    "rademacher": ("directions",),
    "empirical": ("log_prob",),
    "batched": ("log_prob",),
}
ARGUMENTS = {
    "directions": "outputs",
    "log_prob": "outputs, targets",
    "sample": "outputs, generator",
}


class Scores:
    r"""What an estimator makes of a batch's outputs.

    With vectors :math:`v_k`, one row for each sample n, and the Jacobian :math:`J_n` of a sample's
    outputs, the batch's sum is :math:`\sum_k \sum_n (J_n^\top v_{kn})^2`; the estimate is the sum
    over batches divided by the sum of :meth:`samples`. A sample's weight is in its rows already, as
    :math:`\sqrt{w_n}`:

    ============  ========================================================  ====================
    estimator     vectors                                                   number of them
    ============  ========================================================  ====================
    exact         directions, :math:`\sum_k v_k v_k^\top = M`               count of them
    sampled       scores of drawn labels, over the root of ``draws``        ``draws``
    rademacher    directions with random signs, summed; over the same root  ``draws``
    empirical     the score of the data's labels                            1, or tokens
    batched       the same over the batch's weight: a mean's gradient       1
    ============  ========================================================  ====================

    With ``batched`` the gradient of the whole batch is squared, :math:`(\sum_n J_n^\top v_n)^2`,
    and each batch counts for one.

    Labels that the data leaves out (an ignored class index) are left out of every estimator.
    Computed in float32 or float64 and rounded once, to the outputs' dtype.
    """

    def __init__(
        self,
        likelihood: str | Likelihood,
        estimator: str,
        draws: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        _checks.one_of("estimator", estimator, ESTIMATORS)
        _checks.positive_integer("draws", draws)
        if draws != 1 and estimator not in DRAWING:
            raise ValueError(
                f"draws: only estimator='sampled' and 'rademacher' draw, got {draws} with "
                f"{estimator!r}"
            )
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator: expected a torch.Generator, got {type(generator).__name__}"
            )
        self._known = _known(likelihood, estimator)
        self._estimator, self._draws, self._generator = estimator, draws, generator
        self.batched = estimator == "batched"

    def vectors(self, outputs: Tensor, batch: Batch) -> Iterable[Tensor]:
        """Yield the vectors, each of the outputs' shape and dtype; errors are raised at once."""
        outputs = outputs.detach()
        known, observed = self._on(outputs, batch)
        if self._estimator == "exact":
            _check_passes(known.count(outputs))
        if self._estimator in DRAWING:
            self._check_generator(outputs.device)
        if self._estimator in ("empirical", "batched"):
            if batch.targets is None:
                raise ValueError(
                    f"estimator: {self._estimator!r} needs targets, got batches without; yield "
                    "(inputs, targets), or use estimator='exact' or 'sampled'"
                )
            score = known.score(outputs, batch.targets)
            raw = iter([score]) if self.batched else known.parts(score, observed)
        else:
            raw = self._from_the_model(known, outputs)
        return _finished(raw, outputs, observed, self._scale(known, observed, batch))

    def count(self, outputs: Tensor, batch: Batch) -> int:
        """Return how many vectors there will be."""
        known, observed = self._on(outputs, batch)
        if self._estimator == "exact":
            return known.count(outputs)
        return known.part_count(observed) if self._estimator == "empirical" else self._draws

    def samples(self, outputs: Tensor, batch: Batch) -> float:
        """Return what the batch counts for in the mean: samples, their weights, or tokens."""
        total = float(_counted(*self._on(outputs, batch), batch).sum())
        return float(total > 0) if self.batched else total

    def _on(self, outputs: Tensor, batch: Batch) -> tuple[Known, Tensor | None]:
        """Return the likelihood on this batch, and which of its outputs count."""
        if not outputs.is_floating_point():
            raise TypeError(
                f"outputs: expected floating-point numbers from the model, got {outputs.dtype}; "
                "pass forward=lambda model, inputs: ... to return the logits or means"
            )
        known = self._known.for_batch(batch)
        return known, known.observed(outputs.detach(), batch.targets)

    def _from_the_model(self, known: Known, outputs: Tensor) -> Iterator[Tensor]:
        if self._estimator == "exact":
            yield from known.directions(outputs)
            return
        draw = known.drawn_score if self._estimator == "sampled" else known.random_direction
        for _ in range(self._draws):
            yield draw(outputs, self._generator)

    def _scale(self, known: Known, observed: Tensor | None, batch: Batch) -> Tensor | None:
        """Return the factor of each sample's rows, (N,) in float64."""
        if self.batched:
            counted = _counted(known, observed, batch).sum()
            weights = torch.ones_like(counted) if batch.weights is None else batch.weights.double()
            return (weights / counted).nan_to_num(0.0).expand(batch.size)
        if batch.weights is not None:
            return (batch.weights.double() / self._draws).sqrt()
        if self._draws == 1:
            return None
        return torch.full((batch.size,), 1 / math.sqrt(self._draws), dtype=torch.float64)

    def _check_generator(self, device: torch.device) -> None:
        if self._generator is not None and self._generator.device.type != device.type:
            raise ValueError(
                f"generator: expected one on the model's device, {device.type!r}, got one on "
                f"{self._generator.device.type!r}; build it as torch.Generator({str(device)!r})"
            )


def _known(likelihood: str | Likelihood, estimator: str) -> Known:
    """Return the library's likelihood of that name, or the user's own if it has what is needed."""
    if isinstance(likelihood, str):
        _checks.one_of("likelihood", likelihood, tuple(NAMED))
        return NAMED[likelihood]
    if isinstance(likelihood, type):
        raise TypeError(
            f"likelihood: expected a name or an object, got the class {likelihood.__name__}; "
            f"write {likelihood.__name__}()"
        )
    if isinstance(likelihood, Known):
        return likelihood
    for method in NEEDS[estimator]:
        if not callable(getattr(likelihood, method, None)):
            other = "; use estimator='sampled'" if method == "directions" else ""
            raise TypeError(
                f"likelihood: estimator {estimator!r} needs a name or an object with "
                f"{method}({ARGUMENTS[method]}), got {type(likelihood).__name__}{other}"
            )
    return Own(likelihood)


def _check_passes(count: int) -> None:
    if count > MOST_EXACT_PASSES:
        raise ValueError(
            f"estimator: 'exact' would take {count:,} backward passes, more than "
            f"{MOST_EXACT_PASSES:,}; use estimator='sampled' or 'rademacher' (one a draw, unbiased "
            "for it), or 'empirical'"
        )


def _counted(known: Known, observed: Tensor | None, batch: Batch) -> Tensor:
    """Return what each entry of the batch counts for in the mean, (N,) in float64."""
    each = known.per_sample(observed)
    counted = torch.ones(batch.size, dtype=torch.float64) if each is None else each.double()
    return counted if batch.weights is None else counted.to(batch.weights.device) * batch.weights


def _finished(
    raw: Iterable[Tensor], outputs: Tensor, observed: Tensor | None, scale: Tensor | None
) -> Iterator[Tensor]:
    """Yield vectors masked, scaled and rounded to the outputs' dtype."""
    some_left_out = observed is not None and not observed.all()
    for vector in raw:
        if observed is not None and some_left_out:
            vector = vector.masked_fill(~observed, 0)
        if scale is not None:
            vector = vector * per_entry(scale.to(vector), vector)
        yield vector.to(outputs.dtype)

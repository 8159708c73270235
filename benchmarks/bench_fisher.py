"""Fisher diagonals of a multilayer perceptron, beside one forward and backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from fisher_case import ESTIMATORS, SEED, Diagonal, Estimator, FisherCase
from fisher_rivals import rivals
from harness import Provider, Result, measure, script

from ewc_fast import fisher_diagonal

EWC_FAST = "ewc_fast"
FORWARD_AND_BACKWARD = "forward and backward"


@dataclass(frozen=True)
class Case:
    """A network, its data, how long to time it, and whether slow implementations take part."""

    widths: tuple[int, ...]
    batch_size: int
    batches: int
    seconds: float
    slow: bool

    def __str__(self) -> str:
        layers = "-".join(map(str, self.widths))
        return f"{layers}, {self.batches} x {self.batch_size}"


M1 = (784, 400, 400, 10)
FULL = (
    Case(M1, batch_size=256, batches=1, seconds=6, slow=True),
    # Checks that ewc_fast makes on the first batch weigh less where there are more.
    Case(M1, batch_size=256, batches=4, seconds=3, slow=False),
)
QUICK = (Case((784, 100, 10), batch_size=32, batches=1, seconds=0.5, slow=True),)


def suite(quick: bool) -> Result:
    """Measure all estimators on all cases."""
    result = Result()
    for case in QUICK if quick else FULL:
        at = FisherCase(case.widths, case.batch_size, case.batches)
        for estimator in ESTIMATORS:
            competing = providers(at, estimator, slow=case.slow)
            timings = measure(competing, seconds=case.seconds)
            result.add(f"{estimator}, {case}", timings, (FORWARD_AND_BACKWARD,))
    return result


def providers(case: FisherCase, estimator: Estimator, *, slow: bool) -> dict[str, Provider]:
    """Return what competes on a case."""

    def ours() -> Diagonal:
        draw = torch.Generator().manual_seed(SEED) if estimator == "sampled" else None
        return fisher_diagonal(case.model, case.batches, estimator=estimator, generator=draw)

    calls = {EWC_FAST: ours, **rivals(case, estimator, slow=slow)}
    found = {
        name: Provider(call, partial(case.check, call, estimator)) for name, call in calls.items()
    }
    found[FORWARD_AND_BACKWARD] = Provider(case.forward_and_backward, lambda: None)
    return found


if __name__ == "__main__":
    script(suite)

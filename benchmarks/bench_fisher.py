"""Fisher diagonals of the models M1 to M7, beside one forward and backward pass.

``bench_fisher_peers.py`` measures the peers, which takes most of an hour.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

from fisher_calls import EWC_FAST, FORWARD_AND_BACKWARD, competing
from fisher_case import ESTIMATORS, Estimator, FisherCase
from fisher_memory import beyond_forward_and_backward
from fisher_models import FULL as FULL_MODELS
from fisher_models import QUICK as QUICK_MODELS
from fisher_table import RIGHT, table
from harness import Provider, Result, allocator_settings, measure, script

MEMORY_OF: tuple[Estimator, ...] = ("exact", "empirical")  # drawing labels takes none to speak of
SEVERAL = 8  # batches a call: what is checked once a call weighs less


@dataclass(frozen=True)
class Case:
    """A model by name, an estimator, the number of batches, and how long to time them."""

    model: str
    estimator: Estimator
    batches: int
    seconds: float
    quick: bool = False

    @property
    def alone(self) -> bool:
        """Whether ewc_fast alone is measured: the others' time grows with the batches."""
        return self.batches > 1

    def __str__(self) -> str:
        workload = (QUICK_MODELS if self.quick else FULL_MODELS)[self.model]
        return f"{self.estimator}, {workload.title}, {self.batches} x {workload.batch_size}"


def cases(quick: bool, only: Collection[str] = ()) -> list[Case]:
    """Return every model with every estimator, over one batch and over several."""
    models = QUICK_MODELS if quick else FULL_MODELS
    return [
        Case(name, estimator, batches, seconds=0.05 if quick else 4, quick=quick)
        for name, workload in models.items()
        if not only or name in only
        for estimator in ESTIMATORS
        if estimator != "exact" or workload.exact
        for batches in (1, SEVERAL)
        if (estimator, batches) != ("sampled", SEVERAL)  # each batch would draw other labels
    ]


FULL = cases(quick=False)


def suite(quick: bool, only: Collection[str] = (), *, peers: bool = False) -> Result:
    """Measure ewc_fast on all cases or those of some models; with peers, over one batch."""
    result = Result()
    # Memory is measured under settings of its own: once is enough.
    keeps = allocator_settings(os.environ).keys() & {"MALLOC_MMAP_THRESHOLD_"}
    for case in cases(quick, only):
        if peers and case.alone:
            continue
        timings = measure(providers(case, alone=not peers), seconds=case.seconds)
        result.add(str(case), timings, (FORWARD_AND_BACKWARD,))
        rows = {row["provider"]: row for row in result.rows if row["case"] == str(case)}
        for row in rows.values():
            row |= {"model": case.model, "estimator": case.estimator, "batches": case.batches}
            row["correctness"] = RIGHT
        measured = case.estimator in MEMORY_OF and (not quick or case.model == "M1")
        if measured and not (peers or case.alone or keeps):
            extra = beyond_forward_and_backward(case.model, case.estimator, [EWC_FAST], quick=quick)
            for name, amount in extra.items():
                rows[name]["memory_beyond_in_fishers"] = amount
    return result


def providers(case: Case, *, alone: bool = False) -> dict[str, Provider]:
    """Return what competes on a case."""
    workload = (QUICK_MODELS if case.quick else FULL_MODELS)[case.model]
    at = FisherCase(workload, workload.batch_size, case.batches)
    calls = competing(at, case.estimator, (EWC_FAST,) if alone or case.alone else None)
    found = {
        name: Provider(call, partial(at.check, call, case.estimator))
        for name, call in calls.items()
    }
    found[FORWARD_AND_BACKWARD] = Provider(at.forward_and_backward, lambda: None)
    return found


if __name__ == "__main__":
    script(suite, parts=tuple(FULL_MODELS), show=table)

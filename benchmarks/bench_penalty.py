"""The penalty's gradient and value: ewc_fast, what others do, and the memory's floor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from floor import Floor
from harness import Claim, Provider, Result, Timings, measure, script
from layouts import layout
from penalty_case import (
    EWC_LAMBDA,
    RIVAL_VALUE_TOLERANCE,
    VALUE_TOLERANCE,
    PenaltyCase,
    Wanted,
)
from penalty_rivals import autograd_loop, in_place, in_place_with_value

from ewc_fast import functional

AUTOGRAD = "autograd loop, 1 task"
AUTOGRAD_TEN = "autograd loop, 10 tasks"
WITH_VALUE = "PyTorch in place with value: "
WITHOUT_VALUE = "PyTorch in place, no value: "
BEST_WITH_VALUE = "best PyTorch in place with value"
BEST_WITHOUT_VALUE = "best PyTorch in place, no value"
FUNCTIONAL = "ewc_fast functional with a Plan"
EWC_ONE = "ewc_fast EWC, 1 task"
EWC_TEN = "ewc_fast EWC, 10 merged tasks"
FLOOR = "floor"

KEEP_TASKS_BELOW = 20_000_000  # ten tasks of 1e8 parameters would take 8 GB


@dataclass(frozen=True)
class Case:
    """A layout of parameters, how long to time it, and in turns of how many calls."""

    layout: str
    elements: int
    seconds: float
    calls: int = 1

    def __str__(self) -> str:
        return f"{self.layout} {self.elements:.0e}".replace("e+0", "e")


FULL = (
    Case("list", 100_000, 20, calls=5),
    Case("list", 10_000_000, 25),
    Case("list", 100_000_000, 30),
    Case("flat", 10_000_000, 15),
)
QUICK = (
    Case("list", 100_000, 1, calls=5),
    Case("list", 1_000_000, 2, calls=5),
    Case("flat", 1_000_000, 1, calls=5),
)


def suite(quick: bool) -> Result:
    """Measure all cases; hold the numbers against what was promised."""
    result = Result()
    for case in QUICK if quick else FULL:
        timings = measure(providers(case), seconds=case.seconds, calls=case.calls)
        result.add(str(case), timings, (FLOOR, EWC_ONE))
        result.rows += _best_rows(case, timings)
        result.claims += _claims(case, timings)
    return result


def providers(case: Case) -> dict[str, Provider]:
    """Return what competes on a case; all work on the same parameters and gradients."""
    at = PenaltyCase(
        layout(case.layout, case.elements), keep_tasks=case.elements < KEEP_TASKS_BELOW
    )
    one, ten = at.wanted_of_one, at.wanted_of_ten
    first, lists = at.first_task, (at.grads, at.values)
    state = first.fisher, first.anchor

    def provider(
        call: Callable[[], object],
        wanted: Wanted = one,
        value_tolerance: float | None = VALUE_TOLERANCE,
    ) -> Provider:
        return Provider(call, partial(at.check, call, wanted, value_tolerance))

    found = {AUTOGRAD: provider(autograd_loop(at.params, [first]), one, RIVAL_VALUE_TOLERANCE)}
    if at.tasks:
        loop = autograd_loop(at.params, at.tasks)
        found[AUTOGRAD_TEN] = provider(loop, ten, RIVAL_VALUE_TOLERANCE)
    for name, call in in_place_with_value(*lists, first).items():
        found[WITH_VALUE + name] = provider(call, one, RIVAL_VALUE_TOLERANCE)
    for name, call in in_place(*lists, first).items():
        found[WITHOUT_VALUE + name] = provider(call, one, None)
    add_penalty_grad_ = partial(
        functional.add_penalty_grad_,
        *lists,
        *state,
        ewc_lambda=EWC_LAMBDA,
        plan=functional.Plan(),
    )
    found[FUNCTIONAL] = provider(add_penalty_grad_)
    found[EWC_ONE] = provider(at.one_task.add_penalty_grad_)
    found[EWC_TEN] = provider(at.ten_tasks.add_penalty_grad_, ten)
    found[FLOOR] = provider(Floor(*lists, *state, ewc_lambda=EWC_LAMBDA), one, None)
    return found


def _best_rows(case: Case, timings: Timings) -> list[dict[str, Any]]:
    """Return the fastest of those written by hand once more, under a name that can be looked up."""
    rows = {row["provider"]: row for row in timings.rows(str(case), (FLOOR, EWC_ONE))}
    return [
        rows[_best(timings, kind)] | {"provider": name, "is": _best(timings, kind)}
        for kind, name in ((WITH_VALUE, BEST_WITH_VALUE), (WITHOUT_VALUE, BEST_WITHOUT_VALUE))
    ]


def _best(timings: Timings, kind: str) -> str:
    return timings.fastest(name for name in timings.seconds if name.startswith(kind))


def _claims(case: Case, timings: Timings) -> list[Claim]:
    """Return what is promised for lists of tensors, from a caller's point of view."""
    if case.layout == "flat":
        return []
    if case.elements <= 100_000:
        return [
            Claim(f"{case}: microseconds a call, {name}", 1e6 * timings.median(name), 60, False)
            for name in (FUNCTIONAL, EWC_ONE)
        ]
    over_autograd = 5 if case.elements >= 100_000_000 else 8
    best = _best(timings, WITH_VALUE)
    return [
        Claim(
            f"{case}: speed over the {AUTOGRAD}", timings.ratio(AUTOGRAD, EWC_ONE), over_autograd
        ),
        Claim(f"{case}: speed over {best}", timings.ratio(best, EWC_ONE), 2),
        Claim(f"{case}: bandwidth as a part of the floor", timings.ratio(FLOOR, EWC_ONE), 0.9),
        Claim(f"{case}: time after 10 tasks over 1", timings.ratio(EWC_TEN, EWC_ONE), 1.05, False),
    ]


if __name__ == "__main__":
    script(suite)

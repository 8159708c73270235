"""The comparison in words: a table for the terminal, and whether the paper's order held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ewc_fast.demo.permuted import PLAIN_EWC, PLAIN_SGD, TASKS, UNIFORM_L2, Method, Results

IN_ORDER = (PLAIN_SGD, UNIFORM_L2, PLAIN_EWC)
"""The methods of the verdict, worst first."""

_NAME, _COLUMN = 13, 7  # widths in characters


@dataclass(frozen=True)
class Verdict:
    """Whether SGD < L2 < EWC held, and in which words."""

    held: bool
    text: str


def verdict(results: Results) -> Verdict:
    """Compare the methods' mean accuracies at the end, each with the one before."""
    means = [float(results.final(method).mean()) for method in IN_ORDER]
    margins = [better - worse for worse, better in pairwise(means)]
    asked = results.protocol.margin
    held = all(margin > asked for margin in margins)  # NaN is not
    claim = " < ".join(f"{m.name} {mean:.1f}" for m, mean in zip(IN_ORDER, means, strict=True))
    if asked:
        claim += f", each by more than {asked:g} points"
    steps = " and ".join(f"{margin:.1f}" for margin in margins)
    return Verdict(held, f"{claim}: {'holds' if held else 'DOES NOT HOLD'} (by {steps})")


def table(results: Results) -> str:
    """Return every method's accuracy on the tasks learned so far, after each task."""
    title = "Test accuracy in percent"
    if results.seeds > 1:
        title += f", mean of {results.seeds} seeds, at the end with their standard deviation"
    reached = range(1, len(TASKS) + 1)
    after = [f"after {TASKS[n - 1]}".rjust(_COLUMN * n) for n in reached]
    names = ["".join(f"{task:>{_COLUMN}}" for task in TASKS[:n]) for n in reached]
    lines = [_line("", after, "mean of"), _line("", names, ", ".join(TASKS))]
    lines += [_row(results, method) for method in results.protocol.methods]
    return "\n".join([title, "", *lines])


def _row(results: Results, method: Method) -> str:
    after = []
    for task in range(len(TASKS)):
        known = results.after_task(method, task)[:, : task + 1].mean(axis=0)
        after.append("".join(f"{accuracy:{_COLUMN}.1f}" for accuracy in known))
    final = results.final(method)
    spread = f" +- {final.std(ddof=1):.1f}" if results.seeds > 1 else ""
    return _line(method.name, after, f"{final.mean():.1f}{spread}")


def _line(name: str, groups: Sequence[str], last: str) -> str:
    return "   ".join([f"{name:<{_NAME}}", *groups, last]).rstrip()

"""Which parameters were recorded, which went one sample at a time, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

RECORDED = "recorded"
NO_GRADIENT = "no gradient"


@dataclass(frozen=True)
class FisherReport:
    """How the squares of each parameter were taken.

    ``ways`` maps names to ``"recorded"`` (squared on the way back, at the cost of a backward
    pass), ``"no gradient"`` (the outputs don't depend on it: its Fisher is 0), or the reason why
    it took one sample at a time: exact too, but slow.
    """

    ways: Mapping[str, str] = field(default_factory=dict)

    @property
    def slow(self) -> dict[str, str]:
        """The parameters that took one sample at a time, and why."""
        return {name: way for name, way in self.ways.items() if way not in (RECORDED, NO_GRADIENT)}

    def __str__(self) -> str:
        """Return one line."""
        ways = list(self.ways.values())
        line = f"{ways.count(RECORDED)} of {len(ways)} parameters recorded"
        if NO_GRADIENT in ways:
            line += f", {ways.count(NO_GRADIENT)} without gradient"
        reasons: dict[str, list[str]] = {}
        for name, reason in self.slow.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            line += f"; one sample at a time: {', '.join(names)} ({reason})"
        return line


class FisherDiagonal(dict[str, Tensor]):
    """A parameter's name to its Fisher diagonal; ``report`` says how each was found."""

    report: FisherReport = FisherReport()

"""Times implementations side by side, each checked first, and records where that was done."""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class MismatchError(AssertionError):
    """An implementation's result differs from the reference."""


@dataclass(frozen=True)
class Provider:
    """One implementation: the call to time, and a check that raises MismatchError or passes."""

    call: Callable[[], object]
    check: Callable[[], None]


@dataclass(frozen=True)
class Timings:
    """Seconds of each provider, round by round; those refused are not timed."""

    seconds: Mapping[str, Sequence[float]]
    first_calls: Mapping[str, Sequence[float]]
    refused: Mapping[str, str] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Return the median time in seconds."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, to: str) -> float:
        """Return the median over rounds of one provider's time in units of another's.

        Both were taken in the same round, so that what changes the machine's speed in the course
        of the run cancels.
        """
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        return statistics.median(mine / other for mine, other in pairs)

    def fastest(self, names: Iterable[str]) -> str:
        """Return the one with the smallest median; what was refused does not compete."""
        return min((name for name in names if name in self.seconds), key=self.median)

    def rows(self, case: str, baselines: Sequence[str]) -> list[dict[str, Any]]:
        """Return one row for each provider, with its ratios to the baselines."""
        rows = []
        for name, seconds in self.seconds.items():
            q20, _, _, q80 = statistics.quantiles(seconds, n=5)
            rows.append(
                {
                    "case": case,
                    "provider": name,
                    "median": statistics.median(seconds),
                    "q20": q20,
                    "q80": q80,
                    "first_call": statistics.median(self.first_calls[name]),
                    "rounds": len(seconds),
                    "ratios": {to: self.ratio(name, to) for to in baselines},
                }
            )
        return rows


def measure(
    providers: Mapping[str, Provider], *, seconds: float, calls: int = 1, least_rounds: int = 5
) -> Timings:
    """Check every provider, then time them in rounds, each has its turn once, until time is up.

    The order is drawn anew for every round: with a fixed one, even rotated, each would always
    inherit the caches and the heap of the same neighbour. A turn is ``calls`` calls and their
    median; the first is kept apart, for it finds the caches as the neighbour left them, which for
    operands that fit the caches makes a large difference. The checks run again at the end, since a
    race between threads may pass once.
    """
    refusals = {name: _refusal(provider) for name, provider in providers.items()}
    refused = {name: why for name, why in refusals.items() if why is not None}
    order = [name for name in providers if name not in refused]
    for name in order:
        providers[name].call()
    turns: dict[str, list[list[float]]] = {name: [] for name in order}
    draw, begin, rounds = random.Random(0), perf_counter(), 0
    while rounds < least_rounds or perf_counter() - begin < seconds:
        draw.shuffle(order)
        for name in order:
            turns[name].append([_seconds(providers[name].call) for _ in range(calls)])
        rounds += 1
    for name in order:
        providers[name].check()
    return Timings(
        {name: [statistics.median(turn) for turn in turns[name]] for name in turns},
        {name: [turn[0] for turn in turns[name]] for name in turns},
        refused,
    )


def _refusal(provider: Provider) -> str | None:
    try:
        provider.check()
    except MismatchError as mismatch:
        return str(mismatch)
    return None


def _seconds(call: Callable[[], object]) -> float:
    started = perf_counter()
    call()
    return perf_counter() - started


@dataclass(frozen=True)
class Claim:
    """A number that was promised, and the one that was measured."""

    text: str
    measured: float
    bound: float
    at_least: bool = True

    @property
    def holds(self) -> bool:
        """Whether the measured number keeps the promise."""
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        verdict = "PASS" if self.holds else "FAIL"
        return f"{verdict}  {self.text}: {self.measured:.3g} (promised {sign} {self.bound:g})"


@dataclass
class Result:
    """What one suite measured."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def add(self, case: str, timings: Timings, baselines: Sequence[str]) -> None:
        """Add a case's rows."""
        self.rows += timings.rows(case, baselines)
        self.refused |= {f"{case}: {name}": why for name, why in timings.refused.items()}

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        claims = [asdict(claim) | {"holds": claim.holds} for claim in self.claims]
        return {"rows": self.rows, "claims": claims, "refused": self.refused}

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            ratios = "  ".join(f"{ratio:8.3f} of {to}" for to, ratio in row["ratios"].items())
            spread = f"({1e3 * row['q20']:.4g} to {1e3 * row['q80']:.4g}, {row['rounds']} rounds)"
            lines.append(
                f"{row['case']:20} {row['provider']:54} {1e3 * row['median']:9.4g} ms "
                f"{spread:34} {ratios}"
            )
        lines += [f"REFUSED  {name}: {why}" for name, why in self.refused.items()]
        return "\n".join(lines + [str(claim) for claim in self.claims])


def script(
    suite: Callable[..., Result],
    *,
    parts: Sequence[str] = (),
    show: Callable[[Result], str] | None = None,
) -> None:
    """Run a suite from the command line; of one with named parts, perhaps only some."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="small sizes, short times")
    parser.add_argument("--json", type=Path, help="write the result to this file as well")
    if parts:
        parser.add_argument("--only", nargs="+", choices=parts, default=(), help="these alone")
    options = parser.parse_args()
    result = suite(options.quick, options.only) if parts else suite(options.quick)
    print(result)
    if show is not None:
        print(show(result))
    if options.json:
        options.json.write_text(json.dumps(result.as_json()))


def allocator_settings(variables: Mapping[str, str]) -> dict[str, str]:
    """Return those environment variables that change how memory is had or threads wait."""
    chosen = re.compile(r"MALLOC_|GLIBC_TUNABLES$|LD_PRELOAD$|OMP_|KMP_|GOMP_|THP_")
    return {name: value for name, value in variables.items() if chosen.match(name)}

"""What an experiment is told, what it finds, and what is kept of that."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ewc_fast.environment import environment

if TYPE_CHECKING:  # the command line lists the experiments where matplotlib may be missing
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Experiment:
    """A name, what it shows, and which options it takes beyond the common ones."""

    name: str
    summary: str
    takes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """How to run one: what its command line says."""

    out: Path
    quick: bool = False
    seeds: int | None = None  # the experiment's own number
    workers: int | None = None  # one for each core
    data: Path | None = None  # a folder with the whole MNIST's IDX files
    suite: str = "minatar"  # of games


@dataclass(frozen=True)
class Claim:
    """A sentence that the numbers bear out, or don't."""

    text: str
    holds: bool

    def __str__(self) -> str:
        return f"{'holds' if self.holds else 'DOES NOT HOLD'}: {self.text}"


@dataclass(frozen=True)
class Findings:
    """What an experiment found: plain values for the record, words and a picture for people."""

    settings: Mapping[str, Any]
    results: Mapping[str, Any]
    table: str
    figure: Figure
    claims: Sequence[Claim] = ()


def conduct(name: str, run: Callable[[Options], Findings], options: Options) -> bool:
    """Run it, print table and claims, write ``NAME.json`` and ``NAME.png``; tell if all held."""
    options.out.mkdir(parents=True, exist_ok=True)  # before the long part, which would be lost
    where, begin = environment(), perf_counter()
    findings = run(options)
    record = {
        "experiment": name,
        "quick": options.quick,
        "settings": findings.settings,
        "results": findings.results,
        "claims": {claim.text: claim.holds for claim in findings.claims},
        "seconds": round(perf_counter() - begin, 1),
        "environment": where,
    }
    kept, picture = (options.out / f"{name}.{kind}" for kind in ("json", "png"))
    kept.write_text(json.dumps(record, indent=1) + "\n")
    findings.figure.savefig(picture, dpi=160)
    print("\n".join([findings.table, "", *map(str, findings.claims)]))
    print(f"Record: {kept}\nFigure: {picture}")
    return all(claim.holds for claim in findings.claims)

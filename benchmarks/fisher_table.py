"""The Fisher benchmark's results as a table: one line a model and estimator."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fisher_calls import EWC_FAST, FORWARD_AND_BACKWARD
from harness import Result

RIGHT = "right"


def table(result: Result) -> str:
    """Return a Markdown table of times, verdicts and memory.

    ``1.9 (+0.5)``: right, 1.9 times a plain forward and backward pass over the same data, and at
    its peak 0.5 times the Fisher's own size beyond that pass's.
    """
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in result.rows:
        if row["provider"] == FORWARD_AND_BACKWARD:
            continue
        line = lines.setdefault((_without_batches(row["case"]), row["estimator"]), {})
        line[_column(row["provider"], row["batches"])] = _cell(row)
    for named, why in result.refused.items():
        case, _, provider = named.rpartition(": ")
        key = (_without_batches(case), case.split(", ")[0])
        batches = int(case.rpartition(", ")[2].partition(" x ")[0])
        lines.setdefault(key, {})[_column(provider, batches)] = _short(why)
    columns = list(dict.fromkeys(name for line in lines.values() for name in line))
    columns.sort(key=lambda name: not name.startswith(EWC_FAST))
    return "\n".join(
        [
            "| case | " + " | ".join(columns) + " |",
            "|---|" + "---|" * len(columns),
            *(
                f"| {case} | " + " | ".join(line.get(name, "") for name in columns) + " |"
                for (case, _), line in lines.items()
            ),
        ]
    )


def lines(records: Sequence[Mapping[str, Any]], origin: str) -> str:
    """Return the README's table: ewc_fast and the fastest peer whose result is right.

    Of several records, oldest first, each row's latest counts: ratios are to a forward and backward
    pass in the same process.
    """
    latest = {
        (row["model"], row["estimator"], row["batches"], row["provider"]): row
        for record in records
        for run in record["runs"]
        if run["suite"] in ("fisher", "fisher_peers") and run["allocator"] == "default"
        for row in run["rows"]
        if "model" in row
    }
    found = [
        "| model and batch | estimator | fastest right peer | **ewc_fast**, one batch | "
        "**ewc_fast**, eight batches | peak memory beyond |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for (model, estimator, batches, provider), one in latest.items():
        several = latest.get((model, estimator, 8, provider))
        if provider != EWC_FAST or batches != 1 or several is None:
            continue
        peers = [
            row
            for (of, kind, _, name), row in latest.items()
            if (of, kind) == (model, estimator) and name not in (EWC_FAST, FORWARD_AND_BACKWARD)
        ]
        best = min(peers, key=_ratio, default=None)
        title, batch = _title(one["case"])
        memory = one.get("memory_beyond_in_fishers")
        cells = [
            f"{title}, {batch}",
            estimator,
            "not timed" if best is None else f"{_ratio(best):.2f} ({best['provider']})",
            f"{_ratio(one):.2f}",
            f"{_ratio(several):.2f}",
            "" if memory is None else f"{memory:+.2f} F",
        ]
        found.append(f"| {' | '.join(cells)} |")
    unit = "In units of one plain forward and backward pass over the same data; F: the size of the"
    return "\n".join([*found, "", f"{unit} Fisher itself. {origin}"])


def _title(case: str) -> tuple[str, str]:
    """Return what ``empirical, CNN 32-64-128, 1 x 128`` says of the model and of the batch."""
    title, _, batches = case.partition(", ")[2].rpartition(", ")
    return title, f"batch {batches.partition(' x ')[2]}"


def _ratio(row: Mapping[str, Any]) -> float:
    return float(row["ratios"][FORWARD_AND_BACKWARD])


def _column(provider: str, batches: int) -> str:
    if provider != EWC_FAST:
        return provider
    return f"{provider}, {'one batch' if batches == 1 else f'{batches} batches'}"


def _cell(row: dict[str, Any]) -> str:
    ratio = row["ratios"][FORWARD_AND_BACKWARD]
    extra = row.get("memory_beyond_in_fishers")
    return f"{row['correctness']}, {ratio:.2f}" + ("" if extra is None else f" ({extra:+.1f})")


def _short(why: str) -> str:
    """Return ``wrong by 0.7``, ``missing parameters: 2 of 20`` or ``error: TypeError``."""
    kept = re.match(r"wrong by \S+|missing parameters: \d+ of \d+|error: \w+", why)
    return kept[0] if kept else why


def _without_batches(case: str) -> str:
    return case.rpartition(", ")[0]

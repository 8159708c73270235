"""Turns the newest results into the tables of README.md, each between two markers.

``python benchmarks/report.py`` writes it, ``--check`` only tells whether it is up to date.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bench_penalty as penalty
import fisher_table
import gpu_table
from run import GPU_SUITES

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- benchmark table: python benchmarks/report.py -->"
END = "<!-- end of benchmark table -->"
FISHER_BEGIN = "<!-- table of the Fisher: python benchmarks/report.py -->"
FISHER_END = "<!-- end of the table of the Fisher -->"
GPU_BEGIN = "<!-- table of the GPU: python benchmarks/report.py -->"
GPU_END = "<!-- end of the table of the GPU -->"

Row = Mapping[str, Any]
Rows = dict[tuple[str, str], Row]  # by case and provider


def main() -> int:
    """Write the table into the README, or compare it with the one there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if the README is out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    old = options.readme.read_text()
    penalties, fishers = (of_suite(options.results, suite) for suite in ("penalty", "fisher"))
    if not penalties or not fishers:
        raise SystemExit(f"results missing in {options.results}: run python benchmarks/run.py")
    new = with_table(old, table(penalties[-1]))
    peers = of_suite(options.results, "fisher_peers")
    lines = fisher_table.lines([*peers, *fishers], _origin(*fishers))
    new = with_table(new, lines, FISHER_BEGIN, FISHER_END)
    gpu = {suite: of_suite(options.results, suite)[-1:] for suite in GPU_SUITES}
    new = with_table(new, gpu_table.lines(gpu), GPU_BEGIN, GPU_END)
    if not options.check:
        options.readme.write_text(new)
    elif new != old:
        print(f"{options.readme} is out of date: run python benchmarks/report.py")
        return 1
    return 0


def of_suite(folder: Path, suite: str) -> list[dict[str, Any]]:
    """Return the results of full runs of a suite, oldest first."""
    records = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    found = [
        record
        for record in records
        if not record["quick"]
        and any(run["suite"] == suite and _is_current(run) for run in record["runs"])
    ]
    return sorted(found, key=lambda record: str(record["environment"]["date"]))


def _is_current(run: Mapping[str, Any]) -> bool:
    """Whether a run's rows have the form of today's: the Fisher's did not always name models.

    The GPU's must have some.
    """
    if run["suite"] in GPU_SUITES:
        return bool(run["rows"])  # none, where a suite was stopped or failed
    return not run["suite"].startswith("fisher") or all("model" in row for row in run["rows"])


def with_table(readme: str, lines: str, begin: str = BEGIN, end: str = END) -> str:
    """Return the README with what is between two markers replaced."""
    if readme.count(begin) != 1 or readme.count(end) != 1:
        raise SystemExit(f"expected one {begin!r} and one {end!r} in the README")
    before, rest = readme.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n{lines}\n{end}{after}"


def table(record: Mapping[str, Any]) -> str:
    """Return the table and the lines under it."""
    default, keeps = _rows(record, "default"), _rows(record, "keeps")
    cases = [str(case) for case in penalty.FULL if case.layout == "list"]
    powers = [f"{case.elements:.0e}"[-1] for case in penalty.FULL if case.layout == "list"]
    lines = [
        "| penalty's gradient and value, float32 in 161 tensors | "
        + " | ".join(f"10<sup>{power}</sup> parameters" for power in powers)
        + " |",
        "|---|" + "---:|" * len(cases),
    ]
    contents: list[tuple[str, Callable[[str], str]]] = [
        ("autograd loop, 1 task", _times(default, penalty.AUTOGRAD)),
        ("the same, allocator keeps freed memory", _times(keeps, penalty.AUTOGRAD)),
        ("autograd loop, 10 tasks", _times(default, penalty.AUTOGRAD_TEN)),
        ("best of five in-place versions in PyTorch", _times(default, penalty.BEST_WITH_VALUE)),
        ("**ewc_fast**, 1 task", _times(default, penalty.EWC_ONE)),
        ("**ewc_fast**, 10 merged tasks", _times(default, penalty.EWC_TEN)),
        ("its bandwidth beside a bare C loop's, 1 task", _bandwidth(default)),
    ]
    lines += [
        f"| {text} | " + " | ".join(cell(case) for case in cases) + " |" for text, cell in contents
    ]
    ratios = "Ratios are to ewc_fast with 1 task in the same round."
    return "\n".join([*lines, "", f"{_origin(record)} {ratios}"])


def _rows(record: Mapping[str, Any], allocator: str) -> Rows:
    return {
        (row["case"], row["provider"]): row
        for run in record["runs"]
        if run["allocator"] == allocator
        for row in run["rows"]
    }


def _times(rows: Rows, provider: str) -> Callable[[str], str]:
    """Return the cell of a case: the time, and how many times that of ewc_fast it is."""

    def cell(case: str) -> str:
        row = rows.get((case, provider))
        if row is None:
            return "not measured"
        ratio = row["ratios"][penalty.EWC_ONE]
        relative = "" if provider == penalty.EWC_ONE else f" ({_short(ratio)}x)"
        return _duration(row["median"]) + relative

    return cell


def _bandwidth(rows: Rows) -> Callable[[str], str]:
    return lambda case: f"{1 / rows[case, penalty.EWC_ONE]['ratios'][penalty.FLOOR]:.0%}"


def _origin(*records: Mapping[str, Any]) -> str:
    """Return where numbers come from; of several records, with every commit."""
    newest = records[-1]["environment"]
    found = [record["environment"] for record in records]
    commits = dict.fromkeys(f"{at['commit']}{' with changes' * at['dirty']}" for at in found)
    return (
        f"{newest['cpu']}, {newest['threads']} threads, {newest['vector_level']}; PyTorch "
        f"{newest['torch']}, ewc_fast {newest['ewc_fast']} at {' and '.join(commits)}, "
        f"{newest['date'][:10]}. Medians. [How it was measured](benchmarks/README.md)."
    )


def _duration(seconds: float) -> str:
    unit, factor = ("µs", 1e6) if seconds < 1e-3 else ("ms", 1e3) if seconds < 1 else ("s", 1)
    return f"{_short(seconds * factor)} {unit}"


def _short(number: float) -> str:
    return f"{number:.2g}" if number < 100 else f"{number:,.0f}"


if __name__ == "__main__":
    sys.exit(main())

"""The README's table of what was measured on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench_gpu_optimizer import ALONE
from gpu_operations_case import CUDA, TRITON
from gpu_product_case import AUTO, GRADIENT
from gpu_timing import OURS

NOT_RUN = (
    "No GPU has run these kernels yet: they compile, and their arithmetic is checked on CPUs. "
    "`bash benchmarks/gpu_check.sh` measures them where there is one."
)
PLAIN = "forward and backward"
LIKE_A_MODEL = 10**8

Record = Mapping[str, Any]
Row = Mapping[str, Any]


def lines(latest: Mapping[str, Sequence[Record]]) -> str:
    """Return the table of each suite's latest record, or that there is none."""
    found = [line for suite, records in latest.items() for line in _of_suite(suite, records)]
    if not found:
        return NOT_RUN
    head = ["| on a GPU | measured | beside |", "|---|---:|---|"]
    origins = dict.fromkeys(origin(r) for records in latest.values() for r in records)
    return "\n".join([*head, *found, "", " ".join(origins)])


def _of_suite(suite: str, records: Sequence[Record]) -> Iterator[str]:
    line = {
        "gpu_operations": _operation,
        "gpu_optimizer": _step,
        "gpu_products": _product,
        "gpu_fisher": _fisher,
    }[suite]
    for record in records:
        for run in record["runs"]:
            if run["suite"] == suite:
                yield from filter(None, map(line, run["rows"]))


def _operation(row: Row) -> str | None:
    kernels, large = row["provider"] in (CUDA, TRITON), row["elements"] >= LIKE_A_MODEL
    if kernels and row["layout"] == "tiny" and "host_seconds" in row:
        found, beside = f"{1e6 * row['host_seconds']:.3g} µs", "host time of one call"
    elif kernels and large and row["params"] == row["fisher"]:
        found, beside = f"{row['share_of_copy']:.0%}", "of the copy's bandwidth"
    else:
        return None
    return f"| {row['case']}, {_backend(row)} | {found} | {beside} |"


def _step(row: Row) -> str | None:
    if row["provider"] not in (CUDA, TRITON) or row["elements"] < LIKE_A_MODEL:
        return None
    times = row["ratios"][ALONE]
    return f"| {row['case']}, {_backend(row)} | {times:.2f} | of PyTorch's fused step alone |"


def _product(row: Row) -> str | None:
    if row["provider"] != AUTO:
        return None
    share = 1 / row["ratios"][GRADIENT]
    return f"| {row['case']} | {share:.0%} | of the rate of the plain weight gradient |"


def _fisher(row: Row) -> str | None:
    if row["provider"] == PLAIN:
        return None
    ratio = row["ratios"][PLAIN]
    return f"| Fisher, {row['case']}, {_backend(row)} | {ratio:.2f} | forward and backward passes |"


def _backend(row: Row) -> str:
    return str(row["provider"]).removeprefix(f"{OURS}, ")


def origin(record: Record) -> str:
    """Return where numbers come from."""
    at = record["environment"]
    changed = " with changes" * at["dirty"]
    return (
        f"{at['gpu']}, driver {at.get('driver_version', 'unknown')}; PyTorch {at['torch']}, Triton "
        f"{at['triton']}, ewc_fast {at['ewc_fast']} at {at['commit']}{changed}, {at['date'][:10]}."
    )

"""The memory-bound operations on a GPU, beside a copy of as many bytes.

Device time by CUDA events; for lists also the host's time and the launches of a call.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gpu_operations_case import COPY, CUDA, FOREACH, OPERATIONS, TRITON, Case
from gpu_timing import (
    NO_ROOM,
    TRIED_OUT,
    Budget,
    Clock,
    Effort,
    device_for,
    launches,
    measure,
    script,
)
from harness import Claim, Result

FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = ((FP32, FP32), (BF16, BF16), (BF16, FP32), (FP32, BF16))  # parameters and Fisher
SHARE = 0.9  # of the copy's bandwidth, promised from 10^8 parameters on
HOST_MICROSECONDS = 15.0  # promised for 300 small tensors
SECONDS = 150.0
EFFORT = Effort(seconds=0.3, rounds=7)
QUICK = 3000  # parameters
LIKE_A_MODEL = 10**8  # parameters from which the promise holds


def cases(quick: bool, device: torch.device) -> list[Case]:
    """Return what is measured, the most telling first."""
    if quick:
        sizes = [("flat", QUICK), ("list", QUICK), ("tiny", 300)]
        plan = [(layout, n, dtypes) for layout, n in sizes for dtypes in DTYPES[:2]]
    else:
        model, huge, small = LIKE_A_MODEL, 10 * LIKE_A_MODEL, LIKE_A_MODEL // 100
        plan = [
            *((layout, model, DTYPES[0]) for layout in ("flat", "list")),
            ("tiny", 30_000, DTYPES[0]),
            ("list", small, DTYPES[0]),
            *((layout, huge, DTYPES[0]) for layout in ("flat", "list")),
            *((layout, model, DTYPES[1]) for layout in ("flat", "list")),
            *((layout, huge, DTYPES[1]) for layout in ("flat", "list")),
            *((layout, model, kinds) for kinds in DTYPES[2:] for layout in ("flat", "list")),
            ("flat", small, DTYPES[0]),
            *((layout, small, DTYPES[1]) for layout in ("flat", "list")),
        ]
    return [
        Case(
            operation, layout, n, *dtypes, device,
            compiled=layout == "flat" and dtypes == DTYPES[0] and n in (QUICK, LIKE_A_MODEL),
        )
        for layout, n, dtypes in plan
        for operation in OPERATIONS
    ]  # fmt: skip


def suite(quick: bool, budget: Budget) -> Iterator[Result]:
    """Measure case by case, until time is up."""
    clock = Clock(device_for(quick))
    for case in cases(quick, clock.device):
        if budget.spent:
            yield Result(refused={str(case): "not reached: time was up"})
            continue
        yield measured(case, clock, TRIED_OUT if quick else EFFORT)
        if clock.device.type == "cuda":
            torch.cuda.empty_cache()


def measured(case: Case, clock: Clock, effort: Effort) -> Result:
    """Measure one case."""
    result = Result()
    try:
        providers = case.providers()
    except torch.OutOfMemoryError:
        return Result(refused={str(case): NO_ROOM})
    timings = measure(providers, clock, effort)
    result.add(str(case), timings, (COPY,))
    copied = case.copied_bytes / timings.median(COPY)
    for row in result.rows:
        moved = case.copied_bytes if row["provider"] == COPY else case.bytes
        rate = moved / row["median"]
        row |= {
            "operation": case.operation,
            "layout": case.layout,
            "elements": case.elements,
            "params": str(case.params),
            "fisher": str(case.fisher),
            "gigabytes_a_second": rate / 1e9,
            "share_of_copy": rate / copied,
        }
        if case.layout != "flat" and row["provider"] in (CUDA, TRITON, FOREACH):
            call = providers[row["provider"]].call
            row["launches"] = launches(call, clock.device)
            if case.elements < LIKE_A_MODEL:  # larger ones fill the queue, and then the host waits
                row["host_seconds"] = clock.host_seconds(call)
        result.claims += claims(case, row, clock.device)
    return result


def claims(case: Case, row: dict[str, object], device: torch.device) -> list[Claim]:
    """Return what a row says of the promises: bandwidth of large cases, host time of tiny ones."""
    share, host = row["share_of_copy"], row.get("host_seconds")
    if device.type != "cuda" or row["provider"] not in (CUDA, TRITON):
        return []
    title = f"{case}, {row['provider']}"
    if case.layout == "tiny" and isinstance(host, float):
        return [Claim(f"{title}: µs of the host", 1e6 * host, HOST_MICROSECONDS, at_least=False)]
    if case.elements >= LIKE_A_MODEL and isinstance(share, float):
        return [Claim(f"{title}: share of the copy's bandwidth", share, SHARE)]
    return []


if __name__ == "__main__":
    script(suite, SECONDS)

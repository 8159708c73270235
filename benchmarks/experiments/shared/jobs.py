"""Independent trainings, one to a core."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

import torch
from tqdm import tqdm

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_all(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    *,
    workers: int | None,
    description: str,
) -> list[Result]:
    """Return the function of every job, in their order, with a bar for those that are done.

    Each runs on one thread, for products this small others cost more than they save; up to
    ``workers`` processes share the jobs, by default one for each core. ``function`` must be of a
    module, and jobs and results such that they can be pickled.
    """
    workers = min(workers or _cores(), len(jobs))
    # disable=None: no bar where nobody watches, in a log file
    with tqdm(total=len(jobs), desc=description, leave=False, disable=None) as bar:
        if workers <= 1:
            return _here(function, jobs, bar)
        # Not forked: a child would inherit threads' locks, but not the threads.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,))
        with pool:
            futures = [pool.submit(function, job) for job in jobs]
            try:
                for future in as_completed(futures):
                    future.result()  # the first failure ends it all
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return [future.result() for future in futures]


def _here(
    function: Callable[[Job], Result], jobs: Sequence[Job], bar: tqdm[object]
) -> list[Result]:
    before, results = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for job in jobs:
            results.append(function(job))
            bar.update()
    finally:
        torch.set_num_threads(before)
    return results


def _cores() -> int:
    allowed = getattr(os, "sched_getaffinity", None)  # not everywhere
    return len(allowed(0)) if allowed else os.cpu_count() or 1

"""Tells whether the machine was quiet while a child process was measured.

On a busy machine threads wait for each other at every barrier, by milliseconds, which says nothing
about the code.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path
from time import perf_counter

NOISE = 0.03  # a share of the cores that the system itself takes


class LoadElsewhere:
    """Share of all cores' time that went neither to this process's children nor to idling.

    >>> load = LoadElsewhere()
    >>> load.share()  # after the child has been waited for; None where the system does not tell
    0.01
    """

    def __init__(self) -> None:
        self._began, self._busy, self._children = perf_counter(), _busy_seconds(), _of_children()

    def share(self) -> float | None:
        """Return the share since the object was made."""
        if self._busy is None:
            return None
        busy = (_busy_seconds() or 0.0) - self._busy
        elsewhere = busy - (_of_children() - self._children)
        available = (perf_counter() - self._began) * (os.cpu_count() or 1)
        return max(0.0, elsewhere / available)


def _busy_seconds() -> float | None:
    statistics = Path("/proc/stat")
    if not statistics.exists():
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal
    ticks = [int(text) for text in statistics.read_text().split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime

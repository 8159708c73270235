"""What a measured number depends on: machine, versions, commit."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from ewc_fast import __version__
from ewc_fast._native import core

COMMIT = "EWC_FAST_COMMIT"
"""The variable that names the commit where a copy of the tree lacks its history."""

_CHECKOUT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, Any]:
    """Return date, processor, threads, versions and commit, as plain values for a record.

    ``commit`` is "unknown" outside a checkout, unless the variable ``EWC_FAST_COMMIT`` names it;
    ``dirty`` tells whether the checkout had changes that no commit holds. Results and the README
    don't count: what a run writes itself does not make the code it measured another one.

    Examples
    --------
    >>> from ewc_fast.environment import environment
    >>> environment()["ewc_fast"] == ewc_fast.__version__
    True
    """
    status = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector_level": core.vector_levels[0],
        "system": " ".join((platform.system(), platform.machine(), *platform.libc_ver())),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ewc_fast": __version__,
        "commit": _git("rev-parse", "--short", "HEAD") or os.environ.get(COMMIT, "unknown"),
        "dirty": bool(status),
    }


def processor() -> str:
    """Return the processor's model, which ``platform`` does not know on Linux."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="replace") if info.exists() else ""
    found = re.search(r"model name\s*: (.*)", text)
    return found[1] if found else platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    # Installed elsewhere, the folder above may lie in somebody else's repository.
    if shutil.which("git") is None or not (_CHECKOUT / ".git").exists():
        return ""
    command = ["git", "--no-optional-locks", *arguments]
    done = subprocess.run(command, cwd=_CHECKOUT, capture_output=True, text=True, check=False)
    return done.stdout.strip()

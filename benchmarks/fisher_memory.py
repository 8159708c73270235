"""Peak memory of a Fisher diagonal, beyond what a plain forward and backward pass takes.

Each measurement has a fresh process: it makes the case, tries the same call on two samples (what
libraries load late is not counted), then resets the kernel's high-water mark of its resident memory
(writing 5 to /proc/self/clear_refs), makes the call once, and reads the mark again (VmHWM) less
what was resident before. glibc is told to map blocks of 64 KiB and more one by one and to return
what is freed, so that the mark follows what is held: MALLOC_MMAP_THRESHOLD_ and
MALLOC_TRIM_THRESHOLD_ of 65536. A forward and backward pass holds activations and all gradients;
what a Fisher pass takes beyond that is reported in units of the Fisher diagonal's own size.
"""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from fisher_calls import FORWARD_AND_BACKWARD, competing
from fisher_case import Estimator, FisherCase
from fisher_models import FULL, QUICK

RETURNS_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def beyond_forward_and_backward(
    model: str, estimator: Estimator, providers: Iterable[str], *, quick: bool
) -> dict[str, float]:
    """Return each provider's extra peak memory in units of the Fisher's size; {} if unknown."""
    if not os.access(CLEAR, os.W_OK):
        return {}
    baseline, own_size = _measured(model, estimator, FORWARD_AND_BACKWARD, quick)
    return {
        name: (_measured(model, estimator, name, quick)[0] - baseline) / own_size
        for name in providers
    }


def _measured(model: str, estimator: Estimator, provider: str, quick: bool) -> tuple[int, int]:
    """Return the peak of one call in a process of its own, and the Fisher's size, in bytes."""
    request = json.dumps([model, estimator, provider, quick])
    done = subprocess.run(
        [sys.executable, __file__, request],
        env=os.environ | RETURNS_FREED,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    peak, own_size = json.loads(done.stdout.splitlines()[-1])
    return peak, own_size


def _child(model: str, estimator: Estimator, provider: str, quick: bool) -> tuple[int, int]:
    workload = (QUICK if quick else FULL)[model]
    case = FisherCase(workload, workload.batch_size, batches=1)
    for at in (FisherCase(workload, 2, batches=1), case):
        if provider == FORWARD_AND_BACKWARD:
            call = at.forward_and_backward
        else:
            call = competing(at, estimator, (provider,))[provider]  # type: ignore[assignment]
        if at is not case:
            call()
    gc.collect()
    before = _resident("VmRSS")
    CLEAR.write_text("5")
    result = call()
    peak = _resident("VmHWM") - before
    del result
    return peak, sum(4 * param.numel() for param in case.model.parameters())


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())
    assert found, f"no {field} in {STATUS}"
    return 1024 * int(found[1])


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps(_child(*json.loads(sys.argv[1]))))

"""Squared per-sample products of linear layers and convolutions on a GPU.

Beside PyTorch's ordinary weight gradient of the same layer, which needs the same multiplications,
and the compositions of PyTorch's operations that give the squares.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from gpu_product_case import (
    AUTO,
    GRADIENT,
    TRITON,
    Convolution,
    Linear,
    multiplied,
)
from gpu_timing import NO_ROOM, TRIED_OUT, Budget, Clock, Effort, device_for, measure, script
from harness import Claim, Result

SHARE = 0.6  # of the weight gradient's rate, promised for LARGE
LARGE = Linear(4096, 4096, 2048, 8)
SECONDS = 150.0
EFFORT = Effort(seconds=0.3, rounds=7)

LINEAR = (
    LARGE,
    Linear(50257, 768, 512, 4),  # a head tied to the words
    Linear(1024, 1024, 512, 16),
    Linear(768, 3072, 128, 32),
    Linear(3072, 768, 128, 32),
    Linear(1024, 1024, 1, 4096),
    Linear(512, 512, 16, 256),
    Linear(64, 64, 1024, 64),
    Linear(1024, 1024, 512, 16, "float32"),
    Linear(1024, 1024, 512, 16, "tf32"),
    Linear(1024, 1024, 1, 4096, "float32"),
    Linear(1024, 1024, 1, 4096, "tf32"),
    Linear(4096, 4096, 2048, 8, "tf32"),
    Linear(4096, 4096, 2048, 8, "float32"),
    Linear(1024, 1024, 512, 16, "float16"),
)
CONVOLUTIONS = (  # ResNet-50's, then of networks for small devices
    Convolution(64, 64, 56, 128),
    Convolution(64, 3, 224, 128, kernel=7, stride=2),
    Convolution(256, 64, 56, 128, kernel=1),
    Convolution(64, 256, 56, 128, kernel=1),
    Convolution(128, 128, 56, 128, stride=2),
    Convolution(128, 128, 28, 128),
    Convolution(512, 256, 56, 128, kernel=1, stride=2),
    Convolution(256, 256, 14, 128),
    Convolution(1024, 256, 14, 128, kernel=1),
    Convolution(512, 512, 7, 128),
    Convolution(512, 2048, 7, 128, kernel=1),
    Convolution(256, 256, 28, 128, groups=256),
    Convolution(96, 96, 112, 128, stride=2, groups=96),
    Convolution(128, 128, 28, 128, kind="tf32"),
    Convolution(256, 256, 28, 128, groups=256, kind="float32"),
)
QUICK = (
    Linear(20, 30, 6, 3),
    Linear(20, 30, 1, 8, "float32"),
    Convolution(6, 4, 8, 3),
    Convolution(4, 4, 8, 3, groups=4, kind="float32"),
)


def suite(quick: bool, budget: Budget) -> Iterator[Result]:
    """Measure layer by layer, until time is up."""
    clock = Clock(device_for(quick))
    layers: tuple[Linear | Convolution, ...] = QUICK if quick else _alternating()
    for layer in layers:
        if budget.spent:
            yield Result(refused={str(layer): "not reached: time was up"})
            continue
        with multiplied(layer.kind):
            yield measured(layer, clock, TRIED_OUT if quick else EFFORT)
        if clock.device.type == "cuda":
            torch.cuda.empty_cache()


def _alternating() -> tuple[Linear | Convolution, ...]:
    """Return both kinds in turns: time that is up early leaves some of each."""
    pairs = zip(LINEAR, CONVOLUTIONS, strict=True)
    return tuple(layer for pair in pairs for layer in pair)


def measured(layer: Linear | Convolution, clock: Clock, effort: Effort) -> Result:
    """Measure one layer."""
    result, case = Result(), str(layer)
    try:
        timings = measure(layer.providers(clock.device), clock, effort)
    except torch.OutOfMemoryError:
        return Result(refused={case: NO_ROOM})
    result.add(case, timings, (GRADIENT,))
    for row in result.rows:
        row["teraflops"] = layer.operations / row["median"] / 1e12
    if clock.device.type == "cuda":
        result.claims += claims(layer, result)
    return result


def claims(layer: Linear | Convolution, result: Result) -> list[Claim]:
    """Return the rate beside the weight gradient's, and the time beside the best composition's."""
    medians = {row["provider"]: row["median"] for row in result.rows}
    theirs = [m for name, m in medians.items() if name not in (AUTO, TRITON, GRADIENT)]
    found = []
    if AUTO in medians and theirs:
        text = f"{layer}: time of {AUTO} in units of the best composition's"
        found.append(Claim(text, medians[AUTO] / min(theirs), 1.0, at_least=False))
    if layer == LARGE and TRITON in medians:
        text = f"{layer}: rate of {TRITON} in units of the weight gradient's"
        found.append(Claim(text, medians[GRADIENT] / medians[TRITON], SHARE))
    return found


if __name__ == "__main__":
    script(suite, SECONDS)

"""The lists of tensors that the benchmarks run on: a real model's, scaled, or one flat tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

Shape = tuple[int, ...]

_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # width and number of bottleneck blocks
_EXPANSION = 4


def resnet50() -> list[Shape]:
    """Return the shapes of ResNet-50's 161 parameters, 25,557,032 elements in all."""
    shapes: list[Shape] = _convolution_and_norm(3, 64, kernel=7)
    channels = 64
    for width, blocks in _STAGES:
        for block in range(blocks):
            shapes += _convolution_and_norm(channels, width, kernel=1)
            shapes += _convolution_and_norm(width, width, kernel=3)
            shapes += _convolution_and_norm(width, _EXPANSION * width, kernel=1)
            if block == 0:
                shapes += _convolution_and_norm(channels, _EXPANSION * width, kernel=1)
            channels = _EXPANSION * width
    return [*shapes, (1000, channels), (1000,)]


def _convolution_and_norm(inputs: int, outputs: int, kernel: int) -> list[Shape]:
    return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]


def scaled(shapes: Sequence[Shape], elements: int) -> list[Shape]:
    """Return as many shapes of the same ranks, with ``elements`` in all in the same proportions.

    Every tensor keeps at least one element; the largest takes what rounding leaves, which needs
    several thousand elements for ResNet-50's many small tensors.
    """
    sizes = [math.prod(shape) for shape in shapes]
    factor = elements / sum(sizes)
    kept = [max(1, round(size * factor)) for size in sizes]
    kept[kept.index(max(kept))] += elements - sum(kept)
    if min(kept) < 1:
        raise ValueError(f"{elements} elements are too few for {len(shapes)} tensors")
    return [(size,) + (1,) * (len(shape) - 1) for size, shape in zip(kept, shapes, strict=True)]


def layout(name: str, elements: int) -> list[Shape]:
    """Return the shapes of a layout by name: ``"list"`` (161 tensors) or ``"flat"`` (one)."""
    layouts: dict[str, list[Shape]] = {
        "list": scaled(resnet50(), elements),
        "flat": [(elements,)],
    }
    return layouts[name]


def transformer(blocks: int, width: int = 1024) -> list[Shape]:
    """Return the shapes of GPT-2's blocks, 12 tensors each."""
    block: list[Shape] = [
        (width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,),
        (width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,),
    ]  # fmt: skip
    return blocks * block

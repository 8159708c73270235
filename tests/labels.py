"""Labels that the library draws, kept for the oracle."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ewc_fast.fisher.likelihoods import NAMED


class Remembering:
    """A likelihood of the library that keeps the labels it draws."""

    def __init__(self, name: str) -> None:
        self.known = NAMED[name]
        self.drawn: list[Tensor] = []

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.known.log_prob(outputs, targets)

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        self.drawn.append(self.known.sample(outputs, generator))
        return self.drawn[-1]


def relabelled(data: Iterable[tuple[Any, Tensor]], drawn: list[Tensor]) -> list[tuple[Any, Tensor]]:
    """Return the data with its labels replaced by those drawn."""
    return [(inputs, labels) for (inputs, _), labels in zip(data, drawn, strict=True)]

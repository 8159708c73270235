"""Everything that competes on a Fisher diagonal, by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from fisher_case import SEED, Estimator, FisherCase
from fisher_peers import peers
from fisher_rivals import plain_rivals
from torch import Tensor, nn

from ewc_fast import fisher_diagonal

EWC_FAST = "ewc_fast"
FORWARD_AND_BACKWARD = "forward and backward"

Call = Callable[[], Mapping[str, Tensor]]


def ours(case: FisherCase, estimator: Estimator) -> Call:
    """Return the call of ewc_fast."""
    forward = classes_in_dimension_one if case.has_positions else None

    def call() -> Mapping[str, Tensor]:
        draw = torch.Generator().manual_seed(SEED) if estimator == "sampled" else None
        return fisher_diagonal(
            case.model, case.batches, estimator=estimator, forward=forward, generator=draw
        )

    return call


def classes_in_dimension_one(model: nn.Module, inputs: Any) -> Tensor:
    """Return logits (samples, classes, positions), as the categorical likelihood wants them."""
    logits: Tensor = model(inputs)
    return logits.transpose(1, 2)


def competing(
    case: FisherCase, estimator: Estimator, only: Collection[str] | None = None
) -> dict[str, Call]:
    """Return all that give a Fisher diagonal, or only some."""
    found = {EWC_FAST: ours(case, estimator), **plain_rivals(case, estimator)}
    kept = {name: call for name, call in found.items() if only is None or name in only}
    return kept | peers(case, estimator, only)

"""Looks up, in one batch, which sample each row belongs to, where that can't be foretold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ewc_fast.fisher.recorder.graph import Graph
from ewc_fast.fisher.recorder.layouts import (
    Layout,
    Ragged,
    labels,
    powers_of_two,
    scaled_by_sample,
)
from ewc_fast.fisher.recorder.plan import Plan, Use


def trace(graph: Graph, outputs: Tensor, plan: Plan) -> dict[Use, Layout]:
    """Return the layouts of traced uses; those whose rows are mixed are left out.

    Costs one backward pass for the gradients as they are, and one for each digit to base 16 of the
    samples' numbers.
    """
    uses = plan.traced
    if not uses:
        return {}
    edges = [graph.gradient_edge((use.node, 0)) for use in uses]
    probe = torch.Generator().manual_seed(1)
    vector = torch.randn(outputs.shape, generator=probe, dtype=torch.float64).to(outputs)
    again, each = scaled_by_sample(vector)
    powers = powers_of_two(outputs.device)
    plain, *scaled = [
        torch.autograd.grad(outputs, edges, v, retain_graph=True, allow_unused=True)
        for v in (vector, *again)
    ]
    found: dict[Use, Layout] = {}
    for number, use in enumerate(uses):
        gradient, others = plain[number], [grads[number] for grads in scaled]
        layout = _layout(use, gradient, others, each, powers)
        if layout is not None:
            found[use] = layout
    return found


def _layout(
    use: Use,
    gradient: Tensor | None,
    scaled: Sequence[Tensor | None],
    each: list[Tensor],
    powers: Tensor,
) -> Layout | None:
    samples = len(each[0])
    known = [again for again in scaled if again is not None]
    if gradient is None or len(known) < len(scaled):
        return None
    if use.layout is not None:
        regular = use.layout.resized(samples)
        if regular.fits(gradient.shape) and all(
            regular.explains(gradient, again, scales)
            for again, scales in zip(known, each, strict=True)
        ):
            return regular
    found = labels(gradient, known, powers)
    return None if found is None else Ragged(found[0].clamp(max=samples - 1), samples, found[1])

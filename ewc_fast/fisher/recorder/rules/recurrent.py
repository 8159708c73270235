"""The hidden weights of recurrent layers."""

from __future__ import annotations

from ewc_fast.fisher.recorder.per_sample import Outer, PerSample
from ewc_fast.fisher.recorder.rules.operand import Operand


def hidden_tap(use: Operand) -> PerSample | None:
    """Z[t] = W h[t - 1] + b, for all steps at once."""
    if use.place == 1:
        return use.reduced(use.grad)
    if use.dim == 2:
        return None
    grad, previous = use.rows(use.grad), use.rows(use.node.hidden.previous)
    return Outer(grad, previous, gradient_is_left=True)

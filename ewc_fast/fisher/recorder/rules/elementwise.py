"""Sums and products with operands that are broadcast over the samples, or copied for each."""

from __future__ import annotations

from ewc_fast.fisher.recorder.per_sample import Dense, PerSample
from ewc_fast.fisher.recorder.rules.operand import Operand, times


def add(use: Operand) -> PerSample | None:
    """Z = A + alpha B."""
    return use.reduced(times(use.grad, use.node._saved_alpha if use.place == 1 else 1))


def sub(use: Operand) -> PerSample | None:
    """Z = A - alpha B: the sign squares away, but not beside other uses."""
    return use.reduced(times(use.grad, -use.node._saved_alpha if use.place == 1 else 1))


def mul(use: Operand) -> PerSample | None:
    """Z = A * B."""
    other = use.node._saved_other if use.place == 0 else use.node._saved_self
    if other is None:
        return None
    own = use.grad.dim() - len(use.shape)
    if 0 < own < use.grad.dim() and use.grad.shape[own:] == use.shape:
        return use.scale(other.expand_as(use.grad))
    return use.reduced(use.grad * other)


def expand(use: Operand) -> PerSample | None:
    """One tensor for all samples, made explicit."""
    return use.reduced(use.grad)


def repeat(use: Operand) -> PerSample | None:
    """One copy for each sample."""
    values = use.layout.by_sample(use.grad)
    if values[0].numel() != use.shape.numel():
        return None
    return Dense(values.reshape(len(values), *use.shape))

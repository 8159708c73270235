"""Scales and shifts of normalised values, which are recomputed from what was saved."""

from __future__ import annotations

from ewc_fast.fisher.recorder.per_sample import PerSample
from ewc_fast.fisher.recorder.rules.operand import Operand


def layer_norm(use: Operand) -> PerSample | None:
    """Z = w (x - mean) / deviation + b over the last dimensions."""
    if use.place == 2:
        return use.reduced(use.grad)
    node = use.node
    normal = (node._saved_input - node._saved_result1).mul_(node._saved_result2)
    return use.reduced(normal.mul_(use.grad))


def group_norm(use: Operand) -> PerSample | None:
    """Z = w (x - mean) / deviation + b over groups of channels."""
    if use.place == 2:
        return use.per_channel(use.grad)
    node = use.node
    grouped = node._saved_input.reshape(*node._saved_result1.shape, -1)
    normal = (grouped - node._saved_result1.unsqueeze(-1)) * node._saved_result2.unsqueeze(-1)
    return use.per_channel(normal.view(use.grad.shape).mul_(use.grad))


def batch_norm(use: Operand) -> PerSample | None:
    """Z = w (x - mean) / deviation + b with running statistics."""
    if use.place == 2:
        return use.per_channel(use.grad)
    node, behind = use.node, [1] * (use.grad.dim() - 2)
    if node._saved_training:
        return None
    mean = node._saved_running_mean.view(-1, *behind)
    scale = (node._saved_running_var + node._saved_eps).rsqrt().view(-1, *behind)
    return use.per_channel((node._saved_input - mean).mul_(scale).mul_(use.grad))


def rms_norm(use: Operand) -> PerSample | None:
    """Z = w x / root mean square."""
    return use.reduced(use.node._saved_input * use.node._saved_result1 * use.grad)

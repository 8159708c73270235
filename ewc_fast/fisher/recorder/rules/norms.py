"""Scales and shifts of normalised values, which are recomputed from what was saved."""

from __future__ import annotations

from ewc_fast.fisher.recorder.per_sample import PerSample
from ewc_fast.fisher.recorder.rules.operand import Operand


def layer_norm(use: Operand) -> PerSample | None:
    """Z = w (x - mean) / deviation + b over the last dimensions."""
    if use.place == 2:
        return use.reduced(use.grad)
    node = use.node
    return use.scale(node._saved_input, node._saved_result1, node._saved_result2)


def group_norm(use: Operand) -> PerSample | None:
    """Z = w (x - mean) / deviation + b over groups of channels."""
    if use.place == 2:
        return use.per_channel(use.grad)
    groups = (use.node._saved_result1, use.node._saved_result2)
    each = use.grad.shape[1] // groups[0].shape[1]
    mean, scale = (numbers.repeat_interleave(each, 1) for numbers in groups)
    return use.scale_of_channels(use.node._saved_input, mean, scale)


def batch_norm(use: Operand) -> PerSample | None:
    """Z = w (x - mean) / deviation + b with running statistics."""
    if use.place == 2:
        return use.per_channel(use.grad)
    node = use.node
    if node._saved_training:
        return None
    statistics = node._saved_running_mean, (node._saved_running_var + node._saved_eps).rsqrt()
    mean, scale = (numbers.expand(len(use.grad), -1) for numbers in statistics)
    return use.scale_of_channels(node._saved_input, mean, scale)


def rms_norm(use: Operand) -> PerSample | None:
    """Z = w x / root mean square."""
    return use.scale(use.node._saved_input, None, use.node._saved_result1)

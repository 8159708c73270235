"""What each kind of operation says of the gradients of its operands, sample by sample.

A rule takes a node of the autograd graph, the gradient of what it returned, the layout of samples
in it, which operand is asked for and that operand's shape. What an operation saved for its own
backward pass is all it needs. Where no rule fits, the operation's own backward pass is run.
"""

from __future__ import annotations

from collections.abc import Callable

from ewc_fast.fisher.recorder.graph import kind_of
from ewc_fast.fisher.recorder.per_sample import PerSample
from ewc_fast.fisher.recorder.rules import (
    convolution,
    elementwise,
    norms,
    products,
    recurrent,
    tables,
)
from ewc_fast.fisher.recorder.rules.operand import Operand
from ewc_fast.fisher.recorder.rules.own_backward import by_its_own_backward

__all__ = ["BIAS_PLACES", "CHANNELS_SECOND", "RULES", "Operand", "by_its_own_backward", "by_rule"]

Rule = Callable[[Operand], PerSample | None]

RULES: dict[str, Rule] = {
    "Addmm": products.addmm,
    "Mm": products.mm,
    "Bmm": products.bmm,
    "Baddbmm": products.baddbmm,
    "GroupedMm": products.grouped_mm,
    "Mv": products.mv,
    "Addmv": products.addmv,
    "Trilinear": products.trilinear,
    "Convolution": convolution.convolution,
    "HiddenTap": recurrent.hidden_tap,
    "Embedding": tables.embedding,
    "Index": tables.index,
    "IndexSelect": tables.index_select,
    "EmbeddingBag": tables.embedding_bag,
    "Add": elementwise.add,
    "Sub": elementwise.sub,
    "Mul": elementwise.mul,
    "Expand": elementwise.expand,
    "Repeat": elementwise.repeat,
    "NativeLayerNorm": norms.layer_norm,
    "NativeGroupNorm": norms.group_norm,
    "NativeBatchNorm": norms.batch_norm,
    "FusedRmsNorm": norms.rms_norm,
}


# Which operand's gradient is the sum of the result's over its positions.
BIAS_PLACES = {
    "Addmm": 0,
    "Convolution": 2,
    "HiddenTap": 1,
    "NativeLayerNorm": 2,
    "NativeGroupNorm": 2,
    "NativeBatchNorm": 2,
}

# Operations whose channels, one for each number of the bias, are the result's second dimension.
CHANNELS_SECOND = {"Convolution", "NativeGroupNorm", "NativeBatchNorm"}


def by_rule(use: Operand) -> PerSample | None:
    """Return the gradients of a use, or ``None`` if no rule fits it."""
    rule = RULES.get(kind_of(use.node))
    return None if rule is None else rule(use)

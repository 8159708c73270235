"""Tables of which an operation reads some rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ewc_fast.fisher.recorder.layouts import Ragged
from ewc_fast.fisher.recorder.per_sample import PerSample, Rows
from ewc_fast.fisher.recorder.rules.operand import Operand

MEAN, MAX = 1, 2  # modes of embedding bags


def embedding(use: Operand) -> PerSample | None:
    """Rows of a table, chosen by indices."""
    if use.node._saved_scale_grad_by_freq:  # counts the other samples' indices too
        return None
    return _rows(use, use.node._saved_indices, use.node._saved_padding_idx)


def index(use: Operand) -> PerSample | None:
    """``table[indices]``."""
    indices = use.node._saved_indices
    if len(indices) != 1 or indices[0] is None or indices[0].dtype != torch.long:
        return None
    return _rows(use, indices[0] % use.shape[0], -1)


def index_select(use: Operand) -> PerSample | None:
    """``table.index_select(0, indices)``."""
    return None if use.node._saved_dim != 0 else _rows(use, use.node._saved_index, -1)


def embedding_bag(use: Operand) -> PerSample | None:
    """Sums or means of bags of rows; bags may differ in length."""
    node, layout = use.node, use.layout
    if use.place != 0 or use.dim != 0:
        return None
    if node._saved_mode == MAX or node._saved_scale_grad_by_freq:
        return None
    indices, grad = node._saved_indices, use.grad
    if node._saved_mode == MEAN:
        grad = grad / node._saved_result2.clamp(min=1).unsqueeze(1)
    places = torch.arange(len(indices), device=indices.device)
    bags = torch.searchsorted(node._saved_offsets.to(places), places, right=True) - 1
    values = grad[bags]
    if node._saved_per_sample_weights is not None:
        values = values * node._saved_per_sample_weights.unsqueeze(1)
    values = values.masked_fill((indices == node._saved_padding_idx).unsqueeze(1), 0)
    entries = Ragged(layout.owners(len(grad), grad.device)[bags], layout.samples, 0)
    chosen, values = (entries.by_sample(t).flatten(1, 2) for t in (indices, values))
    return Rows(chosen, values, tuple(use.shape))


def _rows(use: Operand, indices: Tensor, padding_idx: int) -> PerSample | None:
    if use.dim >= indices.dim():
        return None
    chosen = use.layout.by_sample(indices).flatten(1)
    values = use.layout.by_sample(use.grad.flatten(indices.dim())).flatten(1, -2)
    return Rows(chosen, values, tuple(use.shape), padding_idx)

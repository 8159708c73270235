"""Tables of which an operation reads some rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ewc_fast.fisher.recorder.per_sample import PerSample, Rows
from ewc_fast.fisher.recorder.rules.operand import Operand


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


def _rows(use: Operand, indices: Tensor, padding_idx: int) -> PerSample | None:
    if use.dim >= indices.dim():
        return None
    chosen = use.layout.by_sample(indices).flatten(1)
    values = use.layout.by_sample(use.grad.flatten(indices.dim())).flatten(1, -2)
    values = values.masked_fill((chosen == padding_idx).unsqueeze(2), 0)
    return Rows(chosen, values, tuple(use.shape))

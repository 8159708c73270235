"""Operands with a Fisher in 8 bits, beside the same with what its codes stand for in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from list_operations import OPERATIONS, ListOperation, Lists
from torch import Tensor

from ewc_fast.formats import decode_e5m3, encode_e5m3

READING = {
    name: OPERATIONS[name]
    for name in ("add_penalty_grad", "penalty", "penalty_grad", "proximal_step")
}
"""The operations that only read the Fisher."""


def heavy_tailed(like: Tensor) -> Tensor:
    """Return a Fisher over some twenty decades, with zeros and what decodes to denormals."""
    fisher = torch.empty_like(like, dtype=torch.float32).normal_(0, 4).exp_() * 1e-3
    flat = fisher.as_strided((fisher.numel(),), (1,), fisher.storage_offset())
    flat[1::7] = 0
    flat[5::256] = 1e-40
    flat[512:768] *= 1e-30
    return fisher


def pair_of_lists(operation: ListOperation, params: Sequence[Tensor]) -> tuple[Lists, Lists]:
    """Return an operation's operands with the Fisher in 8 bits, and copies with it decoded."""
    lists = operation.make(list(params), None)
    encoded = [encode_e5m3(heavy_tailed(fisher)) for fisher in lists[operation.fisher]]
    twin = copies_of(lists)
    twin[operation.fisher] = [decode_e5m3(*fisher) for fisher in encoded]
    lists[operation.fisher] = [codes for codes, _ in encoded]
    return [*lists, [scales for _, scales in encoded]], twin


def copies_of(lists: Lists) -> Lists:
    """Return copies with the same strides."""
    return [[t.clone() for t in tensors] for tensors in lists]


def shifted(lists: Lists, places: Sequence[int]) -> Lists:
    """Return copies; of the operands at these places one element off every alignment."""
    made = copies_of(lists)
    for place in places:
        for row, tensor in enumerate(made[place]):
            room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
            made[place][row] = room[1:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)
    return made

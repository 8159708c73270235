"""A low-rank change of a weight, and that weight's Fisher."""

from __future__ import annotations

from torch import Tensor

from ewc_fast._checks.operands import PARAM_DTYPES, kind, short


def low_rank_delta(lora_a: Tensor, lora_b: Tensor, fisher: Tensor) -> None:
    """Raise unless the three belong to one weight."""
    named = {"lora_a": lora_a, "lora_b": lora_b, "fisher": fisher}
    for name, tensor in named.items():
        kind(name, tensor)
        if tensor.dtype not in PARAM_DTYPES:
            raise TypeError(f"{name}: expected a floating dtype, got {short(tensor.dtype)}")
        if tensor.dim() != 2:
            raise ValueError(f"{name}: expected two dimensions, got shape {tuple(tensor.shape)}")
        if tensor.device != lora_a.device:
            raise ValueError(
                f"{name}: expected device {lora_a.device} like lora_a, got {tensor.device}; "
                f"move it with .to({str(lora_a.device)!r})"
            )
    if lora_b.dtype != lora_a.dtype:
        raise TypeError(
            f"lora_b: expected {short(lora_a.dtype)} like lora_a, got {short(lora_b.dtype)}"
        )
    if lora_b.shape[1] != lora_a.shape[0]:
        raise ValueError(
            f"lora_b: expected shape (outputs, {lora_a.shape[0]}) beside lora_a of "
            f"{tuple(lora_a.shape)}, got {tuple(lora_b.shape)}"
        )
    shape = lora_b.shape[0], lora_a.shape[1]
    if tuple(fisher.shape) != shape:
        raise ValueError(
            f"fisher: expected shape {shape} of lora_b @ lora_a, got {tuple(fisher.shape)}"
        )

"""The lists of tensors that operations take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PARAM_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

TensorList = list[Tensor] | tuple[Tensor, ...]


@dataclass(frozen=True)
class Operand:
    """One list of tensors that an operation takes."""

    name: str
    role: Literal["param", "state", "residual"]
    written: bool = False
    stacked: bool = False  # may carry per-sample gradients in a leading dimension


@dataclass(frozen=True)
class Operation:
    """An operation's name and operands, in the order the kernels take them."""

    name: str
    operands: tuple[Operand, ...]


def state_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of fisher and anchor beside parameters of ``param_dtype``."""
    return torch.float64 if param_dtype == torch.float64 else torch.float32


def as_list(name: str, tensors: Tensor | Iterable[Tensor]) -> TensorList:
    """Accept one tensor (a flat buffer, say) or several."""
    if isinstance(tensors, Tensor):
        return [tensors]
    if isinstance(tensors, (list, tuple)):
        return tensors
    if isinstance(tensors, (str, bytes, dict)) or not isinstance(tensors, Iterable):
        raise TypeError(
            f"{name}: expected a tensor or a list of tensors, got {type(tensors).__name__}"
        )
    return list(tensors)


def operands(operation: Operation, lists: Sequence[TensorList]) -> None:
    """Raise unless the lists fit the operation, row by row."""
    first = operation.operands[0].name
    for operand, tensors in zip(operation.operands, lists, strict=True):
        if len(tensors) != len(lists[0]):
            raise ValueError(
                f"{operand.name}: expected {len(lists[0])} tensors like {first}, "
                f"got {len(tensors)}; pass one for each tensor of {first}"
            )
    for index, row in enumerate(zip(*lists, strict=True)):
        _row(operation, index, row)


def _row(operation: Operation, index: int, row: tuple[Tensor, ...]) -> None:
    for operand, tensor in zip(operation.operands, row, strict=True):
        kind(f"{operand.name}[{index}]", tensor)
    roles = {operand.role: i for i, operand in reversed(list(enumerate(operation.operands)))}
    plain = next(i for i, operand in enumerate(operation.operands) if not operand.stacked)
    param = row[roles["param"]]
    param_name = f"{operation.operands[roles['param']].name}[{index}]"
    if param.dtype not in PARAM_DTYPES:
        raise TypeError(
            f"{param_name}: expected a floating dtype (float32, float64, bfloat16, float16), "
            f"got {short(param.dtype)}; only such parameters have a Fisher information"
        )
    wanted = {
        "param": param.dtype,
        "state": state_dtype(param.dtype),
        "residual": torch.bfloat16,
    }
    for operand, tensor in zip(operation.operands, row, strict=True):
        name = f"{operand.name}[{index}]"
        if tensor.dtype != wanted[operand.role]:
            raise TypeError(
                f"{name}: expected {short(wanted[operand.role])} beside {param_name} of "
                f"{short(param.dtype)}, got {short(tensor.dtype)}; convert it with "
                f".to(torch.{short(wanted[operand.role])})"
            )
        if tensor.device != row[plain].device:
            raise ValueError(
                f"{name}: expected device {row[plain].device} like "
                f"{operation.operands[plain].name}[{index}], got {tensor.device}; "
                f"move it with .to({str(row[plain].device)!r})"
            )
        shape = tuple(row[plain].shape)
        if tuple(tensor.shape) != shape and not (
            operand.stacked and tuple(tensor.shape[1:]) == shape and tensor.dim() == len(shape) + 1
        ):
            stacked = f" or (samples, *{shape})" if operand.stacked else ""
            raise ValueError(
                f"{name}: expected shape {shape}{stacked} like "
                f"{operation.operands[plain].name}[{index}], got {tuple(tensor.shape)}"
            )


def kind(name: str, tensor: object) -> None:
    """Raise unless ``tensor`` is a dense tensor."""
    if not isinstance(tensor, Tensor):
        remedy = "; run backward first, or leave this parameter out" if tensor is None else ""
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}{remedy}")
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{name}: expected a dense tensor, got layout {tensor.layout}; "
            "the penalty's gradient is dense: build embeddings with sparse=False"
        )


def dense(operation: Operation, lists: Sequence[TensorList], index: int) -> bool:
    """Whether row ``index`` can be walked with one running index."""
    plain = next(i for i, operand in enumerate(operation.operands) if not operand.stacked)
    layout = lists[plain][index]
    strides = [
        (step, size) for step, size in zip(layout.stride(), layout.shape, strict=True) if size > 1
    ]
    expected = 1
    for step, size in sorted(strides):
        if step != expected:
            return False
        expected *= size
    for operand, tensors in zip(operation.operands, lists, strict=True):
        tensor = tensors[index]
        lead = int(operand.stacked and tensor.dim() == layout.dim() + 1)
        for dim, size in enumerate(layout.shape):
            if size > 1 and tensor.stride(lead + dim) != layout.stride(dim):
                return False
    return True


def short(dtype: torch.dtype) -> str:
    """Return a dtype's name without the module."""
    return str(dtype).removeprefix("torch.")

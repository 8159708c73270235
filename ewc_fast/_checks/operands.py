"""The lists of tensors that operations take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PARAM_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

ENCODED_BLOCK = 256  # codes of 8 bits that share a scale

TensorList = list[Tensor] | tuple[Tensor, ...]


@dataclass(frozen=True)
class Operand:
    """One list of tensors that an operation takes; a Fisher in 8 bits is two, codes and scales."""

    name: str
    role: Literal["param", "state", "fisher", "residual", "moment", "count", "codes", "scales"]
    written: bool = False
    stacked: bool = False  # may carry per-sample gradients in a leading dimension
    slot: int | None = None  # where kernels look for it, if not at its place in the order


@dataclass(frozen=True)
class Operation:
    """An operation's name and operands, in the order the kernels take them.

    ``measure`` is the position of the operand that shapes and devices are compared with: the
    parameters, where there are any. ``sums`` says that the operation has a value.
    """

    name: str
    operands: tuple[Operand, ...]
    measure: int
    sums: bool = False

    @property
    def rounds(self) -> bool:
        """Whether it writes a Fisher (its first operand), by chance where that is bfloat16."""
        return self.operands[0].role == "fisher" and self.operands[0].written


def state_dtype(param_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of fisher and anchor beside parameters of ``param_dtype``.

    A Fisher may also be bfloat16, beside parameters other than float64.
    """
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
    for operand, tensor in zip(operation.operands, row, strict=True):
        if operand.role == "param" and tensor.dtype not in PARAM_DTYPES:
            raise TypeError(
                f"{operand.name}[{index}]: expected a floating dtype (float32, float64, bfloat16, "
                f"float16), got {short(tensor.dtype)}; only such parameters have a Fisher "
                "information"
            )
    roles = [operand.role for operand in operation.operands]
    param = operation.measure if roles[operation.measure] == "param" else roles.index("param")
    state = state_dtype(row[param].dtype)
    allowed = {
        "param": (row[param].dtype,),
        "state": (state,),
        "fisher": (state,) if state == torch.float64 else (state, torch.bfloat16),
        "residual": (torch.bfloat16,),
        "moment": (row[param].dtype,) if row[param].dtype == state else (row[param].dtype, state),
        "count": (torch.float32,),
        "codes": (torch.uint8,),
        "scales": (torch.float32,),
    }
    like = f"{operation.operands[operation.measure].name}[{index}]"
    device, shape = row[operation.measure].device, tuple(row[operation.measure].shape)
    for operand, tensor in zip(operation.operands, row, strict=True):
        name, dtypes = f"{operand.name}[{index}]", allowed[operand.role]
        if tensor.dtype not in dtypes:
            raise TypeError(
                f"{name}: expected {' or '.join(map(short, dtypes))} beside "
                f"{operation.operands[param].name}[{index}] of {short(row[param].dtype)}, "
                f"got {short(tensor.dtype)}; convert it with .to(torch.{short(dtypes[0])})"
            )
        if tensor.device != device:
            raise ValueError(
                f"{name}: expected device {device} like {like}, got {tensor.device}; "
                f"move it with .to({str(device)!r})"
            )
        if operand.role == "count":
            if tensor.dim() != 0:
                raise ValueError(f"{name}: expected a scalar, got shape {tuple(tensor.shape)}")
            continue
        if operand.role == "scales":
            _one_for_each_block(name, tensor, row[operation.measure].numel())
            continue
        samples = int(operand.stacked and tensor.dim() == len(shape) + 1)
        if tuple(tensor.shape[samples:]) != shape:
            stacked = f" or {('samples', *shape)}" if operand.stacked else ""
            raise ValueError(
                f"{name}: expected shape {shape}{stacked} like {like}, got {tuple(tensor.shape)}"
            )
    _moments(operation, index, row)


def _one_for_each_block(name: str, scales: Tensor, numel: int) -> None:
    blocks = -(-numel // ENCODED_BLOCK)
    if scales.shape != (blocks,) or not scales.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous vector of {blocks}, one for each block, "
            f"got shape {tuple(scales.shape)}"
        )


def _moments(operation: Operation, index: int, row: tuple[Tensor, ...]) -> None:
    """Raise unless a row's moments have one dtype."""
    moments = [
        (operand.name, tensor.dtype)
        for operand, tensor in zip(operation.operands, row, strict=True)
        if operand.role == "moment"
    ]
    for name, dtype in moments[1:]:
        if dtype != moments[0][1]:
            raise TypeError(
                f"{name}[{index}]: expected {short(moments[0][1])} like "
                f"{moments[0][0]}[{index}], got {short(dtype)}"
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
    layout = lists[operation.measure][index]
    if layout.numel() == 0:
        return True
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
        if operand.role in ("count", "scales"):
            continue
        lead = int(operand.stacked and tensor.dim() == layout.dim() + 1)
        for dim, size in enumerate(layout.shape):
            if size > 1 and tensor.stride(lead + dim) != layout.stride(dim):
                return False
    return True


def short(dtype: torch.dtype) -> str:
    """Return a dtype's name without the module."""
    return str(dtype).removeprefix("torch.")

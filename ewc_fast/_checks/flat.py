"""Whether parameters can be moved into a flat buffer, and tensors laid out like them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ewc_fast._checks.operands import kind


def flattenable(model: nn.Module, params: Mapping[str, nn.Parameter]) -> None:
    """Raise unless each of ``params``, of ``model``, has ordinary memory of its own."""
    for path, module in model.named_modules():
        if any(c.__module__.startswith("torch.distributed.fsdp") for c in type(module).__mro__):
            raise TypeError(
                f"module {path!r}: expected ordinary parameters, got them under FSDP, which lays "
                "them out in buffers of its own; use the operations on lists of their local parts"
            )
    for name, param in params.items():
        if _is_special(param):
            raise TypeError(
                f"parameter {name!r}: expected an ordinary tensor, got {type(param).__name__}, "
                "which keeps its data in its own way; leave this model unflattened"
            )
        if param.device.type == "meta":
            raise ValueError(
                f"parameter {name!r}: expected a device with memory, got meta; "
                "give it data first: model.to_empty(device=...)"
            )
        if any(step == 0 and n > 1 for step, n in zip(param.stride(), param.shape, strict=True)):
            raise ValueError(
                f"parameter {name!r}: expected an element of memory for each of its own, got "
                f"strides {param.stride()}; make it nn.Parameter(parameter.detach().clone())"
            )
        if param.grad is not None:
            kind(f"gradient of parameter {name!r}", param.grad)
    _apart(model, params)


def like_parameters(tensors: Sequence[Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Raise unless there is one tensor for each parameter, of its shape."""
    if len(tensors) != len(shapes):
        raise ValueError(
            f"tensors: expected {len(shapes)}, one for each of names, got {len(tensors)}"
        )
    for index, (tensor, (name, shape)) in enumerate(zip(tensors, shapes.items(), strict=True)):
        kind(f"tensors[{index}]", tensor)
        if tensor.shape != shape:
            raise ValueError(
                f"tensors[{index}]: expected shape {tuple(shape)} of parameter {name!r}, "
                f"got {tuple(tensor.shape)}"
            )


def _is_special(tensor: Tensor) -> bool:
    """Whether it is lazy, or of a class that takes over PyTorch's operations, as DTensor does."""
    return (
        isinstance(tensor, UninitializedParameter)
        or type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    )


def _apart(model: nn.Module, params: Mapping[str, nn.Parameter]) -> None:
    """Raise where a parameter shares memory with another tensor of the model: moved, it wouldn't.

    Extents in order of their begin: one that begins before another's end overlaps it. An extent
    reaches over the gaps between strided elements.
    """
    everything = [*model.named_parameters(), *model.named_buffers()]
    extents = sorted(
        (*_extent(tensor), name)
        for name, tensor in everything
        if not _is_special(tensor) and tensor.layout == torch.strided and tensor.numel()
    )
    last_end, last_name = 0, ""
    for begin, end, name in extents:
        if begin < last_end and (name in params or last_name in params):
            raise ValueError(
                f"{name!r} and {last_name!r}: expected memory of their own, got shared memory, "
                "which flattening would part; let both be one Parameter, or clone one of them"
            )
        if end > last_end:
            last_end, last_name = end, name


def _extent(tensor: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()

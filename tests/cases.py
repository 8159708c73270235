"""Named lists of parameter shapes and layouts; one table for all operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Make = Callable[[torch.dtype], list[Tensor]]


def _randn(*shapes: tuple[int, ...]) -> Make:
    return lambda dtype: [torch.randn(shape).to(dtype) for shape in shapes]


def _misaligned(dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(n + 3).to(dtype)[offset : offset + n] for n, offset in ((77, 1), (1001, 3))]


def _channels_last(dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(4, 3, 5, 5).to(dtype).contiguous(memory_format=torch.channels_last)]


def _with_gaps(dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(6, 10).to(dtype)[:, ::2], torch.randn(50).to(dtype)]


LAYOUTS: dict[str, Make] = {
    "no_tensors": _randn(),
    "empty_tensor": _randn((0,), (3, 0, 2), (4,)),
    "one_element": _randn((1,)),
    "scalar": _randn(()),
    "odd_sizes": _randn((17,), (31, 7), (1, 1, 5)),
    "one_chunk_and_one": _randn((16385,)),
    "thousands_of_tiny": _randn(*[(3,)] * 3000),
    "one_large": _randn((1_000_003,)),
    "threads_get_unequal_tensors": _randn((100_000,), (5,), (7,), (60_000,)),
    "misaligned_views": _misaligned,
    "channels_last": _channels_last,
    "transposed": lambda dtype: [torch.randn(33, 20).to(dtype).t()],
    "strided_with_gaps": _with_gaps,
}

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

on_every_device = pytest.mark.usefixtures("device")
every_layout = pytest.mark.parametrize(
    "make", [pytest.param(make, id=name) for name, make in LAYOUTS.items()]
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def state_like(params: list[Tensor], positive: bool = False) -> list[Tensor]:
    """Return random state tensors laid out like the parameters."""
    made = []
    for param in params:
        dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
        state = torch.empty_strided(param.shape, param.stride(), dtype=dtype).normal_()
        made.append(state.abs_() if positive else state)
    return made


def copies(tensors: list[Tensor]) -> list[Tensor]:
    """Return copies with the same strides and the same misalignment."""
    made = []
    for tensor in tensors:
        lead = tensor.storage_offset() % 4
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        room = torch.zeros(lead + max(extent, 0) if tensor.numel() else 0, dtype=tensor.dtype)
        copy = torch.as_strided(room, tensor.shape, tensor.stride(), min(lead, room.numel()))
        made.append(copy.copy_(tensor))
    return made

"""The operations of consolidation and the proximal step, beside a copy of as many bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from harness import MismatchError, Provider, Result, measure, script
from layouts import Shape, layout
from torch import Tensor

from ewc_fast import functional, reference

EWC_FAST = "ewc_fast"
COPY = "torch copy of as many bytes"
COPIED_BYTES = 8  # a float32 read and written
TOLERANCE = 4 * torch.finfo(torch.float32).eps

Lists = tuple[list[Tensor], ...]


@dataclass(frozen=True)
class Operation:
    """An operation, the same by the reference, and what it moves."""

    call: Callable[..., object]
    reference: Callable[..., object]
    operands: tuple[torch.dtype, ...]
    written: int  # the first so many operands
    bytes_per_parameter: int


FP32, BF16 = torch.float32, torch.bfloat16
OPERATIONS = {
    "accumulate_square_": Operation(
        partial(functional.accumulate_square_, weight=0.5, plan=functional.Plan()),
        partial(reference.accumulate_square_, weight=0.5),
        operands=(FP32, FP32),
        written=1,
        bytes_per_parameter=12,
    ),
    "merge_": Operation(
        partial(functional.merge_, gamma=1.0),
        partial(reference.merge_, gamma=1.0),
        operands=(FP32, FP32, BF16, FP32, FP32),
        written=3,
        bytes_per_parameter=28,
    ),
    "proximal_step_": Operation(
        partial(functional.proximal_step_, ewc_lambda=400.0, lr=1e-4, plan=functional.Plan()),
        partial(reference.proximal_step_, ewc_lambda=400.0, lr=1e-4),
        operands=(FP32, FP32, FP32),
        written=1,
        bytes_per_parameter=16,
    ),
}


def suite(quick: bool) -> Result:
    """Measure all operations on one list of tensors."""
    elements, seconds = (1_000_000, 0.5) if quick else (10_000_000, 4.0)
    result = Result()
    for name, operation in OPERATIONS.items():
        timings = measure(providers(operation, layout("list", elements)), seconds=seconds)
        result.add(name, timings, (COPY,))
    return result


def providers(operation: Operation, shapes: Sequence[Shape]) -> dict[str, Provider]:
    """Return the operation on random operands, and the copy."""
    draw = torch.Generator().manual_seed(0)
    operands = tuple(
        [torch.rand(shape, generator=draw).to(dtype) for shape in shapes]
        for dtype in operation.operands
    )
    elements = sum(tensor.numel() for tensor in operands[0])
    source = torch.rand(elements * operation.bytes_per_parameter // COPIED_BYTES, generator=draw)
    target = torch.empty_like(source)
    return {
        EWC_FAST: Provider(
            partial(operation.call, *operands), partial(_check, operation, operands)
        ),
        COPY: Provider(partial(target.copy_, source), lambda: None),
    }


def _check(operation: Operation, operands: Lists) -> None:
    wanted = [[tensor.clone() for tensor in tensors] for tensors in operands]
    operation.call(*operands)
    operation.reference(*wanted)
    for position in range(operation.written):
        rows = zip(operands[position], wanted[position], strict=True)
        for index, (found, want) in enumerate(rows):
            # The residual is what rounding leaves of values near 1, hence absolute below 1.
            error = ((found - want).abs() / want.abs().clamp(min=1)).amax().item()
            if not error <= TOLERANCE:
                raise MismatchError(f"operand {position}, tensor {index}: error {error:.1e}")


if __name__ == "__main__":
    script(suite)

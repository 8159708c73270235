"""The operands of squared products."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ewc_fast._checks.operands import PARAM_DTYPES, kind, short, state_dtype

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Stride, padding and dilation, a number for each dimension."""


def squared_product(
    total: Tensor, grads: Tensor, inputs: Tensor, bias_total: Tensor | None
) -> None:
    """Raise unless total (O, I), grads (N, T, O), inputs (N, T, I) and bias_total (O) fit."""
    _kinds(total, grads, inputs, bias_total)
    _dimensions("total", total, "(O, I)", 2)
    _dimensions("grads", grads, "(N, T, O)", 3)
    _dimensions("inputs", inputs, "(N, T, I)", 3)
    samples, positions, rows = grads.shape
    _shape("inputs", inputs, (samples, positions, inputs.shape[2]), "(N, T, I) beside grads")
    _shape("total", total, (rows, inputs.shape[2]), "(O, I) of grads (N, T, O), inputs (N, T, I)")
    _bias(bias_total, rows)
    _written("total", total)
    if total.shape[1] > 1 and total.stride(1) != 1:
        raise ValueError(
            f"total: expected contiguous rows (a column stride of 1), got {total.stride(1)}; "
            "pass a contiguous tensor"
        )
    _apart(total, grads, inputs, bias_total)


def squared_convolution(
    total: Tensor,
    grads: Tensor,
    inputs: Tensor,
    bias_total: Tensor | None,
    *,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> Geometry:
    """Raise unless the operands are those of a convolution; return its geometry."""
    _kinds(total, grads, inputs, bias_total)
    if not 3 <= inputs.dim() <= 5:
        raise ValueError(
            "inputs: expected (N, I, *size) with 1 to 3 dimensions of size, got shape "
            f"{tuple(inputs.shape)}; add a sample dimension with .unsqueeze(0) if it lacks one"
        )
    dims = inputs.dim() - 2
    _dimensions("grads", grads, "(N, O, *positions) like inputs", dims + 2)
    _dimensions("total", total, "(O, I / groups, *kernel) like inputs", dims + 2)
    geometry = (
        _each("stride", stride, dims, 1),
        _each("padding", padding, dims, 0),
        _each("dilation", dilation, dims, 1),
    )
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"groups: expected an integer, got {type(groups).__name__}")
    samples, columns = inputs.shape[:2]
    rows, kernel = grads.shape[1], tuple(total.shape[2:])
    if groups < 1 or rows % groups or columns % groups:
        raise ValueError(
            f"groups: expected a divisor of the channels of grads ({rows}) and inputs "
            f"({columns}), got {groups}"
        )
    _shape("total", total, (rows, columns // groups, *kernel), "(O, I / groups, *kernel)")
    if 0 in kernel:
        raise ValueError(f"total: expected a kernel of at least one element, got {kernel}")
    _shape("grads", grads, (samples, rows, *grads.shape[2:]), "(N, O, *positions) beside inputs")
    _bias(bias_total, rows)
    _positions(grads, inputs, kernel, geometry)
    if not total.is_contiguous():
        raise ValueError(
            "total: expected a contiguous tensor, got strides "
            f"{total.stride()}; pass a .contiguous() one and copy it back"
        )
    _written("total", total)
    _apart(total, grads, inputs, bias_total)
    return geometry


def _positions(grads: Tensor, inputs: Tensor, kernel: tuple[int, ...], geometry: Geometry) -> None:
    """Raise unless a convolution of this geometry, or a transposed one, has these positions.

    What is left of the input behind the last position is less than a step of the convolution; of
    a transposed one, whose output can be padded by less than a dilation too, less than the larger.
    """
    wanted = []
    for size, length, step, pad, spread in zip(inputs.shape[2:], kernel, *geometry, strict=True):
        room = size + 2 * pad - spread * (length - 1) - 1
        last = room // step + 1 if room >= 0 else 0
        wanted.append(range(max(0, last - (max(step, spread) - 1) // step), last + 1))
    found = tuple(grads.shape[2:])
    if not all(size in allowed for size, allowed in zip(found, wanted, strict=True)):
        stride, padding, dilation = geometry
        raise ValueError(
            f"grads: expected positions {tuple(allowed[-1] for allowed in wanted)}, which inputs "
            f"of size {tuple(inputs.shape[2:])}, kernel {kernel}, stride {stride}, padding "
            f"{padding} and dilation {dilation} have, got {found}; pass the layer's own numbers"
        )


def _kinds(total: Tensor, grads: Tensor, inputs: Tensor, bias_total: Tensor | None) -> None:
    named = {"total": total, "grads": grads, "inputs": inputs}
    if bias_total is not None:
        named["bias_total"] = bias_total
    for name, tensor in named.items():
        kind(name, tensor)
    for name in ("grads", "inputs"):
        if named[name].dtype not in PARAM_DTYPES:
            raise TypeError(
                f"{name}: expected a floating dtype (float32, float64, bfloat16, float16), got "
                f"{short(named[name].dtype)}"
            )
    wanted = state_dtype(grads.dtype)
    if state_dtype(inputs.dtype) != wanted:
        raise TypeError(
            f"inputs: expected a dtype to go with grads of {short(grads.dtype)}, got "
            f"{short(inputs.dtype)}; convert one of them"
        )
    for name in ("total", "bias_total"):
        if name in named and named[name].dtype != wanted:
            raise TypeError(
                f"{name}: expected {short(wanted)} beside grads of {short(grads.dtype)}, got "
                f"{short(named[name].dtype)}; convert it with .to(torch.{short(wanted)})"
            )
    for name, tensor in named.items():
        if tensor.device != total.device:
            raise ValueError(
                f"{name}: expected device {total.device} like total, got {tensor.device}; "
                f"move it with .to({str(total.device)!r})"
            )


def _dimensions(name: str, tensor: Tensor, wanted: str, dims: int) -> None:
    if tensor.dim() != dims:
        raise ValueError(
            f"{name}: expected {dims} dimensions {wanted}, got shape {tuple(tensor.shape)}"
        )


def _shape(name: str, tensor: Tensor, wanted: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != wanted:
        raise ValueError(f"{name}: expected shape {wanted}, {meaning}, got {tuple(tensor.shape)}")


def _bias(bias_total: Tensor | None, rows: int) -> None:
    if bias_total is not None:
        _shape("bias_total", bias_total, (rows,), "(O,)")
        _written("bias_total", bias_total)


def _written(name: str, tensor: Tensor) -> None:
    """Raise where two elements of a written tensor share their place."""
    reach = 1
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and step < reach:
            raise ValueError(
                f"{name}: expected elements of their own, since it is written, got an expanded "
                f"tensor of strides {tensor.stride()}; pass a clone"
            )
        reach += (size - 1) * step


def _apart(total: Tensor, grads: Tensor, inputs: Tensor, bias_total: Tensor | None) -> None:
    operands = {"grads": grads, "inputs": inputs}
    written = {"total": total} | ({} if bias_total is None else {"bias_total": bias_total})
    for name, tensor in written.items():
        for other, operand in (operands | {n: t for n, t in written.items() if n < name}).items():
            if _overlap(tensor, operand):
                raise ValueError(
                    f"{name}: expected memory of its own, since it is written, but it shares "
                    f"memory with {other}; pass a clone of one of them"
                )


def _overlap(one: Tensor, other: Tensor) -> bool:
    (begin, end), (other_begin, other_end) = _extent(one), _extent(other)
    return begin < other_end and other_begin < end


def _extent(tensor: Tensor) -> tuple[int, int]:
    if tensor.numel() == 0 or tensor.is_meta:
        return 0, 0
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def _each(name: str, value: int | Sequence[int], dims: int, least: int) -> tuple[int, ...]:
    numbers = (value,) * dims if isinstance(value, int) else tuple(value)
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        raise TypeError(f"{name}: expected an integer or one for each dimension, got {value!r}")
    if len(numbers) != dims or min(numbers) < least:
        raise ValueError(
            f"{name}: expected {dims} integers >= {least}, one for each dimension, got {value!r}"
        )
    return numbers

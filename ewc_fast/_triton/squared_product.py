r"""The squared product on tensor cores: prepares and launches :mod:`.product_kernels`.

Results are the same bits whenever the shapes, strides and number of multiprocessors are: no atomics.

Error of F, with u = 2^-24: a sample's sum is wrong by e = (T + 1) u sum_t |g a|, as any float32 sum,
twice that at most where tensor cores cut sums off instead of rounding them, and by what the factors
lose (:data:`.product_plan.Precision`); F by sum_n (2 |sum_t g a| e + e^2) + (N + 3) u F.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ewc_fast._triton import interpreted
from ewc_fast._triton.product_kernels import add_splits_kernel, squared_product_kernel
from ewc_fast._triton.product_plan import Operand, Plan, Precision, dot, plan, tiles_of

BAND = 8
"""Tiles beside which the next column of tiles begins: a band's operands stay in L2."""

BLOCK = 1024
"""Entries of a program that adds up splits."""


def add_squared_product_(
    total: Tensor,
    grads: Tensor,
    inputs: Tensor,
    bias_total: Tensor | None,
    *,
    float32: Precision = "tf32x3",
    layout: Plan | None = None,
) -> None:
    """Add sum_n (sum_t g a)^2 to total (O, I), sum_n (sum_t g)^2 to bias_total (O,).

    grads (N, T, O), inputs (N, T, I); ``layout`` is for tests, others are as fast or slower.
    """
    one_position = grads.shape[1] == 1
    if one_position:  # sum_n g^2 a^2: the samples are the positions of one product
        grads, inputs = grads.transpose(0, 1), inputs.transpose(0, 1)
    if grads.shape[0] * grads.shape[1] * total.shape[0] == 0:
        return
    pair = Operand.of(grads), Operand.of(inputs)
    layout = layout or _plan(total, grads, inputs, pair, one_position, float32)
    _launch(total, grads, inputs, bias_total, pair, layout, one_position, float32, (None, None))


def add_ragged_squared_product_(
    total: Tensor,
    grads: Tensor,
    inputs: Tensor,
    offsets: Tensor,
    bias_total: Tensor | None,
    *,
    float32: Precision = "tf32x3",
    layout: Plan | None = None,
) -> None:
    """Do so for samples of unequal length, packed: grads (R, O), inputs (R, I).

    Sample n has rows ``offsets[n]`` to ``offsets[n + 1]``, int32 or int64 on the same device, which
    rise from 0 to R. Nothing waits for the device.
    """
    samples = len(offsets) - 1
    if samples < 1 or grads.numel() == 0:
        return
    grads, inputs = grads.unsqueeze(0), inputs.unsqueeze(0)
    pair = Operand.of(grads, ragged=True), Operand.of(inputs, ragged=True)
    mean = -(-grads.shape[1] // samples)
    if layout is None:
        like = grads[0, :1].expand(samples, mean, -1)
        layout = _plan(total, like, inputs, pair, False, float32)
    tables = _ragged_steps(offsets, grads.shape[1], layout)
    _launch(total, grads, inputs, bias_total, pair, layout, False, float32, tables)


def _plan(
    total: Tensor,
    grads: Tensor,
    inputs: Tensor,
    pair: tuple[Operand, Operand],
    one_position: bool,
    float32: Precision,
) -> Plan:
    precision, widened = dot(grads.dtype, inputs.dtype, one_position, float32)
    sizes = (grads.element_size(), inputs.element_size())
    least = min(o.vector * size for o, size in zip(pair, sizes, strict=True))
    tiles = tiles_of(grads.dtype, precision, widened, least)
    samples, positions = grads.shape[:2]
    processors = 1
    if total.is_cuda:
        processors = torch.cuda.get_device_properties(total.device).multi_processor_count
    return plan(tiles, samples, positions, *total.shape, processors)


def _launch(
    total: Tensor,
    grads: Tensor,
    inputs: Tensor,
    bias_total: Tensor | None,
    pair: tuple[Operand, Operand],
    layout: Plan,
    one_position: bool,
    float32: Precision,
    ragged: tuple[Tensor | None, Tensor | None],
) -> None:
    rows, columns = total.shape
    tile, split = layout.tile, layout.split
    precision, widened = dot(grads.dtype, inputs.dtype, one_position, float32)
    if interpreted():  # it multiplies the bits of bfloat16
        widened = widened or grads.dtype == torch.bfloat16
    direct = split.count == 1
    out, bias_out, out_split, out_row = total, bias_total, 0, total.stride(0)
    if not direct:
        length = -(-(rows * columns + rows) // 4) * 4
        out = total.new_empty(split.count, length)
        bias_out = None if bias_total is None else out[:, rows * columns :]
        out_split, out_row = length, columns
    vector = 4 if out_row % 4 == 0 and columns % 4 == 0 and out.data_ptr() % 16 == 0 else 1
    tiles = tile.count(rows, columns)
    bias_tiles = 0 if bias_total is None else -(-rows // tile.rows)
    with _current(total.device):
        squared_product_kernel[tiles + bias_tiles, split.count](
            out, bias_out, grads, inputs, *ragged, grads.shape[1], rows, columns,
            split.steps, split.chunks, split.group_steps, out_split // vector, out_row // vector,
            bias_total.stride(0) if bias_total is not None and direct else 1,
            *pair[0].strides, *pair[1].strides,
            ROWS=tile.rows, COLUMNS=tile.columns, POSITIONS=tile.positions, GROUP=BAND,
            PRECISION=precision, WIDEN=widened, SQUARED_OPERANDS=one_position,
            SQUARED_SUMS=not (one_position or split.cuts_samples), ADD=direct,
            GRADS_ALONG=pair[0].along, GRADS_VECTOR=pair[0].vector,
            INPUTS_ALONG=pair[1].along, INPUTS_VECTOR=pair[1].vector, OUT_VECTOR=vector,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        if not direct:
            squares_left = split.cuts_samples and not one_position
            groups = split.count // split.chunks if squares_left else 1
            add_splits_kernel[(-(-out_split // BLOCK),)](
                total, bias_total, out, groups, split.count // groups, out_split // 4,
                rows, columns, total.stride(0), 1 if bias_total is None else bias_total.stride(0),
                BLOCK=BLOCK, SQUARED_SUMS=squares_left,
            )  # fmt: skip


def _ragged_steps(offsets: Tensor, rows: int, layout: Plan) -> tuple[Tensor, Tensor]:
    """Return each step's first row and the rows its sample has from there; each split's first step.

    There is room for as many steps as there can be: every sample's last one may be short.
    """
    positions, splits = layout.tile.positions, layout.split
    starts, lengths = offsets[:-1].long(), offsets.diff().long()
    counts = (lengths + positions - 1).div(positions, rounding_mode="floor")
    ends = counts.cumsum(0)
    step = torch.arange(rows // positions + len(lengths), device=offsets.device)
    sample = torch.searchsorted(ends, step, right=True).clamp_(max=len(lengths) - 1)
    passed = (step - (ends - counts)[sample]) * positions
    table = torch.stack([starts[sample] + passed, lengths[sample] - passed], 1)
    share = -(-len(lengths) // splits.count)
    cuts = torch.arange(splits.count + 1, device=offsets.device) * share
    bounds = torch.cat([ends.new_zeros(1), ends])[cuts.clamp_(max=len(lengths))]
    return table, bounds.int()


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a tensor's device the current one, which is where Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

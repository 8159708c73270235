r"""The squared product on tensor cores: prepares and launches :mod:`.product_kernels`.

Equal shapes, strides and numbers of multiprocessors give equal bits: there are no atomics.

Error of F, with u = 2^-24: a sample's sum is wrong by e = (T + 1) u sum_t |g a|, like any float32
sum, twice that at most where tensor cores cut sums off instead of rounding them, and by what the
factors lose (:data:`.product_plan.Precision`); F by sum_n (2 |sum_t g a| e + e^2) + (N + 3) u F.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ewc_fast._triton import interpreted
from ewc_fast._triton.device import current
from ewc_fast._triton.product_kernels import add_splits_kernel, squared_product_kernel
from ewc_fast._triton.product_plan import (
    Operand,
    Plan,
    Precision,
    Split,
    dot,
    plan,
    tiles_of,
    whole_samples,
)

BAND = 8
"""Tiles beside which the next column of tiles begins: a band's operands stay in L2."""

BLOCK = 1024
"""Entries of a program that adds up splits."""


@dataclass(frozen=True)
class Product:
    """The two sides of a product as the kernel takes them: (samples, positions, features)."""

    grads: Tensor
    inputs: Tensor
    layouts: tuple[Operand, Operand]
    one_position: bool
    precision: Precision
    widened: bool

    @classmethod
    def of(cls, grads: Tensor, inputs: Tensor, float32: Precision, ragged: bool = False) -> Product:
        """Return the product of grads (N, T, O) and inputs (N, T, I)."""
        one_position = grads.shape[1] == 1 and not ragged
        if one_position:  # sum_n g^2 a^2: the samples are the positions of one product
            grads, inputs = grads.transpose(0, 1), inputs.transpose(0, 1)
        layouts = Operand.of(grads, ragged), Operand.of(inputs, ragged)
        return cls(
            grads,
            inputs,
            layouts,
            one_position,
            *dot(grads.dtype, inputs.dtype, one_position, float32),
        )

    def plan(self, total: Tensor, samples: int, positions: int) -> Plan:
        """Return the plan for so many samples and positions on the total's device."""
        sides = zip((self.grads, self.inputs), self.layouts, strict=True)
        least_bytes = min(t.element_size() * layout.vector for t, layout in sides)
        tiles = tiles_of(self.grads.dtype, self.precision, self.widened, least_bytes)
        processors = 1
        if total.is_cuda:
            processors = torch.cuda.get_device_properties(total.device).multi_processor_count
        rows, columns = total.shape
        return plan(tiles, samples, positions, rows, columns, processors)


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

    grads (N, T, O), inputs (N, T, I); ``layout`` is for tests and benchmarks.
    """
    if grads.numel() == 0:
        return
    product = Product.of(grads, inputs, float32)
    layout = layout or product.plan(total, *product.grads.shape[:2])
    _launch(total, bias_total, product, layout, (None, None))


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

    Sample n has rows ``offsets[n]`` to ``offsets[n + 1]``, integers on the same device, which rise
    from 0 to R. Nothing waits for the device.
    """
    samples = len(offsets) - 1
    if samples < 1 or grads.numel() == 0:
        return
    product = Product.of(grads.unsqueeze(0), inputs.unsqueeze(0), float32, ragged=True)
    layout = layout or product.plan(total, samples, -(-len(grads) // samples))
    layout = Plan(layout.tile, whole_samples(layout.split, samples))
    _launch(total, bias_total, product, layout, _ragged_steps(offsets, len(grads), layout))


def _launch(
    total: Tensor,
    bias_total: Tensor | None,
    product: Product,
    layout: Plan,
    ragged: tuple[Tensor | None, Tensor | None],
) -> None:
    """Add to the totals where each tile has one program; otherwise leave room for every split."""
    with current(total.device):
        if layout.split.count == 1:
            _launch_product(total, bias_total, 0, product, layout, ragged)
            return
        weights = total.numel()
        length = -(-(weights + len(total)) // 16) * 16  # Triton then knows that it is a multiple
        partials = total.new_empty(layout.split.count, length)
        out = partials[0, :weights].view(total.shape)
        bias_out = None if bias_total is None else partials[0, weights : weights + len(total)]
        _launch_product(out, bias_out, length, product, layout, ragged)
        _add_splits(total, bias_total, partials, layout.split, product.one_position)


def _launch_product(
    out: Tensor,
    bias_out: Tensor | None,
    out_split: int,  # elements from one split's to the next one's; 0: add to what is there
    product: Product,
    layout: Plan,
    ragged: tuple[Tensor | None, Tensor | None],
) -> None:
    (rows, columns), tile, split = out.shape, layout.tile, layout.split
    grads, inputs = product.layouts
    # Triton's interpreter multiplies the bits of bfloat16.
    widened = product.widened or (interpreted() and product.grads.dtype == torch.bfloat16)
    vector = 4 if (columns | out.stride(0)) % 4 == 0 and out.data_ptr() % 16 == 0 else 1
    bias_tiles = 0 if bias_out is None else -(-rows // tile.rows)
    squared_product_kernel[tile.count(rows, columns) + bias_tiles, split.count](
        out, bias_out, product.grads, product.inputs, *ragged,
        product.grads.shape[1], rows, columns, split.steps, split.chunks, split.group_steps,
        out_split, out.stride(0) // vector, 1 if bias_out is None else bias_out.stride(0),
        *grads.strides, *inputs.strides,
        ROWS=tile.rows, COLUMNS=tile.columns, POSITIONS=tile.positions, GROUP=BAND,
        PRECISION=product.precision, WIDEN=widened, SQUARED_OPERANDS=product.one_position,
        SQUARED_SUMS=not (product.one_position or split.cuts_samples), ADD=out_split == 0,
        GRADS_ALONG=grads.along, GRADS_VECTOR=grads.vector,
        INPUTS_ALONG=inputs.along, INPUTS_VECTOR=inputs.vector, OUT_VECTOR=vector,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _add_splits(
    total: Tensor, bias_total: Tensor | None, partials: Tensor, split: Split, one_position: bool
) -> None:
    are_parts = split.cuts_samples and not one_position
    groups = split.count // split.chunks if are_parts else 1
    length = partials.shape[1]
    add_splits_kernel[(-(-length // BLOCK),)](
        total, bias_total, partials, groups, split.count // groups, length,
        *total.shape, total.stride(0), 1 if bias_total is None else bias_total.stride(0),
        BLOCK=BLOCK, SQUARED_SUMS=are_parts,
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

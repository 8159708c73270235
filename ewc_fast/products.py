r"""Sums of squared per-sample gradients, straight from a layer's inputs and output gradients.

With g the gradients at a layer's outputs and a its inputs, the gradient of sample n with respect to
the weight is :math:`\sum_t g_{nto} a_{nti}` over positions t, and its Fisher diagonal needs

.. math:: F_{oi} \mathrel{+}= \sum_n \Bigl(\sum_t g_{nto}\, a_{nti}\Bigr)^2 .

The operations here form it without keeping per-sample gradients, at about the cost of the ordinary
weight gradient. Arithmetic is in the total's dtype, float32, or float64 beside float64 operands.
Results repeat bit for bit for any number of threads. A call that raises has written nothing.

``impl`` is ``"cpu"`` (the native kernel), ``"triton"`` (tensor cores), ``"reference"`` (PyTorch) or
``"auto"``, which on the CPU chooses between the kernel and PyTorch's own products by
:func:`ewc_fast._dispatch.product_way`, on CUDA takes Triton where it is installed, and elsewhere
the reference.

Triton multiplies bfloat16 and float16 exactly, and float32 in three passes of TF32, each product
with an error of at most twelve float32 roundings. Only where PyTorch was told to use TF32 for its
matrix products (``torch.backends.cuda.matmul.fp32_precision = "tf32"``) does one pass do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ewc_fast import _checks, _engine, _triton, reference
from ewc_fast._dispatch import Impl, choose, product_way
from ewc_fast._native import core, cuda_unavailable, reader

__all__ = ["accumulate_squared_convolution_", "accumulate_squared_product_"]

CHUNK_BYTES = 2 << 20
"""Of per-sample products that stay in the cache between PyTorch's product and the squaring."""

REFERENCE_BYTES = 64 << 20
"""Of per-sample products that the reference may form at a time."""


def accumulate_squared_product_(
    total: Tensor,
    grads: Tensor,
    inputs: Tensor,
    *,
    bias_total: Tensor | None = None,
    impl: Impl = "auto",
) -> None:
    r"""Add a linear layer's squared per-sample gradients to ``total``, and the bias's.

    .. math::
        \text{total}_{oi} \mathrel{+}= \sum_n \Bigl(\sum_t g_{nto}\, a_{nti}\Bigr)^2, \qquad
        \text{bias\_total}_o \mathrel{+}= \sum_n \Bigl(\sum_t g_{nto}\Bigr)^2

    ``total`` is (O, I) with contiguous rows, ``grads`` (N, T, O) and ``inputs`` (N, T, I) have any
    strides, ``bias_total`` is (O,).

    >>> import torch
    >>> total, grads = torch.zeros(1, 2), torch.tensor([[[1.0], [2.0]]])
    >>> accumulate_squared_product_(total, grads, torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]))
    >>> total.tolist()
    [[9.0, 4.0]]
    """
    _checks.impl(impl)
    _checks.squared_product(total, grads, inputs, bias_total)
    total, grads, inputs = total.detach(), grads.detach(), inputs.detach()
    bias_total = None if bias_total is None else bias_total.detach()
    add_squared_product_(total, grads, inputs, bias_total, impl)


def add_squared_product_(
    total: Tensor, grads: Tensor, inputs: Tensor, bias_total: Tensor | None, impl: Impl = "auto"
) -> None:
    """Do the work of :func:`accumulate_squared_product_`, on detached operands that fit."""
    chosen = _implementation(impl, "accumulate_squared_product_", total)
    if chosen == "triton":
        from ewc_fast._triton import squared_product
        from ewc_fast._triton.precision import float32_precision

        squared_product.add_squared_product_(
            total, grads, inputs, bias_total, float32=float32_precision()
        )
        _mark_written(total, bias_total)
    elif chosen == "reference":
        samples = _samples_at_once(REFERENCE_BYTES, total)
        for g, a in zip(grads.split(samples), inputs.split(samples), strict=True):
            reference.accumulate_squared_product_(total, g, a, bias_total=bias_total)
    elif impl == "cpu" or _way(total, grads) == "kernel":
        core.squared_product(reader, total, grads, inputs, bias_total, torch.get_num_threads())
        _mark_written(total, bias_total)
    else:
        by_library(total, grads, inputs, bias_total)


def accumulate_squared_convolution_(
    total: Tensor,
    grads: Tensor,
    inputs: Tensor,
    *,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    bias_total: Tensor | None = None,
    impl: Impl = "auto",
) -> None:
    r"""Add a convolution's squared per-sample gradients to ``total``, and the bias's.

    The formula of :func:`accumulate_squared_product_`, where position t of the output meets kernel
    element k at place :math:`t \cdot \text{stride} + k \cdot \text{dilation} - \text{padding}` of
    the input, zero outside.

    ``total`` is (O, I / groups, \*kernel), contiguous; ``grads`` (N, O, \*positions) and ``inputs``
    (N, I, \*size), in one to three dimensions, have any strides.

    Of a transposed convolution swap the two: ``total`` is its weight's (I, O / groups, \*kernel),
    ``grads`` are the layer's inputs and ``inputs`` the gradients at its outputs. The bias then is
    the caller's: the squared sum of each sample's gradients.

    >>> import torch
    >>> total = torch.zeros(1, 1, 2)
    >>> accumulate_squared_convolution_(
    ...     total, torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0, 0.0, 1.0]]]),
    ...     stride=1, padding=0, dilation=1, groups=1,
    ... )
    >>> total.tolist()
    [[[1.0, 4.0]]]
    """
    _checks.impl(impl)
    geometry = _checks.squared_convolution(
        total,
        grads,
        inputs,
        bias_total,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )
    total, grads, inputs = total.detach(), grads.detach(), inputs.detach()
    bias_total = None if bias_total is None else bias_total.detach()
    chosen = _implementation(impl, "accumulate_squared_convolution_", total)
    if chosen == "reference":
        samples = _samples_at_once(REFERENCE_BYTES, total)
        for g, a in zip(grads.split(samples), inputs.split(samples), strict=True):
            reference.accumulate_squared_convolution_(
                total,
                g,
                a,
                stride=geometry[0],
                padding=geometry[1],
                dilation=geometry[2],
                groups=groups,
                bias_total=bias_total,
            )
        return
    # In three dimensions; those that are missing have size 1, stride 1, no padding.
    missing = 5 - inputs.dim()
    total, grads, inputs = (
        t.reshape(*t.shape[:2], *[1] * missing, *t.shape[2:]) for t in (total, grads, inputs)
    )
    stride, padding, dilation = geometry
    places = ((1,) * missing + stride, (0,) * missing + padding, (1,) * missing + dilation)
    if chosen == "triton":
        from ewc_fast._triton.convolution import add_squared_convolution_

        add_squared_convolution_(total, grads, inputs, bias_total, places, groups)
    else:
        _by_kernel(total, grads, inputs, bias_total, places, groups)
    _mark_written(total, bias_total)


def _by_kernel(
    total: Tensor,
    grads: Tensor,
    inputs: Tensor,
    bias_total: Tensor | None,
    places: tuple[tuple[int, ...], ...],
    groups: int,
) -> None:
    depthwise = groups > 1 and grads.shape[1] == inputs.shape[1] == groups
    for rows, columns in _parts(groups, grads.shape[1], inputs.shape[1]):
        core.squared_convolution(
            reader,
            total[rows],
            grads[:, rows],
            inputs[:, columns],
            None if bias_total is None else bias_total[rows],
            places[0],
            places[1],
            places[2],
            depthwise,
            torch.get_num_threads(),
        )


def _way(total: Tensor, grads: Tensor) -> str:
    samples, positions, rows = grads.shape
    return product_way(samples, positions, rows, total.shape[1], total.dtype)


def _parts(groups: int, rows: int, columns: int) -> list[tuple[slice, slice]]:
    """Return which channels of grads meet which of inputs in one call of the kernel.

    Usually those of one group. Of a depthwise convolution, all groups' at once.
    """
    if groups > 1 and rows == columns == groups:
        return [(slice(None), slice(None))]
    return [
        (
            slice(g * rows // groups, (g + 1) * rows // groups),
            slice(g * columns // groups, (g + 1) * columns // groups),
        )
        for g in range(groups)
    ]


def by_library(total: Tensor, grads: Tensor, inputs: Tensor, bias_total: Tensor | None) -> None:
    """Chunks of per-sample products that stay in the cache, then their squares."""
    grads, inputs = grads.to(total.dtype), inputs.to(total.dtype)
    if grads.shape[1] == 1:
        squares = grads[:, 0].square()
        total.addmm_(squares.t(), inputs[:, 0].square())
        if bias_total is not None:
            bias_total.add_(squares.sum(0))
        return
    samples = min(_samples_at_once(CHUNK_BYTES, total), grads.shape[0])
    products = total.new_empty(samples, *total.shape)
    for g, a in zip(grads.split(samples), inputs.split(samples), strict=True):
        chunk = torch.bmm(g.transpose(1, 2), a, out=products[: g.shape[0]])
        _engine.accumulate_square_([total], [chunk], 1.0)
    if bias_total is not None:
        bias_total.add_(grads.sum(1).square().sum(0))


def _samples_at_once(most_bytes: int, total: Tensor) -> int:
    return max(1, most_bytes // max(1, total.numel() * total.element_size()))


def _implementation(impl: Impl, operation: str, total: Tensor) -> Impl:
    why_no_cuda = cuda_unavailable() if impl == "cuda" else None
    why_no_triton = _triton.unavailable(total.device.type)
    return choose(impl, operation, total.device.type, True, why_no_cuda, why_no_triton)


def _mark_written(total: Tensor, bias_total: Tensor | None) -> None:
    """Tell autograd, which did not see the write."""
    torch.autograd.graph.increment_version([t for t in (total, bias_total) if t is not None])

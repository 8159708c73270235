"""Which kernel takes a convolution."""

from __future__ import annotations

from torch import Tensor

from ewc_fast._triton.blocks import Geometry
from ewc_fast._triton.squared_convolution import accumulate_squared_convolution_
from ewc_fast._triton.squared_depthwise import accumulate_squared_depthwise_


def add_squared_convolution_(
    total: Tensor,
    grads: Tensor,
    inputs: Tensor,
    bias_total: Tensor | None,
    places: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    groups: int,
) -> None:
    """Add squared gradients, in three dimensions; ``places`` are stride, padding and dilation."""
    geometry = Geometry(*places)
    if inputs.shape[1] == groups > 1:
        accumulate_squared_depthwise_(total, grads, inputs, bias_total, geometry)
    else:
        accumulate_squared_convolution_(total, grads, inputs, bias_total, geometry, groups)

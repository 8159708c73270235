"""How tensor cores multiply float32 numbers."""

from __future__ import annotations

from typing import Literal

import torch

InputPrecision = Literal["ieee", "tf32", "tf32x3"]


def input_precision(
    dtype: torch.dtype, operation: Literal["product", "convolution"]
) -> InputPrecision:
    """Return the precision of products of operands of a dtype.

    Three passes of TF32 are as good as float32. One pass, whose operands are rounded to 11 bits,
    is taken only where PyTorch was told to take it for products too: its permission for
    convolutions alone is given by default, and no sign that a Fisher may lose digits.
    """
    if dtype != torch.float32:
        return "ieee"
    allowed = torch.backends.cuda.matmul.allow_tf32
    if operation == "convolution":
        allowed = allowed and torch.backends.cudnn.allow_tf32
    return "tf32" if allowed else "tf32x3"

"""How tensor cores multiply float32 numbers."""

from __future__ import annotations

from typing import Literal

import torch


def product_precision(dtype: torch.dtype) -> Literal["ieee", "tf32", "tf32x3"]:
    """Return the precision of products of two operands of a dtype.

    Three passes of TF32 are nearly as good as float32. One pass, whose operands are rounded to 11
    bits, is taken where PyTorch was told to take it for matrix products, of convolutions too: the
    setting for convolutions allows TF32 by default and is no sign that a Fisher may lose digits.
    """
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # Reading allow_tf32 raises where this newer setting, of PyTorch 2.9, was used.
    setting = getattr(matmul, "fp32_precision", None)
    allowed = matmul.allow_tf32 if setting in (None, "none") else setting == "tf32"
    return "tf32" if allowed else "tf32x3"

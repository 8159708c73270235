"""How tensor cores multiply float32 numbers, in products and convolutions alike."""

from __future__ import annotations

import torch

from ewc_fast._triton.product_plan import Precision


def float32_precision() -> Precision:
    """Return how float32 is multiplied: TF32 where PyTorch was told to use it for its products.

    In convolutions, too: PyTorch's own setting for them allows TF32 by default, and is no sign that
    a Fisher may lose digits.
    """
    matmul = torch.backends.cuda.matmul
    # Reading allow_tf32 raises where this newer setting, of PyTorch 2.9, was used.
    setting = getattr(matmul, "fp32_precision", None)
    allowed = matmul.allow_tf32 if setting is None else setting == "tf32"
    return "tf32" if allowed else "tf32x3"

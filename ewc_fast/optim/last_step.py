"""What a step leaves behind for whoever wants to read it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class LastStep:
    """The penalty before it: apart, as compiled code sets no attributes of optimizers."""

    penalty: Tensor | None = None

"""The strength of a penalty: lambda as people set it, and as compiled graphs read it."""

from __future__ import annotations

import torch
from torch import Tensor

from ewc_fast import _checks


class Strength:
    """Base of what has a penalty with a ``ewc_lambda``."""

    @property
    def ewc_lambda(self) -> float:
        """Strength of the penalty; assign at any time, also from a schedule."""
        return self._ewc_lambda

    @ewc_lambda.setter
    def ewc_lambda(self, value: float) -> None:
        self._ewc_lambda = _checks.non_negative("ewc_lambda", value)
        self._graph_lambda = torch.tensor(self._ewc_lambda, dtype=torch.float64, device="cpu")

    @property
    def strength(self) -> float | Tensor:
        """The strength as operations take it: inside ``torch.compile`` a tensor.

        So a compiled graph holds for every value, and a schedule of lambda recompiles nothing.
        """
        return self._graph_lambda if torch.compiler.is_compiling() else self._ewc_lambda

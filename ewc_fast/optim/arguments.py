"""What all optimizers demand of their EWC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ewc_fast import _checks
from ewc_fast.ewc import EWC


def check_ewc(ewc: EWC, param_groups: Sequence[dict[str, Any]]) -> None:
    """Raise unless the EWC tracks some of the parameters, after it took up the model's new ones."""
    if not isinstance(ewc, EWC):
        raise TypeError(f"ewc: expected an ewc_fast.EWC, got {type(ewc).__name__}")
    ewc.track()
    held = {id(p) for group in param_groups for p in group["params"]}
    if held.isdisjoint(map(id, ewc.parameters.values())):
        raise ValueError(
            "optimizer: holds none of the parameters that ewc tracks; build both from the "
            "same model, after moving it to its device"
        )


def check_mode(mode: str) -> None:
    """Raise unless ``mode`` is one of the two."""
    _checks.one_of("mode", mode, ("gradient", "proximal"))

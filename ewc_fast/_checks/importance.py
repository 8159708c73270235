"""What a saved state says of the importance that was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ewc_fast._checks.operands import kind

IMPORTANCES = ("fisher", "mas", "si", "l2")


def state_importance(
    state: Mapping[str, Any], importance: str, params: Mapping[str, Tensor], *, strict: bool
) -> None:
    """Raise unless a saved state holds this importance, and its paths if it is SI's."""
    found = state.get("importance", "fisher")  # states from before there were others
    if found != importance:
        raise ValueError(
            f"state: its importance is {found!r}, but this EWC measures {importance!r}, and the "
            f"two can't be added up; build it as EWC(..., importance={found!r})"
        )
    if importance != "si":
        return
    for field in ("omega", "start"):
        if field not in state:
            raise ValueError(f"state: truncated, it lacks {field!r} of the path so far")
    if set(state["omega"]) != set(state["start"]):
        raise ValueError("state: truncated, omega and start name different parameters")
    unknown = sorted(set(state["omega"]) - set(params))
    if unknown and strict:
        raise ValueError(
            f"state: of another model, this one has no parameter {unknown[0]!r}, whose path it "
            "holds; pass strict=False to keep it for later"
        )
    for field in ("omega", "start"):
        for name in set(state[field]) & set(params):
            tensor = state[field][name]
            kind(f"state[{field!r}][{name!r}]", tensor)
            if tensor.shape != params[name].shape:
                raise ValueError(
                    f"state[{field!r}][{name!r}]: expected shape {tuple(params[name].shape)} of "
                    f"the parameter, got {tuple(tensor.shape)}; is it of another model?"
                )

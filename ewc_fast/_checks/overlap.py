"""Two Fisher diagonals that are compared."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ewc_fast._checks.operands import kind, short
from ewc_fast._checks.parameters import mean_of_squares


def two_fishers(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Raise unless both could be means of squares, over the same parameters."""
    for argument, fisher in (("first", first), ("second", second)):
        if not isinstance(fisher, Mapping):
            raise TypeError(
                f"{argument}: expected a mapping of parameter names to tensors, got "
                f"{type(fisher).__name__}"
            )
    if not first:
        raise ValueError("first: expected the Fisher diagonal of at least one parameter, got none")
    for name in [*first, *second]:
        if name not in first or name not in second:
            lacking = "second" if name in first else "first"
            raise ValueError(
                f"{lacking}: has no parameter {name!r}, which the other has; compare Fisher "
                "diagonals of one model, or leave it out of both"
            )
    for name in first:
        for argument, tensor in (("first", first[name]), ("second", second[name])):
            _mean_of_squares(f"{argument}[{name!r}]", tensor)
        if first[name].shape != second[name].shape:
            raise ValueError(
                f"second[{name!r}]: expected shape {tuple(first[name].shape)} as in first, got "
                f"{tuple(second[name].shape)}"
            )


def _mean_of_squares(name: str, tensor: Tensor) -> None:
    kind(name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {short(tensor.dtype)}")
    mean_of_squares(name, tensor)


def some_information(argument: str, group: str, trace: float) -> None:
    """Raise unless the trace of a group's Fisher is more than 0."""
    if trace <= 0:
        raise ValueError(
            f"{argument}: the trace of {group!r} is 0, so that it can't be scaled to 1; leave out "
            "parameters without influence, or group them with others"
        )

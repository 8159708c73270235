"""Numbers and choices."""

from __future__ import annotations

import torch
from torch import Tensor

from ewc_fast._dispatch import IMPLS

LARGEST = torch.finfo(torch.float32).max


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise unless ``value`` is among ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def impl(value: str) -> None:
    """Raise unless ``impl`` names an implementation."""
    one_of("impl", value, IMPLS)


def non_negative(name: str, value: float | Tensor) -> float:
    """Return ``value`` as a float; it must be at least 0 and finite in float32."""
    number = _number(name, value)
    if not 0 <= number <= LARGEST:
        raise ValueError(f"{name}: expected a number >= 0 and finite in float32, got {value!r}")
    return number


def learning_rate(lr: float | Tensor) -> tuple[float, Tensor | None]:
    """Return the learning rate as a number or, where it is on a GPU, as the tensor there.

    Nobody waits for that one, nor is it looked at: a kernel reads it when it runs, so that a CUDA
    graph takes what stands there at each replay.
    """
    if not isinstance(lr, Tensor) or lr.device.type == "cpu":
        return non_negative("lr", lr), None
    if lr.numel() != 1 or lr.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            "lr: expected a number or a scalar of float32 or float64, got "
            f"{lr.dtype} of shape {tuple(lr.shape)}"
        )
    return 0.0, lr


def strength(ewc_lambda: float | Tensor, lr: float) -> float:
    """Return lambda as a float; its product with the learning rate must be finite as well."""
    number = non_negative("ewc_lambda", ewc_lambda)
    non_negative("ewc_lambda * lr", number * lr)
    return number


def in_graph(name: str, number: float | Tensor) -> Tensor:
    """Return a number as a compiled graph takes it: a tensor, checked when the graph runs."""
    if isinstance(number, Tensor):
        return number
    checked = non_negative(name, number)
    return torch.scalar_tensor(checked, dtype=torch.float64, device="cpu")


def gamma(value: float) -> float:
    """Return ``gamma`` as a float in (0, 1]."""
    number = _number("gamma", value)
    if not 0 < number <= 1:
        raise ValueError(f"gamma: expected a number in (0, 1] (1 forgets nothing), got {value!r}")
    return number


def decay_rate(name: str, value: float) -> float:
    """Return ``value`` as a float in [0, 1)."""
    number = _number(name, value)
    if not 0 <= number < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}")
    return number


def finite(name: str, value: float) -> float:
    """Return ``value`` as a float; it must be finite in float32."""
    number = _number(name, value)
    if not -LARGEST <= number <= LARGEST:
        raise ValueError(f"{name}: expected a number that is finite in float32, got {value!r}")
    return number


def seed(value: int | None, name: str = "seed") -> None:
    """Raise unless a seed is None or an integer of 32 bits."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer or None, got {type(value).__name__}")
    if not 0 <= value < 2**32:
        raise ValueError(f"{name}: expected an integer from 0 to 2**32 - 1, got {value}")


def _number(name: str, value: float | Tensor) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}") from None


def positive_integer(name: str, value: int) -> None:
    """Raise unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected an integer >= 1, got {value}")

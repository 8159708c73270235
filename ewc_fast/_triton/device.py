"""What launches must know of a device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

PROGRAMS_A_MULTIPROCESSOR = 2
"""Two programs hide each other's waits; more shares would only be more to add up."""


def current(device: torch.device | None) -> AbstractContextManager[Any]:
    """Make a tensor's device the current one, which is where Triton launches."""
    if device is None or device.type == "cpu":
        return nullcontext()
    context: AbstractContextManager[Any] = torch.get_device_module(device.type).device(device)
    return context


def programs_for(device: torch.device) -> int:
    """Return how many programs keep a device busy; the interpreter runs one after the other."""
    if device.type != "cuda":
        return 1
    properties = torch.cuda.get_device_properties(device)
    return PROGRAMS_A_MULTIPROCESSOR * properties.multi_processor_count

"""Triton kernels: twins of the CUDA operations, and the products on tensor cores.

Nothing here is imported before the first call that needs it, and no module but those that hold
kernels imports triton. ``unavailable`` says whether they can run.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(device_type: str) -> str | None:
    """Why Triton kernels can't run on tensors of a device, or ``None`` where they can."""
    if not _installed():
        return "Triton is not installed: pip install 'ewc-fast[triton]'"
    if device_type == "cpu" and not interpreted():
        return "Triton has no kernels for the CPU"
    if device_type != "cpu" and interpreted():
        return "TRITON_INTERPRET=1 is set, and its interpreter works on CPU tensors only"
    return None


@cache
def _installed() -> bool:
    return find_spec("triton") is not None

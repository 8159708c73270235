"""Loads the compiled core and knows what it can run on this machine."""

from __future__ import annotations

import functools
import re

import torch  # before the core: both then share the OpenMP runtime that PyTorch loaded

try:
    from ewc_fast import _core
except ImportError as error:
    raise ImportError(
        "ewc_fast's compiled core could not be loaded. Inside a source checkout the folder "
        "ewc_fast/ hides an installed package: install with `pip install -e .` there, or run "
        f"Python from another folder. ({error})"
    ) from error

core = _core
"""The compiled module."""

reader = _core.TensorReader(getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))
"""Reads addresses and shapes off tensors; shared by all plans, keeps nothing."""

gradients_of = _core.GradientReader(torch.Tensor)
"""Returns the gradients of a list of parameters, or None if one is frozen or has none."""


def cuda_unavailable() -> str | None:
    """Why the CUDA kernels can't run here, or ``None`` where they can."""
    if not _core.cuda_architectures:
        return "built without CUDA: no nvcc at build time, or EWC_FAST_CUDA=OFF"
    if not torch.backends.cuda.is_built() or torch.version.cuda is None:  # None: ROCm's
        return f"PyTorch {torch.__version__} is a build without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device or driver"
    return _too_old()


@functools.cache
def _too_old() -> str | None:
    """Name the first CUDA device that is older than all that the kernels were built for."""
    built = [int(number) for number in re.findall(r"\d+", _core.cuda_architectures)]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if built and 10 * major + minor < min(built):
            return (
                f"built for sm_{min(built)} and later, but cuda:{index} is sm_{major}{minor}; "
                f"build with EWC_FAST_CUDA_ARCHITECTURES={major}{minor}"
            )
    return None

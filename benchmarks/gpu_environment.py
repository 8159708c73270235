"""What a GPU's numbers depend on: chip, driver, clocks, versions."""

from __future__ import annotations

import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ewc_fast._native import core
from ewc_fast.environment import environment

_QUERIES = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit", "ecc.mode.current")
_CLOCKS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


def gpu_environment() -> dict[str, Any]:
    """Return the processor's environment and the GPU's; ``"gpu"`` is ``None`` without one."""
    found = environment() | {
        "gpu": None,
        "triton": _version_of("triton"),
        "cuda_architectures_built": core.cuda_architectures or None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **_asked_of_the_driver(_QUERIES),
        }
    return found


def clocks() -> dict[str, str]:
    """Return the GPU's clocks, temperature and power at this moment; {} where none tells."""
    return _asked_of_the_driver(_CLOCKS)


def _asked_of_the_driver(queries: tuple[str, ...]) -> dict[str, str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={','.join(queries)}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    values = [value.strip() for value in done.stdout.split(",")]
    return dict(zip(queries, values, strict=True)) if len(values) == len(queries) else {}


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

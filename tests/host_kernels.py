"""Builds the CUDA kernels for the CPU (tests/cuda_on_host), and rows as they read them."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent / "cuda_on_host"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # in the core's order
FISHER_DTYPES = [*DTYPES, torch.uint8]  # the last being codes


class HostRow(ctypes.Structure):
    """A row as tests/cuda_on_host/rows.h reads it."""

    _fields_ = [
        ("data", ctypes.c_void_p * 10),
        ("step", ctypes.c_int64 * 10),
        ("numel", ctypes.c_int64),
        ("samples", ctypes.c_int64),
        ("sample_stride", ctypes.c_int64),
        ("ordinal", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("fisher", ctypes.c_int32),
        ("moments", ctypes.c_int32),
    ]


def host_row(ordinal: int, operands: Mapping[int, Tensor]) -> HostRow:
    """Return a row of one sample with operands at these places; the rest is the caller's."""
    made = HostRow(ordinal=ordinal, samples=1)
    for place, tensor in operands.items():
        made.data[place], made.step[place] = tensor.data_ptr(), tensor.element_size()
    return made


def build(source: str, folder: Path, *options: str) -> Path:
    """Compile a file of tests/cuda_on_host into a shared library."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    library = folder / f"{source}.so"
    warnings = ["-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function", "-Werror"]
    fixed = ["-O1", "-g", "-std=c++17", "-shared", "-fPIC", *warnings, *options]
    files = [f"-I{HERE}", str(HERE / f"{source}.cpp"), "-o", str(library)]
    subprocess.run([compiler, *fixed, *files], check=True)
    return library

"""Compiles and calls floor.c, the bare loops that bandwidths are measured against."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

BYTES_PER_PARAMETER = 20
SOURCE = Path(__file__).with_name("floor.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


class Floor:
    """The floor loop over fixed lists of float32 tensors, called with addresses prepared."""

    def __init__(
        self,
        grads: Sequence[Tensor],
        params: Sequence[Tensor],
        fisher: Sequence[Tensor],
        anchor: Sequence[Tensor],
        *,
        ewc_lambda: float,
    ) -> None:
        lists = grads, params, fisher, anchor
        for tensor in (tensor for tensors in lists for tensor in tensors):
            if tensor.dtype != torch.float32 or not tensor.is_contiguous():
                raise ValueError("the floor loop takes contiguous float32 tensors")
        sizes = [param.numel() for param in params]
        self._operands = lists  # the addresses below are valid as long as these are
        self._function = _library().add_penalty_grad
        self._arguments = (
            *(_array(ctypes.c_void_p, [t.data_ptr() for t in tensors]) for tensors in lists),
            _array(ctypes.c_int64, sizes),
            ctypes.c_int64(len(sizes)),
            ctypes.c_int64(sum(sizes)),
            ctypes.c_float(ewc_lambda),
            ctypes.c_int(torch.get_num_threads()),
        )

    def __call__(self) -> None:
        """Add the penalty's gradient to the gradients."""
        self._function(*self._arguments)


class StepFloor:
    """The floor of an optimizer's step: reads and writes some flat float32 tensors, reads others.

    Two or three are ``written`` (parameters, moments), one or three are ``read`` (the gradient,
    perhaps Fisher and anchor); each written one becomes half of itself plus the sum of those read.
    """

    def __init__(self, written: Sequence[Tensor], read: Sequence[Tensor]) -> None:
        if len(written) not in (2, 3) or len(read) not in (1, 3):
            raise ValueError("the floor of a step writes two or three tensors, reads one or three")
        self._operands = written, read  # the addresses below are valid as long as these are
        self._function = _library().step_traffic
        outs, ins = (
            _array(ctypes.c_void_p, [tensor.data_ptr() for tensor in tensors])
            for tensors in self._operands
        )
        self._arguments = (
            *(outs, ctypes.c_int(len(written)), ins, ctypes.c_int(len(read))),
            ctypes.c_int64(written[0].numel()),
            ctypes.c_int(torch.get_num_threads()),
        )

    def __call__(self) -> None:
        """Move the bytes."""
        self._function(*self._arguments)


def _array(kind: type[ctypes.c_void_p | ctypes.c_int64], values: Sequence[int]) -> object:
    return (kind * len(values))(*values)


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = shutil.which("cc")
    if compiler is None:
        raise RuntimeError("the floor loop needs a C compiler: no cc on PATH")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "floor.so"
        subprocess.run([compiler, *FLAGS, "-o", built, SOURCE], check=True)
        library = ctypes.CDLL(str(built))
    library.add_penalty_grad.restype = library.step_traffic.restype = None
    _require_one_openmp_runtime()
    return library


def _require_one_openmp_runtime() -> None:
    """Raise where the process has two: their waiting threads would take the cores in turns."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    mapped = {line.split()[-1] for line in maps.read_text().splitlines()}
    runtimes = {
        path for path in mapped if Path(path).name.startswith(("libgomp", "libomp", "libiomp"))
    }
    if len(runtimes) > 1:
        raise RuntimeError(f"more than one OpenMP runtime in this process: {sorted(runtimes)}")

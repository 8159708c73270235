"""Convolutions, rows and sums compiled for GPUs that are not here: what each launch becomes.

Launches are recorded as they are made and compiled as Triton would, so that what is read is what
would run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from cross_compile import ARCHITECTURES, Compiled, Job, compile_all, job
from torch import Tensor

pytest.importorskip("triton")

from ewc_fast._triton import (
    squared_convolution,
    squared_depthwise,
    squared_rows,
    squared_sums,
)
from ewc_fast._triton.blocks import Geometry

TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
# Integers for which the kernels ask Triton not to look whether they are 1 or multiples of 16.
AS_THEY_COME = {
    "samples", "out_y", "out_x", "in_y", "in_x", "share_samples", "share_steps", "numel",
    "all_rows", "entries", "skipped_row",
}  # fmt: skip
PLACES = Geometry((1, 1, 1), (0, 1, 1), (1, 1, 1))
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def convolution(dtype: torch.dtype, rows=128, channels=128, last=False) -> None:
    """A 3 x 3 convolution in two dimensions, of a sample for each multiprocessor."""
    layout = {"memory_format": torch.channels_last_3d} if last else {}
    grads = torch.empty(4, rows, 1, 56, 56, dtype=dtype).to(**layout)
    inputs = torch.empty(4, channels, 1, 56, 56, dtype=dtype).to(**layout)
    sums = FP64 if dtype == FP64 else FP32
    total, bias = torch.empty(rows, channels, 1, 3, 3, dtype=sums), torch.empty(rows, dtype=sums)
    squared_convolution.accumulate_squared_convolution_(total, grads, inputs, bias, PLACES, 1)


def depthwise(dtype: torch.dtype, last: bool) -> None:
    layout = {"memory_format": torch.channels_last_3d} if last else {}
    grads, inputs = (torch.empty(4, 128, 1, 56, 56, dtype=dtype).to(**layout) for _ in range(2))
    total, bias = torch.empty(128, 1, 1, 3, 3), torch.empty(128)
    squared_depthwise.accumulate_squared_depthwise_(total, grads, inputs, bias, PLACES)


def rows() -> None:
    values, indices = torch.empty(4, 256, 768, dtype=BF16), torch.zeros(4, 256, dtype=torch.long)
    squared_rows.accumulate_squared_rows_(torch.empty(1000, 768), indices, values, -1)


def sums(in_middle: bool) -> None:
    size = (4, 768, 1024) if in_middle else (4, 1024, 768)
    grads, inputs = (torch.empty(size, dtype=BF16) for _ in range(2))
    means, scales = (torch.empty(4, 1024, 1) for _ in range(2))
    if in_middle:
        grads, inputs = grads.transpose(1, 2), inputs.transpose(1, 2)
        means, scales = (torch.empty(4, 1, 768) for _ in range(2))
    totals = torch.empty(768), torch.empty(768)
    squared_sums.accumulate_squared_sums_(*totals, grads, inputs, means, scales)


# What launches, the kernel's module and name, and the architectures it is compiled for.
CONVOLUTION = (squared_convolution, "squared_convolution_kernel")
CASES: dict[str, tuple[Callable[[], None], tuple[object, str], tuple[int, ...]]] = {
    "runs": (lambda: convolution(BF16), CONVOLUTION, ARCHITECTURES),
    "gathered": (lambda: convolution(BF16, channels=3), CONVOLUTION, ARCHITECTURES),
    "float32": (lambda: convolution(FP32), CONVOLUTION, ARCHITECTURES),
    "float64": (lambda: convolution(FP64), CONVOLUTION, (80, 90)),
    "depthwise": (
        lambda: depthwise(FP32, False), (squared_depthwise, "squared_depthwise_kernel"), (90,)
    ),
    "depthwise_last": (
        lambda: depthwise(BF16, True), (squared_depthwise, "squared_depthwise_kernel"), (90,)
    ),
    "rows": (rows, (squared_rows, "squared_rows_kernel"), (90,)),
    "stitch": (rows, (squared_rows, "stitch_rows_kernel"), (90,)),
    "sums": (lambda: sums(False), (squared_sums, "squared_sums_kernel"), (80, 90)),
    "sums_in_middle": (lambda: sums(True), (squared_sums, "squared_sums_kernel"), (90,)),
}  # fmt: skip


class Recorder:
    """Takes a kernel's place, and keeps what it is launched with."""

    def __init__(self, kernel) -> None:
        self.names = list(inspect.signature(kernel.fn).parameters)
        self.launch: dict[str, object] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: object, **options: object) -> None:
            self.launch = dict(zip(self.names, args, strict=False)) | options

        return launch


def jobs_of(name: str) -> list[Job]:
    """Return what a case launches, as Triton would compile it for each architecture."""
    run, (module, kernel), architectures = CASES[name]
    with pytest.MonkeyPatch.context() as patch:
        taken = [key for key in vars(module) if key.endswith("_kernel")]
        recorders = {key: Recorder(getattr(module, key)) for key in taken}
        for key, recorder in recorders.items():
            patch.setattr(module, key, recorder)
        if hasattr(module, "interpreted"):
            patch.setattr(module, "interpreted", lambda: False)
        run()
    given = recorders[kernel].launch
    warps, stages = given.pop("num_warps", 4), given.pop("num_stages", 3)
    signature, constants, divisible = {}, {}, []
    for key, value in given.items():
        if isinstance(value, Tensor):
            signature[key] = TYPES[value.dtype]
            divisible.append(key)  # as PyTorch's allocator has them
        elif key.isupper() or value is None or (value == 1 and key not in AS_THEY_COME):
            constants[key] = value
        else:
            signature[key] = "i32"
            if value % 16 == 0 and key not in AS_THEY_COME:
                divisible.append(key)
    return [
        job(
            f"{module.__name__}:{kernel}", signature, constants,
            arch=arch, divisible=divisible, num_warps=warps, num_stages=stages,
        )
        for arch in architectures
    ]  # fmt: skip


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, int], Compiled]:
    names = [(name, arch) for name in CASES for arch in CASES[name][2]]
    made = compile_all([each for name in CASES for each in jobs_of(name)])
    return dict(zip(names, made, strict=True))


def test_nothing_spills(compiled):
    for which, kernel in compiled.items():
        print(*which, kernel.registers, kernel.shared)  # the kernels' tables
        assert kernel.count("LDL") + kernel.count("STL") == 0, which


def test_products_run_on_tensor_cores(compiled):
    for name in ("runs", "gathered", "float32"):
        assert compiled[name, 80].count("HMMA"), name
        assert compiled[name, 90].count("HGMMA"), name
        assert compiled[name, 90].count("HMMA") == 0, name
        assert compiled[name, 100].count(r"UTC\w*MMA"), name
    for arch in (80, 90):
        assert compiled["float64", arch].count("DMMA")


def test_runs_of_channels_are_loaded_16_bytes_at_a_time_while_products_run(compiled):
    for arch in ARCHITECTURES:
        kernel = compiled["runs", arch]
        assert kernel.count(r"LDGSTS\S*\.128") == kernel.count("LDGSTS") > 0
        assert compiled["float32", arch].count("LDGSTS") > 0  # 4 bytes each


def test_features_and_rows_are_loaded_in_runs(compiled):
    for name in ("rows", "sums", "depthwise_last"):
        assert compiled[name, 90].count(r"LDG\S*\.(64|128)"), name

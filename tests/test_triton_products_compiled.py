"""The squared product compiled for GPUs that are not here: what each launch becomes.

Launches are recorded as they are made and compiled as Triton would, so that what is read is what
would run.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from cross_compile import Compiled, Job, compile_all, job
from torch import Tensor

pytest.importorskip("triton")

from ewc_fast._triton import product_kernels, squared_product
from ewc_fast._triton.product_plan import Operand, Plan, dot, plan, tiles_of

TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
SPECIALIZED = {
    "out_split", "split_length", "bias_row", "total_row",
    "grads_position", "grads_row", "inputs_position", "inputs_column",
}  # fmt: skip
"""Integers that Triton looks at: 1 becomes a constant, multiples of 16 are known as such."""


@dataclass(frozen=True)
class Case:
    """Operands of a launch, and the tile the rules should give it."""

    size: tuple[int, int, int, int]  # samples, positions, rows, columns
    dtypes: tuple[torch.dtype, torch.dtype]
    lay_out: Callable[[Tensor], Tensor] = lambda t: t
    float32: str = "tf32x3"
    ragged: bool = False


def same(dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    return dtype, dtype


def positions_contiguous(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CASES = {
    "large": Case((1, 64, 2048, 2048), same(BF16)),
    "float16": Case((1, 64, 2048, 2048), same(FP16)),
    "few_rows": Case((1, 64, 64, 16384), same(BF16)),
    "small": Case((1, 64, 64, 64), same(BF16)),
    "few_positions": Case((1, 5, 2048, 2048), same(BF16)),
    "positions_contiguous": Case((1, 64, 2048, 2048), same(BF16), positions_contiguous),
    "parts_of_samples": Case((1, 4096, 128, 128), same(BF16)),
    "ragged": Case((1, 64, 2048, 2048), same(BF16), ragged=True),
    "unaligned": Case((1, 64, 65, 1001), same(BF16)),
    "one_position": Case((256, 1, 2048, 2048), same(BF16)),
    "float32": Case((1, 64, 2048, 2048), same(FP32)),
    "float32_small": Case((1, 64, 64, 64), same(FP32)),
    "float32_one_position": Case((64, 1, 2048, 2048), same(FP32)),
    "tf32": Case((1, 64, 2048, 2048), same(FP32), float32="tf32"),
    "mixed": Case((1, 64, 2048, 2048), (BF16, FP32)),
    "float64": Case((1, 64, 256, 256), same(FP64)),
}  # fmt: skip
ELSEWHERE = ("large", "few_rows", "one_position", "float32", "float64")  # on sm_80 and sm_100


class Recorder:
    """Takes a kernel's place, and keeps what it is launched with."""

    def __init__(self, kernel) -> None:
        self.names = list(inspect.signature(kernel.fn).parameters)
        self.kernel = kernel
        self.launches: list[dict[str, object]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: object, **options: object) -> None:
            self.launches.append(dict(zip(self.names, args, strict=False)) | options)

        return launch

    def job(self, arch: int) -> Job:
        """Describe the one launch as Triton would compile it."""
        given = dict(self.launches[-1])
        warps, stages = given.pop("num_warps", 4), given.pop("num_stages", 3)
        signature, constants, divisible = {}, {}, []
        for name, value in given.items():
            looked_at = name in SPECIALIZED
            if isinstance(value, Tensor):
                signature[name] = TYPES[value.dtype]
                if value.data_ptr() % 16 == 0:
                    divisible.append(name)
            elif name.isupper() or value is None or (looked_at and value == 1):
                constants[name] = value
            else:
                signature[name] = "i32" if value < 2**31 else "i64"
                if looked_at and value % 16 == 0:
                    divisible.append(name)
        return job(
            f"{product_kernels.__name__}:{self.kernel.fn.__name__}", signature, constants,
            arch=arch, divisible=divisible, num_warps=warps, num_stages=stages,
        )  # fmt: skip


def recorded(case: Case) -> tuple[Recorder, Recorder]:
    """Return what a case launches: the product, and what adds up its splits."""
    samples, positions, rows, columns = case.size
    grads = case.lay_out(torch.empty(samples, positions, rows, dtype=case.dtypes[0]))
    inputs = case.lay_out(torch.empty(samples, positions, columns, dtype=case.dtypes[1]))
    sums = FP64 if FP64 in case.dtypes else FP32
    total, bias_total = torch.empty(rows, columns, dtype=sums), torch.empty(rows, dtype=sums)
    product = Recorder(product_kernels.squared_product_kernel)
    adder = Recorder(product_kernels.add_splits_kernel)
    layout = planned(case, grads, inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(squared_product, "interpreted", lambda: False)
        patch.setattr(squared_product, "squared_product_kernel", product)
        patch.setattr(squared_product, "add_splits_kernel", adder)
        if case.ragged:
            squared_product.add_ragged_squared_product_(
                total, grads[0], inputs[0], torch.tensor([0, 20, 64]), bias_total, layout=layout
            )
        else:
            squared_product.add_squared_product_(
                total, grads, inputs, bias_total, float32=case.float32, layout=layout
            )
    return product, adder


def planned(case: Case, grads: Tensor, inputs: Tensor) -> Plan:
    """Return the plan on a chip of 132 multiprocessors."""
    one = grads.shape[1] == 1
    if one:
        grads, inputs = grads.transpose(0, 1), inputs.transpose(0, 1)
    least = min(Operand.of(t).vector * t.element_size() for t in (grads, inputs))
    tiles = tiles_of(grads.dtype, *dot(*case.dtypes, one, case.float32), least)
    return plan(tiles, *grads.shape, inputs.shape[2], 132)


@pytest.fixture(scope="module")
def built() -> dict[tuple[str, int], Compiled]:
    """All cases for sm_90, some for the others, and the kernel that adds up splits."""
    jobs = {(name, 90): recorded(case)[0].job(90) for name, case in CASES.items()}
    for name in ELSEWHERE:
        jobs |= {(name, arch): recorded(CASES[name])[0].job(arch) for arch in (80, 100)}
    jobs["splits", 90] = recorded(CASES["parts_of_samples"])[1].job(90)
    return dict(zip(jobs, compile_all(jobs.values()), strict=True))


KEYS = [(name, 90) for name in CASES] + [(name, arch) for name in ELSEWHERE for arch in (80, 100)]


@pytest.mark.parametrize(("name", "arch"), KEYS, ids=str)
def test_nothing_spills(built, name, arch):
    assert built[name, arch].stack == 0


@pytest.mark.parametrize(("name", "arch"), [key for key in KEYS if key[0] != "float64"], ids=str)
def test_products_are_made_on_tensor_cores(built, name, arch):
    code = built[name, arch]
    wanted = {80: "HMMA", 90: "HGMMA", 100: "UTC.*MMA"}[arch]
    assert code.count(wanted) > 0
    if arch == 90:
        assert code.count("HMMA") == 0


def test_float64_is_multiplied_in_float64(built):
    assert built["float64", 80].count("DMMA") > 0
    assert built["float64", 90].count("DMMA") > 0


@pytest.mark.parametrize("name", ["large", "float16", "few_rows", "small", "few_positions",
                                  "positions_contiguous", "one_position"])  # fmt: skip
def test_half_precision_is_copied_to_shared_memory_by_16_bytes(built, name):
    code = built[name, 90]
    assert code.count("LDGSTS") == code.count(r"LDGSTS\.E\.BYPASS\.128") > 0


@pytest.mark.parametrize("name", ["large", "one_position", "float32"])
def test_the_fisher_is_read_and_written_by_16_bytes(built, name):
    code = built[name, 90]
    assert code.count(r"STG\.E\.128") > 0
    assert code.count("STG") == code.count(r"STG\.E\.128") + 1  # the bias's
    assert code.count(r"LDG\.E\.128") >= code.count(r"STG\.E\.128")


def test_a_steps_products_are_under_way_while_the_next_ones_are_issued(built):
    for name in ("large", "few_rows", "ragged", "positions_contiguous"):
        assert re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1", built[name, 90].sass), name


@pytest.mark.parametrize(("name", "blocks", "threads"), [
    ("large", 1, 256), ("few_rows", 2, 256), ("small", 4, 128), ("parts_of_samples", 4, 128),
])  # fmt: skip
def test_as_many_blocks_fit_a_multiprocessor_as_the_table_says(built, name, blocks, threads):
    code = built[name, 90]
    registers = -(-code.registers // 8) * 8  # as they are given out
    assert blocks * threads * registers <= 65536
    assert blocks * code.shared <= 227 * 1024


def test_splits_are_added_by_16_bytes(built):
    code = built["splits", 90]
    assert code.stack == 0
    assert code.count(r"LDG\.E\.128") > 0

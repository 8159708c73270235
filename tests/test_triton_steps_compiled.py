"""Triton's steps compile for every architecture into the instructions they are meant for."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from cross_compile import ARCHITECTURES, Compiled, Job, compile_all, job
from steps import STEPS, Step

from ewc_fast._triton import step_launch
from ewc_fast._triton.table import STEP_OPERANDS, Launch

CASES = {  # dtype of the parameters, and the step
    "adamw": (torch.float32, STEPS["adamw"]),
    "adam_plain": (torch.float32, STEPS["adam_plain"]),
    "adam_float64": (torch.float64, STEPS["adam"]),
    "adam_proximal": (torch.float32, STEPS["adamw_proximal"]),
    "adam_master": (torch.bfloat16, replace(STEPS["adam_master"], fisher=torch.bfloat16)),
    "adam_by_chance": (torch.bfloat16, STEPS["adam_by_chance"]),
    "adam_moments": (torch.float16, STEPS["adam_moments"]),
    "adam_path": (torch.float32, STEPS["adam_path"]),
    "adam_path_master": (torch.bfloat16, STEPS["adam_path_master"]),
    "sgd": (torch.float32, STEPS["sgd_nesterov"]),
    "sgd_plain": (torch.float32, STEPS["sgd_plain"]),
}
WRITTEN = {
    "params", "master", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "momentum_buffers", "path",
}  # fmt: skip


def named(dtype: torch.dtype) -> str:
    return f"tl.{str(dtype).removeprefix('torch.')}"


def dtypes_of(dtype: torch.dtype, step: Step) -> dict[str, torch.dtype]:
    return {name: ts[0].dtype for name, ts in step.make([torch.zeros(1, dtype=dtype)]).items()}


def job_of(dtype: torch.dtype, step: Step, arch: int, kernel: str) -> Job:
    dtypes = dtypes_of(dtype, step)
    part = Launch(tuple(dtypes.values()), [0], 0, 1)
    constants = step_launch.constants(part, tuple(dtypes), step.options)
    constants |= {
        "COMPUTE": named(torch.float64 if dtype == torch.float64 else torch.float32),
        "PARAM": named(dtype),
        "FISHER": named(dtypes.get("fisher", dtype)),
        "MOMENT": named(dtypes.get("exp_avgs", dtypes.get("momentum_buffers", dtype))),
    }
    types = {"first_chunk": "i64", "ewc_lambda": "fp64", "seed": "u32", "coefficients": "*fp64"}
    if kernel == "over_rows":
        types |= {"records": "*i64", "chunks": "*i64"}
    else:
        types |= {f"address{i}": "i64" for i in range(STEP_OPERANDS - 1)}
        types |= dict.fromkeys(("numel", "ordinal"), "i64")
        constants["ALIGNED"] = 1
    if step.springs:
        types["partial"] = "*fp64"
    else:
        constants["partial"] = None
    pointers = [name for name, kind in types.items() if kind.startswith("*")]
    name = f"ewc_fast._triton.step_kernels:{kernel}"
    return job(name, types, constants, arch=arch, divisible=pointers)


KERNELS = [(case, arch, "over_rows") for arch in ARCHITECTURES for case in CASES]
KERNELS += [("adamw", arch, "over_one_row") for arch in ARCHITECTURES]
NUMBERS = dict.fromkeys(("lr_number", "weight_decay", "ewc_lambda"), "fp64")
FIRST = {
    "adam": job(
        "ewc_fast._triton.step_coefficients:adam_coefficients",
        {"coefficients": "*fp64", "records": "*i64", "address": "i64", "rows": "i32", "lr": "*fp32",
         **NUMBERS, "beta1": "fp64", "beta2": "fp64", "eps": "fp64"},
        {"DECOUPLED": True, "BLOCK": 128}, arch=90,
    ),
    "sgd": job(
        "ewc_fast._triton.step_coefficients:sgd_coefficients",
        {"coefficients": "*fp64", **NUMBERS, "momentum": "fp64", "dampening": "fp64"},
        {"lr": None}, arch=90,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def machine_code():
    jobs = [*FIRST.values(), *(job_of(*CASES[case], *rest) for case, *rest in KERNELS)]
    return dict(zip([*FIRST, *KERNELS], compile_all(jobs), strict=True))


@pytest.mark.parametrize("name", FIRST)
def test_the_coefficients_spill_nothing(name, machine_code):
    assert machine_code[name].stack == 0


@pytest.mark.parametrize(("case", "arch", "kernel"), KERNELS)
def test_whole_blocks_go_in_wide_accesses_without_spills(case, arch, kernel, machine_code):
    code = machine_code[case, arch, kernel]
    assert code.stack == 0
    assert code.registers <= 128  # four blocks or more of 128 threads on a multiprocessor
    assert not code.count(r"(LD|ST)\.E|(LDL|STL)")
    dtype, step = CASES[case]
    vector = 2 if dtype == torch.float64 else 4
    for direction, operands in (("ld", dtypes_of(dtype, step)), ("st", WRITTEN)):
        of_width: dict[int, int] = {}
        for name, its in dtypes_of(dtype, step).items():
            read = name != "steps" and not (name == "params" and step.master and not step.path)
            if name in operands and (read or direction == "st"):
                width = vector * its.itemsize * 8
                of_width[width] = of_width.get(width, 0) + 1
        for width, count in of_width.items():
            assert moves(direction, width, code) >= count, f"{count} {direction} of {width} bits"


def moves(direction: str, bits: int, code: Compiled) -> int:
    """How many instructions load (ld) or store (st) so many bits at once: in PTX and in SASS."""
    shape = {64: r"\.v2\.b32", 128: r"\.(v4\.b32|v2\.b64)"}[bits]
    in_ptx = len(re.findall(rf"{direction}\.global(\.\w+)*{shape}\b", code.ptx))
    name = {"ld": "LDG", "st": "STG"}[direction] + r"\.E(\.\w+)*"
    return min(in_ptx, code.count(rf"{name}\.{bits}\b"))


def test_nothing_waits_for_other_threads_between_loads_and_stores(machine_code):
    """Where a load's layout differs from the store's, threads exchange through shared memory."""
    for kernel in KERNELS:
        if not CASES[kernel[0]][1].springs:  # which have a sum at the end
            assert "BAR" not in machine_code[kernel].sass

"""Triton's list operations compile for every architecture into the instructions they are meant for.

No GPU is needed. Where tensors are aligned, a thread moves four elements at a time (two of
float64): 16 bytes of float32 and float64, 8 of bfloat16.
"""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

from cross_compile import ARCHITECTURES, Compiled, Job, compile_all, job

from ewc_fast._triton import launch
from ewc_fast._triton.table import OPERANDS, Launch

# Operands: T parameters and gradients, S state, F the Fisher, R the residual, E a Fisher's codes of
# 8 bits and C their scales (which are read one by one); written in capitals.
OPERATIONS = {
    "add_penalty_grad_": "Ttfs",
    "penalty": "tfs",
    "penalty_grad": "Ttfs",
    "accumulate_square_": "Ft",
    "merge_": "FSRst",
    "merge_online_": "FSst",
    "proximal_step_": "Tfs",
}
ENCODED = {
    "add_penalty_grad_": "Ttesc",
    "penalty": "tesc",
    "penalty_grad": "Ttesc",
    "proximal_step_": "Tesc",
}
PARAMS = {80: torch.bfloat16, 90: torch.float32, 100: torch.float64}
FISHER = {80: torch.bfloat16, 90: torch.float32, 100: torch.float64}


def dtypes_of(operands: str, arch: int) -> tuple[torch.dtype, ...]:
    params = PARAMS[arch]
    if "e" in operands and params == torch.float64:  # beside which no Fisher is in 8 bits
        params = torch.float16
    state = torch.float64 if params == torch.float64 else torch.float32
    kinds = {"t": params, "s": state, "f": FISHER[arch], "r": torch.bfloat16}
    kinds |= {"e": torch.uint8, "c": torch.float32}
    return tuple(kinds[letter] for letter in operands.lower())


def job_of(operation: str, operands: str, arch: int, kernel: str) -> Job:
    dtypes = dtypes_of(operands, arch)
    constants = launch.constants(operation, Launch(dtypes, [0], 0, 1))
    padded = dtypes + dtypes[-1:] * (OPERANDS - len(dtypes))
    constants |= {f"D{i}": named(dtype) for i, dtype in enumerate(padded)}
    wide = operation.startswith("merge") or torch.float64 in dtypes
    constants["COMPUTE"] = named(torch.float64 if wide else torch.float32)
    types = {"first_chunk": "i64", "coefficient": "fp64", "seed": "u32"}
    if kernel == "over_rows":
        types |= {"records": "*i64", "chunks": "*i64"}
    else:
        types |= {f"address{i}": "i64" for i in range(OPERANDS)}
        types |= dict.fromkeys(("numel", "samples", "sample_stride", "ordinal"), "i64")
        constants["ALIGNED"] = 1
    if operation in launch._FACTORS:
        types["partial"] = "*fp64"
    else:
        constants["partial"] = None
    pointers = [name for name, kind in types.items() if kind.startswith("*")]
    name = f"ewc_fast._triton.kernels:{kernel}"
    return job(name, types, constants, arch=arch, divisible=pointers)


def named(dtype: torch.dtype) -> str:
    return f"tl.{str(dtype).removeprefix('torch.')}"


# The list's kernel for all, a flat buffer's for the hottest: the two share all but how they begin.
CASES = [
    (operation, operands, arch, "over_rows")
    for arch in ARCHITECTURES
    for operation, operands in (*OPERATIONS.items(), *ENCODED.items())
]
CASES += [
    ("add_penalty_grad_", which["add_penalty_grad_"], arch, "over_one_row")
    for arch in ARCHITECTURES
    for which in (OPERATIONS, ENCODED)
]


SUM = job(
    "ewc_fast._triton.kernels:sum_partials",
    {"partial": "*fp64", "value": "*fp64", "count": "i64", "factor": "fp64"},
    {"BLOCK": launch.SUM_BLOCK},
    arch=90,
    divisible=["partial", "value"],
    num_warps=8,
)


@pytest.fixture(scope="module")
def machine_code():
    found = compile_all([SUM, *(job_of(*case) for case in CASES)])
    return dict(zip(["sum", *CASES], found, strict=True))


def test_the_sum_of_partial_sums_spills_nothing(machine_code):
    assert machine_code["sum"].stack == 0
    assert machine_code["sum"].registers <= 128


@pytest.mark.parametrize(("operation", "operands", "arch", "kernel"), CASES)
def test_whole_blocks_go_in_wide_accesses_without_spills(
    operation, operands, arch, kernel, machine_code
):
    code = machine_code[operation, operands, arch, kernel]
    assert code.stack == 0
    assert code.registers <= 128  # four blocks or more of 128 threads on a multiprocessor
    # generic accesses would mean that the compiler lost the pointers' address space
    assert not code.count(r"(LD|ST)\.E|(LDL|STL)")
    dtypes = dtypes_of(operands, arch)
    vector = 2 if torch.float64 in dtypes else 4
    for letter, dtype in zip(operands, dtypes, strict=True):
        if letter == "c":
            continue
        width = vector * dtype.itemsize * 8
        if letter != "T" or operation != "penalty_grad":  # whose output is not read
            assert moves("ld", width, code), f"{width}-bit loads"
        if letter.isupper():
            assert moves("st", width, code), f"{width}-bit stores"


def moves(direction: str, bits: int, code: Compiled) -> bool:
    """Whether so many bits are loaded (ld) or stored (st) at once, but one number of 64 bits."""
    shape = {32: r"\.(v2\.b16|b32)", 64: r"\.v2\.b32", 128: r"\.(v4\.b32|v2\.b64)"}[bits]
    if not re.search(rf"{direction}\.global(\.\w+)*{shape}\b", code.ptx):
        return False
    name = {"ld": "LDG", "st": "STG"}[direction] + r"\.E(\.\w+)*"
    return code.count(name if bits == 32 else rf"{name}\.{bits}\b") > 0


def test_nothing_waits_for_other_threads_between_loads_and_stores(machine_code):
    """Where a load's layout differs from the store's, threads exchange through shared memory."""
    for case in CASES:
        if case[0] not in launch._FACTORS:  # which have a sum at the end
            assert "BAR" not in machine_code[case].sass

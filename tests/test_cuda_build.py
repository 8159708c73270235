"""The CUDA kernels compile for every architecture into the instructions they were written for.

No GPU is needed: nvcc compiles, and the machine code is read.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest

FOLDER = Path(__file__).parent.parent / "csrc" / "cuda"
ARCHITECTURES = ("80", "90", "100")
INSTANCES = 2 * 7  # for few rows and for many, of each dtype of parameters and Fisher
READING = 2 * 10  # the same with a Fisher in 8 bits too, which is only read
STEPS = 2 * 11 * 2  # of each dtype of parameters, Fisher and moments, without a path and with one
OPERATIONS = {  # by source, and the widest accesses of each operation that reads; that writes
    "penalty": {"AddPenaltyGrad": (128, 64), "Penalty": (128, 0), "PenaltyGrad": (128, 64)},
    "accumulate_square": {"AccumulateSquare": (128, 64)},
    "merge": {"Merge": (128, 128), "MergeOnline": (128, 128)},
    "proximal_step": {"ProximalStep": (128, 64)},
    "optimizer": {"Adam": (128, 128), "Sgd": (128, 128)},
}
ALL_THERE = {"Adam": (8, 5), "Sgd": (6, 3)}  # operands read, written


def cuobjdump() -> str | None:
    spec = find_spec("triton")
    if spec is not None and spec.submodule_search_locations:
        bundled = Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin/cuobjdump"
        if bundled.exists():
            return str(bundled)
    return shutil.which("cuobjdump")


class Compiled(NamedTuple):
    source: str
    report: str  # the compiler's, of resources
    cubin: Path


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda a: f"sm_{a}")
def architecture(request):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    return request.param


@pytest.fixture(scope="module", params=OPERATIONS)
def compiled(request, architecture, tmp_path_factory):
    source = request.param
    cubin = tmp_path_factory.mktemp("cubin") / f"{source}_{architecture}.cubin"
    options = ["-O3", "-std=c++17", "-Werror=all-warnings", "--fmad=false"]
    options += ["-Xptxas", "-v", "-cubin"]
    files = [f"-arch=sm_{architecture}", "-o", str(cubin), str(FOLDER / f"{source}.cu")]
    result = subprocess.run(["nvcc", *options, *files], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return Compiled(source, result.stderr, cubin)


@pytest.fixture(scope="module")
def kernels(compiled):
    """The machine code of each kernel, by the name of its operation."""
    tool = cuobjdump()
    if tool is None:
        pytest.skip("cuobjdump is neither bundled with triton nor on PATH")
    command = [tool, "-sass", str(compiled.cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, list[str]] = {name: [] for name in OPERATIONS[compiled.source]}
    for code in text.split("Function :")[1:]:
        mangled = code.split(maxsplit=1)[0]
        for name, codes in found.items():
            if f"{len(name)}{name}I" in mangled:
                codes.append(code)
    return found


def instances(source: str) -> int:
    """Return how many kernels an operation has."""
    if source in ("penalty", "proximal_step"):
        return READING
    return STEPS if source == "optimizer" else INSTANCES


def widest(code: str, instruction: str) -> int:
    """Return the bits of the widest access of a kind."""
    widths = re.findall(rf"\b{instruction}\.E\.(64|128)\b", code)
    return max(map(int, widths), default=0)


def test_no_kernel_spills_registers_or_uses_a_stack(compiled):
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", compiled.report)
    of_operations = instances(compiled.source) * len(OPERATIONS[compiled.source])
    others = 3 if compiled.source == "optimizer" else 1  # the sum; the counts, and pow()
    assert len(frames) == of_operations + others
    assert set(frames) == {("0", "0")}


def test_memory_is_moved_in_wide_global_accesses(compiled, kernels):
    """16 bytes for the widest operand; as many elements, at least 8 bytes, for the others."""
    for name, (read, written) in OPERATIONS[compiled.source].items():
        assert len(kernels[name]) == instances(compiled.source)
        for code in kernels[name]:
            assert widest(code, "LDG") >= read
            assert widest(code, "STG") >= written
            # generic accesses would mean that the compiler lost the pointers' address space
            assert not re.search(r"\b(LD|ST)\.E|\b(LDL|STL)\b", code)


def test_float_operations_move_all_operands_16_bytes_at_a_time(compiled, kernels):
    if compiled.source == "optimizer":
        pytest.skip("has a test of its own")
    for name, (_, written) in OPERATIONS[compiled.source].items():
        of_floats = [code for code in kernels[name] if "5TypesIffE" in code.split(maxsplit=1)[0]]
        assert len(of_floats) == 2
        for code in of_floats:
            assert widest(code, "LDG") == 128
            assert widest(code, "STG") == (128 if written else 64)  # 64: the block's own sum


def test_codes_of_8_bits_move_four_at_a_time_beside_floats(compiled, kernels):
    if instances(compiled.source) != READING:
        pytest.skip("writes the Fisher, or has none in 8 bits")
    for name in OPERATIONS[compiled.source]:
        for params in "f", "6__half", "13__nv_bfloat16":
            codes = [c for c in kernels[name] if re.search(rf"TypesI{params}NS\w*4e5m3E", c)]
            assert len(codes) == 2
            for code in codes:  # the four of one step apart, and the tail's
                assert len(re.findall(r"\bLDG\.E\.U8\b", code)) <= 5
            floats = [c for c in kernels[name] if f"TypesI{params}fE" in c.split(maxsplit=1)[0]]
            wide = [len(re.findall(r"\bLDG\.E\.128\b", c)) for c in (codes[0], floats[0])]
            assert wide[0] == wide[1] - 1  # the Fisher's own


def test_float_steps_move_all_operands_16_bytes_at_a_time_and_load_before_they_compute(
    compiled, kernels
):
    if compiled.source != "optimizer":
        pytest.skip("no optimizer")
    for (name, (read, written)), path in product(ALL_THERE.items(), (0, 1)):
        kind = f"9StepTypesIfffEELb{path}E"
        of_floats = [c for c in kernels[name] if kind in c.split(maxsplit=1)[0]]
        assert len(of_floats) == 2
        for code in of_floats:
            assert len(re.findall(r"\bSTG\.E\.128\b", code)) == written + path
            loads = [place.start() for place in re.finditer(r"\bLDG\.E\.128\b", code)]
            assert len(loads) == read + path
            between = code[loads[0] : loads[-1]]  # all on their way before the first is waited for
            assert not re.search(r"\b(FFMA|FMUL|FADD|BRA|STG)\b", between)

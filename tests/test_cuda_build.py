"""The CUDA kernels compile for every architecture into the instructions they were written for.

No GPU is needed: nvcc compiles, and the machine code is read.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "csrc" / "cuda" / "add_penalty_grad.cu"
ARCHITECTURES = ("80", "90", "100")


def cuobjdump() -> str | None:
    spec = find_spec("triton")
    if spec is not None and spec.submodule_search_locations:
        bundled = Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin/cuobjdump"
        if bundled.exists():
            return str(bundled)
    return shutil.which("cuobjdump")


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda a: f"sm_{a}")
def compiled(request, tmp_path_factory):
    """The compiler's resource report and the cubin for one architecture."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    cubin = tmp_path_factory.mktemp("cubin") / f"sm_{request.param}.cubin"
    options = ["-O3", "-std=c++17", "-Werror=all-warnings", "-Xptxas", "-v"]
    target = [f"-arch=sm_{request.param}", "-cubin", "-o", str(cubin), str(SOURCE)]
    result = subprocess.run(["nvcc", *options, *target], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr, cubin


def test_no_kernel_spills_registers_or_uses_a_stack(compiled):
    report, _ = compiled
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report)
    assert len(frames) == 5  # one kernel for each dtype, and the sum
    assert set(frames) == {("0", "0")}


def test_memory_is_moved_in_16_byte_global_accesses(compiled):
    _, cubin = compiled
    tool = cuobjdump()
    if tool is None:
        pytest.skip("cuobjdump is neither bundled with triton nor on PATH")
    text = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True)
    kernels = [k for k in text.stdout.split("Function :")[1:] if "add_penalty_grad_kernel" in k]
    assert len(kernels) == 4
    for kernel in kernels:
        assert "LDG.E.128" in kernel
        assert "STG.E.128" in kernel
        # generic accesses would mean that the compiler lost the pointers' address space
        assert not re.search(r"\b(LD|ST)\.E|\b(LDL|STL)\b", kernel)

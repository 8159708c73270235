"""Compiles Triton kernels for GPUs that are not here, and reads the machine code.

A process that runs kernels in Triton's interpreter can't compile them, so they are compiled in a
new one. That one loads PyTorch and Triton, which takes seconds: give several kernels to
:func:`compile_all` at once. What was compiled is remembered until the tests end.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

Constant = bool | int | float | str | None | tuple[bool | int | float | str, ...]
ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True)
class Job:
    """One kernel for one architecture; made by :func:`job`."""

    kernel: str  # "package.module:name"
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Constant], ...]
    arch: int
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Compiled:
    """What became of a kernel."""

    registers: int  # of one thread
    stack: int  # bytes of one thread: what spilled, mostly
    shared: int  # bytes of one block
    ptx: str
    sass: str

    def count(self, instruction: str) -> int:
        """Return how many instructions begin so; a regular expression, such as ``LDG.E.128``."""
        return len(re.findall(rf"(?m)^\s+/\*\w+\*/\s+(?:@!?U?P\w+\s+)?{instruction}", self.sass))


def job(
    kernel: str,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Constant],
    *,
    arch: int,
    divisible: Iterable[str] = (),
    num_warps: int = 4,
    num_stages: int = 3,
) -> Job:
    """Describe what to compile.

    ``signature`` gives the types of the arguments (``"*fp32"``, ``"i64"``), ``constexprs`` the
    values of all others, those with defaults too (a dtype as ``"tl.float32"``); ``divisible`` names
    the arguments (addresses or integers) that are multiples of 16.
    """
    return Job(
        kernel,
        tuple(signature.items()),
        tuple(constexprs.items()),
        arch,
        tuple(divisible),
        num_warps,
        num_stages,
    )


def compiled(
    kernel: str,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Constant],
    *,
    arch: int,
    divisible: Iterable[str] = (),
    num_warps: int = 4,
    num_stages: int = 3,
) -> Compiled:
    """Compile one kernel; the arguments are those of :func:`job`."""
    wanted = job(
        kernel,
        signature,
        constexprs,
        arch=arch,
        divisible=divisible,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return compile_all([wanted])[0]


_done: dict[Job, Compiled] = {}


def compile_all(jobs: Iterable[Job]) -> list[Compiled]:
    """Compile several kernels in one process; return them in order."""
    jobs = list(jobs)
    missing = list(dict.fromkeys(j for j in jobs if j not in _done))
    if missing:
        _done.update(zip(missing, _in_new_process(missing), strict=True))
    return [_done[j] for j in jobs]


def _in_new_process(jobs: list[Job]) -> list[Compiled]:
    with TemporaryDirectory() as folder:
        requests, results = Path(folder, "jobs.json"), Path(folder, "results.json")
        requests.write_text(json.dumps([asdict(j) for j in jobs]))
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(Path(folder, "cache"))
        run = subprocess.run(
            [sys.executable, __file__, str(requests), str(results)],
            capture_output=True,
            text=True,
            env=environment,
        )
        if run.returncode != 0:
            raise RuntimeError(f"cross-compiling failed:\n{run.stdout}{run.stderr}")
        return [Compiled(**result) for result in json.loads(results.read_text())]


def _compile_here(wanted: dict) -> dict[str, int | str]:
    """Compile one job, in the process that can."""
    from importlib import import_module

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = wanted["kernel"].split(":")
    function = getattr(import_module(module), name)
    types = dict(wanted["signature"])
    constants = {name: _constant(value) for name, value in wanted["constexprs"]}
    given, arguments = {*types, *constants}, set(function.arg_names)
    if given != arguments or len(types) + len(constants) != len(given):
        raise ValueError(f"{name}: give each of {arguments ^ given} once")
    source = ASTSource(
        fn=function,
        signature={arg: types.get(arg, "constexpr") for arg in function.arg_names},
        constexprs=constants,
        attrs={
            (function.arg_names.index(arg),): [["tt.divisibility", 16]]
            for arg in wanted["divisible"]
        },
    )
    made = triton.compile(
        source,
        target=GPUTarget("cuda", wanted["arch"], 32),
        options={"num_warps": wanted["num_warps"], "num_stages": wanted["num_stages"]},
    )
    with TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(made.asm["cubin"])
        resources, sass = _dump("-res-usage", cubin), _dump("-sass", cubin)
    return {
        "registers": int(re.search(r"\bREG:(\d+)", resources)[1]),
        "stack": int(re.search(r"\bSTACK:(\d+)", resources)[1]),
        "shared": made.metadata.shared,
        "ptx": made.asm["ptx"],
        "sass": sass,
    }


def _constant(value: Constant) -> object:
    import triton.language

    if isinstance(value, list):  # JSON's tuples
        return tuple(value)
    is_dtype = isinstance(value, str) and value.startswith("tl.")
    return getattr(triton.language, value.removeprefix("tl.")) if is_dtype else value


def _dump(option: str, cubin: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    run = subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


if __name__ == "__main__":
    _jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([_compile_here(j) for j in _jobs]))

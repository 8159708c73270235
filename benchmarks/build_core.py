"""Builds ewc_fast/_core in place by compilers alone, where its build system is missing.

    python benchmarks/build_core.py            # g++, and nvcc where it is on PATH
    python benchmarks/build_core.py --cuda OFF

pybind11's headers are taken from pybind11 if it is installed, else from PyTorch, which ships them.
The sources, flags and definitions are those of CMakeLists.txt; without link-time optimisation.
Beside the package goes ``ewc_fast.egg-info``, which tells Python its version when the root of the
repository is on its path.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc"
COMMON = "-std=c++17 -O3 -DNDEBUG -fPIC -fvisibility=hidden"
CXX = f"{COMMON} -fno-math-errno -fno-trapping-math -fopenmp"
LOOPS = "-fno-tree-loop-distribute-patterns"
STEPS = "-ffp-contract=off"  # products and sums are rounded each
LEVELS = {
    f"{loops}_{level}": f"{vectors} {options}"
    for loops, options in (("level", LOOPS), ("steps", STEPS))
    for level, vectors in (
        ("baseline", ""),
        ("v3", "-march=x86-64-v3 -mprefer-vector-width=256"),
        ("v4", "-march=x86-64-v4 -mprefer-vector-width=256"),
    )
}


def main() -> None:
    """Compile what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuda", choices=["AUTO", "ON", "OFF"], default="AUTO")
    parser.add_argument("--architectures", default="80;90;100", help="as CMake has them")
    parser.add_argument("--out", type=Path, default=ROOT, help="folder that holds ewc_fast/")
    options = parser.parse_args()
    nvcc = None if options.cuda == "OFF" else shutil.which("nvcc")
    if options.cuda == "ON" and nvcc is None:
        raise SystemExit("--cuda ON, but no nvcc is on PATH")
    module = build(options.out, nvcc, options.architectures.split(";"))
    describe(options.out)
    print(f"built {module}, CUDA sources {'ON' if nvcc else 'OFF'}")


def build(out: Path, nvcc: str | None, architectures: list[str]) -> Path:
    """Compile all sources at once, link them, return the module."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        raise SystemExit("no C++ compiler: neither c++ nor g++ is on PATH")
    module = out / "ewc_fast" / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    module.parent.mkdir(parents=True, exist_ok=True)
    defined = definitions(architectures if nvcc else [])
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as threads:
        commands, objects = [], []
        for source in sources(nvcc is not None):
            objects.append(str(Path(folder) / f"{source.parent.name}-{source.name}.o"))
            on_gpu = source.suffix == ".cu"
            how = _nvcc(nvcc or "", architectures) if on_gpu else _cxx(compiler, source)
            commands.append([*how, *defined, "-c", str(source), "-o", objects[-1]])
        list(threads.map(run, commands))
        if nvcc is None:
            link = [compiler, "-shared", "-fopenmp"]
        else:
            link = [nvcc, "-shared", "-cudart", "static", "-Xcompiler", "-fopenmp"]
        run([*link, *objects, "-o", str(module)])
    return module


def sources(cuda: bool) -> list[Path]:
    """Return every source; elsewhere than on x86-64 the baseline's loops alone."""
    found = sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("cpu/*.cpp")])
    if not _is_x86():
        found = [path for path in found if path.stem[-3:] not in ("_v3", "_v4")]
    return found + (sorted(SOURCES.glob("cuda/*.cu")) if cuda else [])


def definitions(architectures: list[str]) -> list[str]:
    """Return what the sources are told."""
    found = [f'-DEWC_FAST_VERSION="{version()}"']
    if _is_x86():
        found += ["-DEWC_FAST_HAS_LEVEL_v3", "-DEWC_FAST_HAS_LEVEL_v4"]
    if architectures:
        found.append(f'-DEWC_FAST_CUDA_BUILT="{",".join(architectures)}"')
    return found


def _cxx(compiler: str, source: Path) -> list[str]:
    include = [f"-I{path}" for path in (sysconfig.get_path("include"), pybind11_headers())]
    return [compiler, *shlex.split(CXX), *shlex.split(LEVELS.get(source.stem, "")), *include]


def _nvcc(nvcc: str, architectures: list[str]) -> list[str]:
    targets = [f"-gencode=arch=compute_{a},code=[compute_{a},sm_{a}]" for a in architectures]
    host = "-std=c++17 -O3 -DNDEBUG --fmad=false -Xcompiler -fPIC,-fvisibility=hidden"
    return [nvcc, *shlex.split(host), "-Werror=all-warnings", *targets]


def pybind11_headers() -> Path:
    """Return the folder that holds pybind11/pybind11.h."""
    for package in ("pybind11", "torch"):
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            headers = Path(folder) / "include"
            if (headers / "pybind11" / "pybind11.h").exists():
                return headers
    raise SystemExit("no pybind11 headers: neither pybind11 nor torch is installed")


def describe(out: Path) -> None:
    """Write what an installation would: the version's metadata, the experiments in the package."""
    experiments = out / "ewc_fast" / "experiments"
    if not experiments.exists():
        experiments.symlink_to(ROOT / "benchmarks" / "experiments")
    folder = out / "ewc_fast.egg-info"
    folder.mkdir(exist_ok=True)
    (folder / "PKG-INFO").write_text(
        f"Metadata-Version: 2.1\nName: ewc-fast\nVersion: {version()}\n"
    )


def version() -> str:
    """Return the version in pyproject.toml."""
    found = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found, "no version in pyproject.toml"
    return found[1]


def run(command: list[str]) -> None:
    """Run a compiler; say what it was asked where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


def _is_x86() -> bool:
    return os.uname().machine in ("x86_64", "AMD64")


if __name__ == "__main__":
    main()

"""Imports go one way, and importing the package is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ewc_fast
import ewc_fast.experiments

PACKAGE = Path(ewc_fast.__file__).parent
EXPERIMENTS = Path(ewc_fast.experiments.__file__).parent  # of a checkout: elsewhere

# Each room may import from those to its right in the same row, and from nothing else here.
MAY_IMPORT = {
    "_dispatch": set(),
    "_checks": {"_dispatch"},
    "_native": set(),
    "_triton": {"_checks", "reference_steps"},
    "reference": set(),
    "reference_steps": {"reference"},
    "_plan": {"_triton", "_checks", "_dispatch", "_native"},
    "_engine": {"_plan", "_triton", "_checks", "_dispatch", "_native", "reference"},
    "_ops": {"_engine", "_checks", "reference"},
    "products": {"_triton", "_engine", "_checks", "_dispatch", "_native", "reference"},
    "sums": {"_triton", "_dispatch", "reference"},
    "_steps_gpu": {"_plan", "_checks", "_native", "_triton", "reference_steps"},
    "_steps": {
        *("_steps_gpu", "_engine", "_plan", "_checks", "_dispatch", "_native", "reference_steps")
    },
    "_step_ops": {"_steps", "_checks", "reference_steps"},
    "_prepare": {"_step_ops", "_steps", "_plan", "_checks", "_dispatch", "reference_steps"},
    "steps": {"_prepare", "_plan", "_dispatch"},
    "functional": {"steps", "products", "_ops", "_engine", "_plan", "_checks", "_dispatch"},
    "formats": {"_checks", "reference"},
    "_springs": {"formats", "functional", "_checks", "_dispatch", "_native"},
    "_piecewise": {"_springs", "formats", "functional", "_dispatch"},
    "offload": {"_piecewise", "_springs", "_dispatch"},
    "_encoded": {
        "offload",
        "_piecewise",
        "_springs",
        "_engine",
        "_plan",
        "_checks",
        "_dispatch",
        "_native",
    },
    "persistence": {"formats"},
    "fisher": {"functional", "products", "sums", "_checks"},
    "flat": {"_checks", "_native"},
    "drift": {"_springs", "_checks"},
    "strength": {"_checks"},
    "lora": {"strength", "_checks"},
    "importance": {"fisher", "_checks"},
    "state": {
        "strength",
        "importance",
        "persistence",
        "_encoded",
        "_springs",
        "formats",
        "_checks",
        "_dispatch",
    },
    "ewc": {"state", "drift", "fisher", "importance", "_encoded", "_springs", "_checks"},
    "optim": {"ewc", "functional", "_prepare", "_steps", "importance", "_springs", "_checks"},
    "__init__": {"ewc", "optim", "fisher", "flat", "functional", "lora"},
    "environment": {"__init__", "_native"},
    "experiments": {"__init__", "environment", "fisher", "optim"},
    "integrations": {"__init__"},
    "cli": {"__init__", "environment", "experiments", "_native", "_triton"},
    "__main__": {"cli"},
}


def room_of(path: Path) -> str:
    if path.is_relative_to(EXPERIMENTS):
        return "experiments"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "ewc_fast":
            rooms = {alias.name for alias in node.names}
            found |= {name if name in MAY_IMPORT else "__init__" for name in rooms - {"_core"}}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ewc_fast."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "ewc_fast":
                    found.add(([*alias.name.split("."), "__init__"])[1])
    return found - {room_of(path)}


@pytest.mark.parametrize(
    "path",
    sorted({*PACKAGE.rglob("*.py"), *EXPERIMENTS.rglob("*.py")}),
    ids=lambda path: "/".join(path.parts[-3:]),
)
def test_imports_go_one_way(path):
    room = room_of(path)
    assert room in MAY_IMPORT, f"{room} has no row in the import rule"
    assert imported_rooms(path) <= MAY_IMPORT[room]


def test_the_import_rule_has_no_cycle():
    def reaches(start: str, goal: str, seen: frozenset[str] = frozenset()) -> bool:
        return any(
            nxt == goal or (nxt not in seen and reaches(nxt, goal, seen | {nxt}))
            for nxt in MAY_IMPORT[start]
        )

    assert not any(reaches(room, room) for room in MAY_IMPORT)


WITHOUT_TRITON = {"__init__", "table"}  # of _triton


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_only_modules_with_kernels_import_triton(path):
    if room_of(path) == "_triton" and path.stem not in WITHOUT_TRITON:
        return
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
    assert "triton" not in {name.split(".")[0] for name in modules}


@pytest.mark.parametrize("folder", ["cpu", "cuda"])
def test_native_rooms_do_not_include_each_other(folder):
    sources = PACKAGE.parent / "csrc"
    if not sources.is_dir():
        pytest.skip("the sources are not beside the installed package")
    other = {"cpu": "cuda", "cuda": "cpu"}[folder]
    for path in (sources / folder).iterdir():
        assert f"{other}/" not in path.read_text(), path
    for path in sources.rglob("*"):
        if path.is_file():
            assert "#include <torch" not in path.read_text(), path


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, torch; before = set(sys.modules); import ewc_fast; "
        "print(*sorted(m for m in set(sys.modules) - before if not m.startswith('ewc_fast')))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    heavy = {
        "triton",
        "matplotlib",
        "mlxtend",
        "tqdm",
        "safetensors",
        "torch._dynamo",
        "torch._inductor",
    }
    heavy |= {"transformers", "accelerate", "lightning", "pytorch_lightning", "avalanche"}
    assert not heavy & {name.split(".")[0] for name in result.stdout.split()} | heavy & set(
        result.stdout.split()
    )


def test_pytorch_and_the_core_share_one_openmp_runtime():
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc on this system")
    code = (
        "import torch, ewc_fast; torch.ones(10**6).sum(); t = torch.ones(10**6);"
        "ewc_fast.functional.add_penalty_grad_(t.clone(), t, t, t, ewc_lambda=1.0);"
        "print({l.split()[-1] for l in open('/proc/self/maps') if 'gomp' in l or 'iomp' in l})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert len(ast.literal_eval(result.stdout)) <= 1

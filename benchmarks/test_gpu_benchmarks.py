"""What the GPU's benchmarks time is right, and they run through, on a CPU at small sizes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import bench_gpu_fisher
import bench_gpu_operations
import bench_gpu_optimizer
import bench_gpu_products
import build_core
import gpu_table
import pytest
import torch
from gpu_operations_case import COPY, CUDA, EAGER, OPERATIONS, TRITON, Case, shapes
from gpu_timing import (
    ERROR,
    NO_ROOM,
    TRIED_OUT,
    UNAVAILABLE,
    WRONG,
    Budget,
    Clock,
    Suite,
    faults,
    measure,
)
from harness import MismatchError, Provider, Result

from ewc_fast.environment import environment

SUITES = {
    "operations": bench_gpu_operations.suite,
    "optimizer": bench_gpu_optimizer.suite,
    "products": bench_gpu_products.suite,
    "fisher": bench_gpu_fisher.suite,
}
SCRIPT = Path(__file__).with_name("gpu_check.sh")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def settings_come_back() -> Iterator[None]:
    """A quick run on a CPU sets these for its own process."""
    threads, interpreted = torch.get_num_threads(), os.environ.get("TRITON_INTERPRET")
    yield
    torch.set_num_threads(threads)
    if interpreted is None:
        os.environ.pop("TRITON_INTERPRET", None)


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_every_case_is_reached_and_nothing_is_wrong(suite: Suite) -> None:
    parts = list(suite(True, Budget(600)))
    refused = {name: why for part in parts for name, why in part.refused.items()}
    assert all(part.rows for part in parts), refused
    assert not [why for why in refused.values() if why.startswith(WRONG)]
    json.dumps([part.as_json() for part in parts])


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_what_time_does_not_reach_is_named(suite: Suite) -> None:
    parts = list(suite(True, Budget(0)))
    assert parts
    assert all(not part.rows and list(part.refused.values()) for part in parts)


def test_an_operations_bytes_are_those_it_must_move() -> None:
    def moved(operation: str, params: torch.dtype, fisher: torch.dtype) -> float:
        return Case(operation, "flat", 1000, params, fisher, CPU).bytes / 1000

    fp32, bf16 = torch.float32, torch.bfloat16
    assert moved("add_penalty_grad_", fp32, fp32) == 20
    assert moved("add_penalty_grad_", bf16, bf16) == 12
    assert moved("accumulate_square_", fp32, fp32) == 12
    assert moved("accumulate_square_ of 8", bf16, fp32) == 24
    assert moved("merge_", fp32, fp32) == 8 + 8 + 4 + 4 + 4
    assert moved("proximal_step_", fp32, fp32) == 16


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_wrong_result_is_no_provider_of_times(operation: str) -> None:
    case = Case(operation, "list", 3000, torch.float32, torch.float32, CPU)
    providers = case.providers()
    one_off = case.lists[0][-1].view(-1)[-1:]

    def call() -> None:
        providers[EAGER].call()
        one_off.mul_(1 + 2**-16)

    wrong = Provider(call, lambda: case._check(call))
    found = measure({"mine": wrong, COPY: providers[COPY]}, Clock(CPU), TRIED_OUT)
    assert list(found.seconds) == [COPY]
    assert found.refused["mine"].startswith(WRONG)


def raising(error: Exception) -> Callable[[], None]:
    def check() -> None:
        raise error

    return check


def test_refusals_say_what_kind_they_are_and_faults_are_ours() -> None:
    checks = {
        CUDA: raising(MismatchError("off")),
        TRITON: raising(RuntimeError("impl='triton' can't run: not installed")),
        "ewc_fast, auto": raising(TypeError("no")),
        "torch foreach": raising(TypeError("no")),
        "large": raising(torch.OutOfMemoryError("no")),
    }
    providers = {name: Provider(lambda: None, check) for name, check in checks.items()}
    found = measure(providers, Clock(CPU), TRIED_OUT)
    kinds = [WRONG, UNAVAILABLE, ERROR, ERROR, NO_ROOM]
    assert [why.startswith(k) for why, k in zip(found.refused.values(), kinds, strict=True)] == [
        True
    ] * 5
    result = Result(refused={f"case: {name}": why for name, why in found.refused.items()})
    assert [fault.split(": ")[1] for fault in faults(result)] == [CUDA, "ewc_fast, auto"]


def test_a_list_like_a_models_has_300_tensors() -> None:
    assert len(shapes("list", 10**8)) == len(shapes("tiny", 30_000)) == 300


def record(suite: str, row: dict[str, object]) -> dict[str, object]:
    at = environment() | {"gpu": "H1", "triton": "3", "driver_version": "5", "dirty": False}
    return {"environment": at, "runs": [{"suite": suite, "rows": [row]}]}


def test_the_table_shows_bandwidth_rate_and_passes_or_that_no_gpu_has_run() -> None:
    assert gpu_table.lines({"gpu_fisher": []}) == gpu_table.NOT_RUN
    operation = {
        "case": "merge_, 1e+08 flat", "provider": CUDA, "elements": 10**8, "layout": "flat",
        "params": "x", "fisher": "x", "share_of_copy": 0.923,
    }  # fmt: skip
    fisher = {"case": "net", "provider": "ewc_fast, sampled", "ratios": {gpu_table.PLAIN: 1.125}}
    latest = {"gpu_operations": [record("gpu_operations", operation)],
              "gpu_fisher": [record("gpu_fisher", fisher)]}  # fmt: skip
    found = gpu_table.lines(latest)
    assert "| merge_, 1e+08 flat, cuda | 92% | of the copy's bandwidth |" in found
    assert "| Fisher, net, sampled | 1.12 | forward and backward passes |" in found
    assert found.count("H1, driver 5") == 1


def check(folder: Path, stages: str, **variables: str) -> tuple[int, dict[str, object]]:
    command = ["bash", str(SCRIPT), "--dry", "--only", stages, str(folder)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, check=False)
    return done.returncode, json.loads((folder / "summary.json").read_text())


def test_the_one_command_runs_its_stages_and_sums_up(tmp_path: Path) -> None:
    status, summary = check(tmp_path, "backends,products", PYTHON=sys.executable)
    log = (tmp_path / "log.txt").read_text()
    assert status == 0, log
    assert [stage["stage"] for stage in summary["stages"]] == ["backends", "products"]  # type: ignore[index, attr-defined]
    (written,) = tmp_path.glob("quick-*.json")
    assert json.loads(written.read_text())["runs"][0]["rows"]


def test_a_stage_that_fails_stops_no_other_and_is_not_forgotten(tmp_path: Path) -> None:
    status, summary = check(tmp_path, "backends,products", PYTHON="false")
    assert status == 1
    assert [stage["exit_status"] for stage in summary["stages"]] == [1, 1]  # type: ignore[index, attr-defined]


def test_the_build_by_compilers_alone_takes_the_sources_of_cmake() -> None:
    text = (build_core.ROOT / "CMakeLists.txt").read_text()
    named = {f"csrc/{name}" for name in re.findall(r"csrc/(\S+\.(?:cpp|cu))\b", text)}
    named = {path for path in named if "${" not in path} | {
        f"csrc/cpu/{loops}_{level}.cpp" for loops in ("level", "steps") for level in ("v3", "v4")
    }
    taken = {str(path.relative_to(build_core.ROOT)) for path in build_core.sources(cuda=True)}
    assert taken == named
    assert build_core.pybind11_headers().is_dir()

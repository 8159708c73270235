"""Runs every benchmark and writes benchmarks/results/<processor>-<commit>.json; with --gpu those of
the GPU, and writes <gpu>-<commit>.json.

Each suite has a process of its own, and those whose rivals allocate large temporaries run under
two settings of the allocator: glibc's defaults hand every block above 32 MB back to the system when
it is freed, and the pages of the next one are faulted in anew.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu_environment import clocks, gpu_environment
from harness import Result, allocator_settings
from quiet import NOISE, LoadElsewhere

from ewc_fast.environment import environment

HERE = Path(__file__).parent
DEFAULT: dict[str, str] = {}
KEPT = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
}
RUNS = (
    ("penalty", DEFAULT),
    ("penalty", KEPT),
    ("optimizer", DEFAULT),
    ("operations", DEFAULT),
    ("products", DEFAULT),
    ("fisher", DEFAULT),
    ("fisher", KEPT),
    ("fisher_peers", DEFAULT),
)
GPU_SUITES = ("gpu_operations", "gpu_optimizer", "gpu_products", "gpu_fisher")


def main() -> None:
    """Run everything; write and name the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it all work?")
    parser.add_argument("--gpu", action="store_true", help="the GPU's suites instead")
    parser.add_argument("--seconds", type=float, help="that each of the GPU's suites may take")
    parser.add_argument("--only", nargs="+",
                        choices=[*sorted({suite for suite, _ in RUNS}), *GPU_SUITES],
                        help="these suites, with the allocator's defaults")  # fmt: skip
    parser.add_argument("--models", nargs="+", default=[], help="of the Fisher's: these")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder to write to")
    options = parser.parse_args()
    if any((suite in GPU_SUITES) != options.gpu for suite in options.only or []):
        parser.error(f"--gpu goes with {', '.join(GPU_SUITES)}, and those with --gpu")
    if options.gpu:
        sys.exit(_main_of_the_gpu(options))
    before = environment()
    runs = [(suite, DEFAULT) for suite in options.only] if options.only else RUNS
    record = {
        "environment": before,
        "quick": options.quick,
        "runs": [
            _run(suite, allocator, options.quick, options.models) for suite, allocator in runs
        ],
    }
    _write(record, options, [*(options.only or []), *options.models])


def _main_of_the_gpu(options: argparse.Namespace) -> int:
    """Run the GPU's suites; write the file even where one fails, and return 1 then."""
    record: dict[str, Any] = {
        "environment": gpu_environment(), "quick": options.quick, "runs": [],
    }  # fmt: skip
    failed = False
    for suite in options.only or GPU_SUITES:
        run = _run_on_gpu(suite, options.quick, options.seconds)
        failed |= run["exit_status"] != 0
        record["runs"].append(run)
        _write(record, options, options.only or [])
    return int(failed)


def _write(record: dict[str, Any], options: argparse.Namespace, parts: list[str]) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    name = "-".join([_name(record["environment"], options.quick), *parts])
    written = options.out / f"{name}.json"
    written.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {written}", flush=True)


def _run_on_gpu(suite: str, quick: bool, seconds: float | None) -> dict[str, Any]:
    print(f"\n{suite}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, str(HERE / f"bench_{suite}.py"), "--json", str(result)]
        if seconds is not None:
            command += ["--seconds", str(seconds)]
        done = subprocess.run(command + ["--quick"] * quick, check=False)
        measured = json.loads(result.read_text()) if result.exists() else Result().as_json()
    warm = clocks()  # before the chip cools down
    return {"suite": suite, "exit_status": done.returncode, "clocks_after": warm, **measured}


def _run(suite: str, allocator: dict[str, str], quick: bool, models: list[str]) -> dict[str, Any]:
    inherited = {k: v for k, v in os.environ.items() if k not in KEPT}
    print(f"\n{suite}, allocator {'keeps freed memory' if allocator else 'as it is'}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, str(HERE / f"bench_{suite}.py"), "--json", str(result)]
        if models and suite.startswith("fisher"):
            command += ["--only", *models]
        load = LoadElsewhere()
        subprocess.run(command + ["--quick"] * quick, env=inherited | allocator, check=True)
        elsewhere = load.share()
        measured: dict[str, Any] = json.loads(result.read_text())
    if elsewhere is not None and elsewhere > NOISE:
        print(f"NOT QUIET  other processes took {elsewhere:.0%} of the cores: measure again")
    return {
        "suite": suite,
        "allocator": "keeps" if allocator else "default",
        "settings": allocator_settings(inherited | allocator),
        "load_elsewhere": elsewhere,
        **measured,
    }


def _name(environment: dict[str, Any], quick: bool) -> str:
    chip = environment.get("gpu") or environment["cpu"]
    processor = re.sub(r"[^a-z0-9]+", "-", chip.lower()).strip("-")
    dirty = "-dirty" if environment["dirty"] else ""
    return f"{'quick-' * quick}{processor}-{environment['commit']}{dirty}"


if __name__ == "__main__":
    main()

"""Runs every benchmark and writes benchmarks/results/<processor>-<commit>.json.

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

from harness import allocator_settings, environment
from quiet import NOISE, LoadElsewhere

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


def main() -> None:
    """Run everything; write and name the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it all work?")
    parser.add_argument("--only", nargs="+", choices=sorted({suite for suite, _ in RUNS}),
                        help="these suites, with the allocator's defaults")  # fmt: skip
    parser.add_argument("--models", nargs="+", default=[], help="of the Fisher's: these")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder to write to")
    options = parser.parse_args()
    before = environment()
    runs = [(suite, DEFAULT) for suite in options.only] if options.only else RUNS
    record = {
        "environment": before,
        "quick": options.quick,
        "runs": [
            _run(suite, allocator, options.quick, options.models) for suite, allocator in runs
        ],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    parts = "".join(f"-{part}" for part in [*(options.only or []), *options.models])
    written = options.out / f"{_name(before, options.quick)}{parts}.json"
    written.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {written}")


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
    processor = re.sub(r"[^a-z0-9]+", "-", environment["cpu"].lower()).strip("-")
    dirty = "-dirty" if environment["dirty"] else ""
    return f"{'quick-' * quick}{processor}-{environment['commit']}{dirty}"


if __name__ == "__main__":
    main()

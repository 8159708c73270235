"""Every example runs as it stands, and shows that less is forgotten."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {
    "plain_pytorch": "torch",
    "accelerate_loop": "accelerate",
    "hf_trainer": "transformers, accelerate",
    "lightning_callback": "lightning.pytorch",
    "avalanche_plugin": "avalanche.training",
}


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder of its own, on one thread: the models are small."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*NEEDS, "two_tasks"}


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_forgets_less_with_ewc(name, tmp_path):
    needs = run("-c", f"import {NEEDS[name]}", folder=tmp_path)
    if needs.returncode != 0:
        pytest.skip(f"needs {NEEDS[name]}: {needs.stderr.strip().splitlines()[-1]}")
    example = run(str(EXAMPLES / f"{name}.py"), folder=tmp_path)
    assert example.returncode == 0, example.stderr
    assert "accuracy on the first task after the second" in example.stdout


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_is_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 40

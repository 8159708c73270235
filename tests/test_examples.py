"""Every example runs as it stands, and shows that less is forgotten."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {
    "plain_pytorch": [],
    "accelerate_loop": ["accelerate"],
    "hf_trainer": ["transformers", "accelerate"],
    "lightning_callback": ["lightning"],
    "avalanche_plugin": ["avalanche"],
}


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*NEEDS, "two_tasks"}


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_forgets_less_with_ewc(name, tmp_path):
    missing = [library for library in NEEDS[name] if find_spec(library) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    # on one thread, as the models are small
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    example = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert example.returncode == 0, example.stderr
    assert "accuracy on the first task after the second" in example.stdout


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_is_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 40

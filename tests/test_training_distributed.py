"""Data-parallel training: every process ends with the same parameters, those of one alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_steps import STEPS, WORLD, two_tasks
from numerics import assert_within, u
from training import same

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch without gloo"
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    script, meeting = Path(__file__).with_name("distributed_steps.py"), folder / "meeting"
    outs = [folder / f"{rank}.pt" for rank in range(WORLD)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(meeting), str(out)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(out, weights_only=True) for out in outs]


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_all_processes_have_the_same_parameters_fisher_and_anchor(mode, results):
    assert all(same(result[mode], results[0][mode]) for result in results[1:])


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_they_are_those_of_one_process_with_whole_batches(mode, results, one_thread):
    alone = two_tasks(0, 1, mode)["parameters"]
    for name, param in results[0][mode]["parameters"].items():
        # sums of a batch in another order; errors grow with the steps that follow
        budget = 64 * 2 * STEPS * u(torch.float32) * (1 + alone[name].abs())
        assert_within(param, alone[name], budget, name)

"""The sweep over lambda runs in short, and shows what it is there to show."""

from __future__ import annotations

import json

import pytest

from ewc_fast import experiments
from ewc_fast.experiments import Options, lambda_sweep
from ewc_fast.experiments.shared.permuted import Training

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_proximal_mode_holds_where_the_gradient_collapses(tmp_path):
    assert experiments.run("lambda-sweep", Options(out=tmp_path, quick=True, workers=1))
    record = json.loads((tmp_path / "lambda-sweep.json").read_text())
    found = {
        (each["name"], each["ewc_lambda"]): each["seeds"][0]
        for each in record["results"]["accuracy"]
    }
    largest = max(lambda_sweep.QUICK.lambdas)
    assert len(found) == 1 + 2 * len(lambda_sweep.QUICK.lambdas)
    assert found[lambda_sweep.GRADIENT.name, largest] < 2 * lambda_sweep.CHANCE
    assert found[lambda_sweep.PROXIMAL.name, largest] > 4 * lambda_sweep.CHANCE
    assert (tmp_path / "lambda-sweep.png").stat().st_size > 10_000


def test_a_strength_of_zero_is_no_penalty():
    protocol = lambda_sweep.QUICK.protocol
    without = lambda_sweep.learn(Training(lambda_sweep.WITHOUT, protocol, seed=1))
    for mode in (lambda_sweep.GRADIENT, lambda_sweep.PROXIMAL):
        assert lambda_sweep.learn(Training(mode, protocol, seed=1)) == without

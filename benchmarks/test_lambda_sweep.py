"""The sweep over lambda runs in short, and shows what it is there to show."""

from __future__ import annotations

import json

import lambda_sweep
import pytest

pytest.importorskip("mlxtend")


def test_the_proximal_mode_holds_where_the_gradient_collapses(tmp_path):
    found = lambda_sweep.run(lambda_sweep.QUICK, tmp_path)
    largest = max(lambda_sweep.QUICK.lambdas)
    (gradient,) = lambda_sweep.means(found, "gradient")[largest]
    (proximal,) = lambda_sweep.means(found, "proximal")[largest]
    chance = 100 / lambda_sweep.mnist.CLASSES
    assert gradient < 2 * chance
    assert proximal > 4 * chance
    record = json.loads((tmp_path / "permuted_mnist.json").read_text())
    assert len(record["runs"]) == 1 + 2 * len(lambda_sweep.QUICK.lambdas)
    assert (tmp_path / "permuted_mnist.png").stat().st_size > 10_000

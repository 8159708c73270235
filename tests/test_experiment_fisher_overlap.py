"""Overlap by depth: which pixels move, what is compared, and what the tasks' closeness does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("mlxtend")

from ewc_fast.experiments import Options
from ewc_fast.experiments import fisher_overlap as experiment
from ewc_fast.experiments.fisher_overlap import Job, central_permutation, measure

TINY = replace(
    experiment.QUICK,
    hidden=2,
    width=10,
    epochs=1,
    fisher_samples=50,
    train=300,
    lambdas=(1.0, 10.0),
)


@pytest.mark.parametrize("size", [8, 26])
def test_the_central_square_is_permuted_and_nothing_else(size):
    order = central_permutation(size, seed=1)
    assert torch.equal(order.sort().values, torch.arange(28 * 28))
    moved = (order != torch.arange(28 * 28)).reshape(28, 28)
    inside = torch.zeros(28, 28, dtype=torch.bool)
    margin = (28 - size) // 2
    inside[margin:-margin, margin:-margin] = True
    assert inside.sum() == size**2
    assert not moved[~inside].any()
    assert moved[inside].double().mean() > 0.9  # some stay where they are by chance
    assert torch.equal(order, central_permutation(size, seed=1))
    assert not torch.equal(order, central_permutation(size, seed=2))


def test_equal_seeds_measure_the_same():
    first, again, other = (measure(Job(TINY, 10.0, seed)) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_every_layer_is_compared_and_halves_are_alike():
    found = measure(Job(TINY, 10.0, seed=0))
    assert {len(each) for each in found.overlaps.values()} == {len(TINY.widths) - 1}
    assert all(0 < value <= 1 for each in found.overlaps.values() for value in each)
    assert min(found.overlaps[experiment.HALVES]) > max(found.overlaps[experiment.APART][:2])


def test_the_quick_form_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "QUICK", TINY)
    findings = experiment.run(Options(out=tmp_path, quick=True, seeds=2, workers=1))
    chosen = findings.results["lambda"]
    assert chosen["chosen"] in TINY.lambdas
    assert [*chosen["scores"]] == ["1", "10"]
    assert all(len(each) == 2 for each in findings.results["overlaps"].values())
    for name in (experiment.SIMILAR, experiment.DISSIMILAR, experiment.HALVES, experiment.APART):
        assert name in findings.table

"""Noise shaped by the Fisher: the shapes, where the accuracy falls, and that the network stays."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.utils import parameters_to_vector

pytest.importorskip("matplotlib")
pytest.importorskip("mlxtend")

from ewc_fast.experiments import Options
from ewc_fast.experiments import perturbation as experiment
from ewc_fast.experiments.perturbation import (
    INVERSE,
    LESS,
    MORE,
    NULL,
    POSITIVE,
    SHUFFLED,
    UNIFORM,
    Job,
    Network,
    tolerance,
    variances,
)

TINY = replace(experiment.QUICK, width=10, epochs=1, sizes=(0.01, 0.1, 1.0), draws=2, seeds=1)
FISHER = torch.tensor([0.0, 0.0, 1.0, 3.0, 9.0, 27.0, 5.0, 0.5])


def shapes(damping=0.1, seed=0):
    return variances(FISHER, damping, torch.Generator().manual_seed(seed))


def test_every_kind_has_the_same_mean_variance():
    for variance in shapes().values():
        assert variance.mean().item() == pytest.approx(1.0)


def test_the_shapes_are_what_their_names_say():
    kinds = shapes()
    assert kinds[UNIFORM].unique().tolist() == [1.0]
    assert torch.allclose(kinds[INVERSE] * (FISHER + 0.1), kinds[INVERSE][0] * 0.1)
    assert torch.allclose(kinds[SHUFFLED].sort().values, kinds[INVERSE].sort().values)
    assert not torch.equal(kinds[SHUFFLED], kinds[INVERSE])
    assert torch.equal(kinds[NULL] > 0, FISHER == 0)
    assert torch.equal(kinds[POSITIVE] > 0, FISHER > 0)
    ratio = kinds[POSITIVE][2:] / kinds[INVERSE][2:]
    assert torch.allclose(ratio, ratio[0])
    assert torch.equal(kinds[MORE] > 0, FISHER > 1.0)  # the lower median
    assert torch.equal(kinds[LESS] > 0, FISHER <= 1.0)


def test_small_damping_puts_all_noise_into_the_null_space():
    kinds = shapes(damping=1e-9)
    assert torch.allclose(kinds[INVERSE], kinds[NULL], atol=1e-6)


def test_large_damping_makes_it_uniform():
    kinds = shapes(damping=1e9)
    assert torch.allclose(kinds[INVERSE], kinds[UNIFORM], atol=1e-6)


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        pytest.param([90, 90, 70], math.sqrt(0.1), id="half way in log size"),
        pytest.param([90, 60, 10], 0.01 * 10 ** (1 / 3), id="a third of the way"),
        pytest.param([90, 70, 90], 0.01 * math.sqrt(10), id="the first time counts"),
        pytest.param([90, 90, 80], 1.0, id="never"),
        pytest.param([79, 90, 90], 0.01, id="from the first on"),
    ],
)
def test_the_tolerance_is_where_the_accuracy_first_falls_below(curve, expected):
    assert tolerance(TINY, curve) == pytest.approx(expected)


def test_the_network_is_as_it_was_after_the_noise_and_repeats():
    network, again = Network(Job(TINY, seed=2)), Network(Job(TINY, seed=2))
    before = parameters_to_vector(network.model.parameters()).clone()
    uniform = torch.ones_like(network.fisher)
    curve = network.curve(uniform, network.images.test)
    assert torch.equal(parameters_to_vector(network.model.parameters()), before)
    assert again.curve(uniform, again.images.test) == curve
    assert len(network.fisher) == len(before)


def test_the_null_space_of_dark_pixels_is_harmless_where_they_are_dark():
    network = Network(Job(TINY, seed=0))
    dark = network.images.train.pixels.sum(0) == 0
    first = network.fisher[: TINY.width * 784].reshape(TINY.width, 784)
    assert dark.any()
    assert not first[:, dark].any()


def test_the_quick_form_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "QUICK", TINY)
    findings = experiment.run(Options(out=tmp_path, quick=True, workers=1))
    assert [*findings.results["tolerance by damping"]] == ["1e-06", "0.001"]
    assert set(findings.results["tolerance"]) == set(experiment.STYLES)
    assert all(name in findings.table for name in experiment.STYLES)

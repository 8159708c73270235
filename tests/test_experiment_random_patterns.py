"""Random patterns: the closed forms against exact recursions, sums over all cases, and ewc_fast."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from ewc_fast import fisher_diagonal

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from ewc_fast.experiments import Options
from ewc_fast.experiments import random_patterns as experiment
from ewc_fast.experiments.random_patterns.comparison import Comparison
from ewc_fast.experiments.random_patterns.simulation import Course, Job, Settings, simulate
from ewc_fast.experiments.random_patterns.theory import Consolidation, Descent, ratio, remembered

N = 1000
RULES = {rule.name: rule for rule in experiment.FULL.rules}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def exact_signal(rule, t0, t, n):
    later = rule.rate(np.arange(t0 + 1, t + 1))
    return rule.rate(t0) * np.prod(1 - later / n)


def exact_noise(rule, t, n):
    q = 0.0
    for b in rule.rate(np.arange(1, t + 1)):
        q += b**2 + (b**2 - 2 * b) * q / n
    return np.sqrt(q / n)


@each_rule
@pytest.mark.parametrize("t", [1, 10, 300, 1000, 5000])
def test_the_closed_forms_follow_the_exact_recursions(rule, t):
    # t being continuous costs 1 / n of one step's time, and as much of each factor 1 - b / n
    assert rule.noise(t) == pytest.approx(exact_noise(rule, t, N), rel=1 / N)
    for t0 in {1, t // 2 + 1, t}:
        allowed = (1 + t / N) / N
        assert rule.signal(t0, t) == pytest.approx(exact_signal(rule, t0, t, N), rel=allowed)


def test_the_signal_of_ewc_telescopes_exactly():
    rule = Consolidation(7)
    for t0, t in itertools.combinations_with_replacement(range(1, 30), 2):
        assert rule.signal(t0, t) == pytest.approx(exact_signal(rule, t0, t, 7), rel=1e-14)


@pytest.mark.parametrize("rule", [Consolidation(2), Descent(2, 2 / 3), Descent(2, 0.5)])
def test_the_recursions_are_averages_over_all_patterns(rule):
    """Three patterns of two synapses: all 4^3 patterns times 2^3 targets, one by one."""
    n, count = 2, 3
    inputs = [np.array(signs) / np.sqrt(n) for signs in itertools.product([-1, 1], repeat=n)]
    signals, squares, cases = np.zeros(count), 0.0, 0
    for patterns in itertools.product(inputs, repeat=count):
        for targets in itertools.product([-1, 1], repeat=count):
            weights = np.zeros(n)
            for t, (x, y) in enumerate(zip(patterns, targets, strict=True), start=1):
                weights = weights + rule.rate(t) * (y - x @ weights) * x
            signals += [y * (x @ weights) for x, y in zip(patterns, targets, strict=True)]
            squares, cases = squares + weights @ weights, cases + 1
    expected = [exact_signal(rule, t0, count, n) for t0 in (1, 2, 3)]
    np.testing.assert_allclose(signals / cases, expected, rtol=1e-12)
    assert np.sqrt(squares / cases / n) == pytest.approx(exact_noise(rule, count, n), rel=1e-12)


def test_ewc_has_the_limits_of_the_paper():
    rule = Consolidation(N)
    assert rule.noise(1) == pytest.approx(np.sqrt(1 / N), rel=2e-3)  # t << n: sqrt(t / n)
    t = 1e7 * N  # t >> n: sqrt(n / t), reached as log(t / n) n / t vanishes
    assert rule.noise(t) == pytest.approx(np.sqrt(N / t), rel=1e-5)
    for t in np.geomspace(10, 10 * N, 20):
        slope = np.log(ratio(rule, 1, 1.01 * t) / ratio(rule, 1, t)) / np.log(1.01)
        assert -0.545 < slope < -0.455


def test_memories_are_lost_at_once_or_by_age():
    assert remembered(Consolidation(N), 800, 1.0) == 1
    assert remembered(Consolidation(N), 850, 1.0) == 0
    # exp(-age / n) = sqrt(1 - exp(-t / n)) at the age where signal and noise are equal
    age = -np.log(np.sqrt(1 - np.exp(-1)))
    assert remembered(Descent(N, N / (N + 1)), N, 1.0) == pytest.approx(age, abs=2 / N)


SMALL = Settings(20, (1, 2, 4, 10, 20, 40), runs=2000, seeds=1)


@pytest.mark.parametrize("rule", SMALL.rules, ids=lambda rule: rule.name)
def test_the_simulation_is_what_the_recursions_say(rule):
    course = simulate(Job(SMALL, rule, seed=3))
    for edge, t in enumerate(SMALL.edges):
        noise = exact_noise(rule, t, SMALL.synapses)
        assert course.noise[edge] == pytest.approx(noise, rel=0.03)
        begins = [0, *SMALL.edges][: edge + 1]
        for block, (begin, end) in enumerate(zip(begins, SMALL.edges, strict=False)):
            signals = [
                exact_signal(rule, t0, t, SMALL.synapses) for t0 in range(begin + 1, end + 1)
            ]
            error = 5 * noise / np.sqrt(SMALL.runs * (end - begin))
            assert course.signals[edge, block] == pytest.approx(np.mean(signals), abs=error)
        assert np.isnan(course.signals[edge, edge + 1 :]).all()


def test_one_pattern_adds_one_over_n_to_the_fisher():
    unit = torch.nn.Linear(9, 1, bias=False)
    pattern = torch.tensor([[1.0, -1, 1, 1, -1, -1, 1, 1, -1]]) / 3
    fisher = fisher_diagonal(unit, [pattern], likelihood="gaussian")
    assert torch.allclose(fisher["weight"], torch.full((1, 9), 1 / 9))


def test_equal_seeds_draw_equal_patterns_for_every_rule():
    settings = replace(SMALL, runs=3)
    first, again = (simulate(Job(settings, settings.rules[0], seed=5)) for _ in range(2))
    assert np.array_equal(first.signals, again.signals, equal_nan=True)
    other = simulate(Job(settings, settings.rules[0], seed=6))
    assert not np.array_equal(first.signals, other.signals, equal_nan=True)


@each_rule
def test_what_follows_the_analysis_agrees_with_it(rule):
    settings = experiment.FULL
    begins = np.array([0, *settings.edges[:-1]])
    signals = np.full((len(begins), len(begins)), np.nan)
    for edge, t in enumerate(settings.edges):
        for block in range(edge + 1):
            learned = np.arange(begins[block] + 1, settings.edges[block] + 1)
            signals[edge, block] = rule.signal(learned, t).mean()
    one = Comparison(settings, rule, [Course(signals, rule.noise(settings.edges))])
    np.testing.assert_allclose(one.average[0], one.expected_average(), rtol=1e-12)
    np.testing.assert_allclose(one.remembered[0], one.expected_remembered(), atol=0.1)
    if isinstance(rule, Descent):
        measured, expected = one.by_age()
        np.testing.assert_allclose(measured[0], expected, rtol=1e-12)
        assert one.falls() == [pytest.approx(rule.constant)]
    else:
        assert all(abs(slope + 0.5) < 0.05 for (slope,) in one.slopes().values())


def test_the_quick_form_runs(tmp_path, monkeypatch):
    quick = replace(experiment.QUICK, runs=5)
    monkeypatch.setattr(experiment, "QUICK", quick)
    findings = experiment.run(Options(out=tmp_path, quick=True, seeds=1, workers=1))
    assert set(findings.results) == {rule.name for rule in quick.rules}
    assert "EWC: noise" in findings.table
    assert len(findings.claims) == 12

"""Times against sizes: what is timed, the slopes of known lines, and what the record holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("mlxtend")

from ewc_fast.experiments import Options
from ewc_fast.experiments import scaling as experiment
from ewc_fast.experiments.scaling import FISHER, FULL, HELD, PENALTY, PLAIN, Line, fitted
from ewc_fast.experiments.shared.training import perceptron

TINY = replace(experiment.QUICK, batches=(1, 2, 4), width=8, widths=(4, 8, 16), rounds=1)


def lines(samples, parameters, penalty, settings=FULL):
    """Lines of a power each, with the fixed price of a small size."""

    def line(over, sizes, power, names):
        seconds = [[1e-9 * size**power + 1e-6 * (size == sizes[0]) for size in sizes]] * 2
        return Line(over, sizes, dict.fromkeys(names, seconds))

    return [
        line("samples", [256 * n for n in settings.batches], samples, (FISHER, PLAIN)),
        line("parameters", [*map(experiment.parameters, settings.widths)], parameters, (FISHER,)),
        line("parameters", settings.parameters, penalty, (PENALTY,)),
    ]


def test_slopes_are_the_exponents_where_no_fixed_price_counts():
    slopes = fitted(FULL, lines(1.5, 0.9, 1.0))
    assert slopes[f"{FISHER} over samples"] == [pytest.approx(1.5)] * 2
    assert slopes[f"{FISHER} over parameters"] == [pytest.approx(0.9)] * 2
    assert slopes[f"{PENALTY} over parameters, in the caches"] == [pytest.approx(1.0)] * 2
    assert slopes[f"{PENALTY} over parameters, in main memory"] == [pytest.approx(1.0)] * 2


@pytest.mark.parametrize("settings", [FULL, experiment.QUICK], ids=["full", "quick"])
def test_every_slope_has_three_sizes_or_more(settings):
    _, _, penalty = lines(1, 1, 1, settings)
    low, high = (bound / HELD for bound in settings.in_caches)
    assert sum(low <= size <= high for size in penalty.sizes) >= 3
    assert sum(size >= settings.in_memory / HELD for size in penalty.sizes) >= 2


def test_claims_hold_for_straight_lines_and_not_for_others():
    assert all(claim.holds for claim in experiment._claims(fitted(FULL, lines(1, 1.1, 0.9))))
    assert not all(claim.holds for claim in experiment._claims(fitted(FULL, lines(1, 1.2, 1))))


@pytest.mark.parametrize("width", [3, 50])
def test_parameters_are_counted(width):
    model = perceptron([experiment.INPUTS, width, width, experiment.CLASSES], seed=0)
    assert experiment.parameters(width) == sum(p.numel() for p in model.parameters())


def test_what_is_timed_is_the_real_thing():
    timed = experiment.passes(4, 2)
    fisher = timed[FISHER]()
    assert all(values.any() for values in fisher.values())
    timed[PLAIN]()
    assert experiment.penalty(10)[PENALTY]().item() == 0  # at the anchor


def test_the_quick_form_runs_and_leaves_the_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "QUICK", TINY)
    before = torch.get_num_threads()
    findings = experiment.run(Options(out=tmp_path, quick=True, seeds=2))
    assert torch.get_num_threads() == before
    assert [line["over"] for line in findings.results["lines"]] == [
        *("samples", "parameters", "parameters")
    ]
    assert set(findings.results["slopes"]) == set(fitted(FULL, lines(1, 1, 1))) | {
        f"{PLAIN} over parameters"
    }
    assert all(len(each) == 2 for each in findings.results["slopes"].values())

"""Ten permuted tasks: dropout and early stopping do what they say; the short form runs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from ewc_fast import experiments
from ewc_fast.experiments import Options, ten_permutations
from ewc_fast.experiments.shared import permuted
from ewc_fast.experiments.shared.permuted import Protocol, Training
from ewc_fast.experiments.shared.training import accuracy
from ewc_fast.experiments.ten_permutations import ALONE, DROPOUT, GRADIENT, PLAIN

TINY = Protocol(tasks=3, epochs=2, width=8, train=300, test=100)

pytestmark = pytest.mark.usefixtures("one_thread")


class Scripted:
    """Stands for a learner whose validation accuracy follows a script; counts its epochs."""

    def __init__(self) -> None:
        self.model = nn.Linear(1, 1)
        self.epochs = 0

    def epoch(self, _) -> None:
        self.epochs += 1
        nn.init.constant_(self.model.weight, float(self.epochs))


@pytest.mark.parametrize(
    ("script", "stopped_after", "kept"),
    [
        pytest.param([1, 2, 3, 4], 4, 4, id="rising to the end"),
        pytest.param([5, 9, 8, 7, 6, 5, 4, 3, 99], 8, 2, id="six checks below the best"),
        pytest.param([5, 4, 4, 4, 4, 4, 6, 1], 8, 7, id="five and it recovers"),
        pytest.param([5, 5, 5, 5, 5, 5, 5, 5], 7, 1, id="flat: the first of equals"),
    ],
)
def test_a_task_ends_when_validation_keeps_below_its_best_and_the_best_comes_back(
    script, stopped_after, kept, monkeypatch
):
    learner = Scripted()
    monkeypatch.setattr(
        ten_permutations, "accuracy", lambda model, images: script[learner.epochs - 1]
    )
    seen = Training(PLAIN, TINY, seed=0).tasks()[:2]
    ten_permutations.learn_until_worse(learner, seen[0].images(), seen, epochs=len(script))
    assert learner.epochs == stopped_after
    assert learner.model.weight.item() == kept


def test_dropout_keeps_the_weights_and_is_off_where_accuracy_is_taken():
    training = Training(DROPOUT, TINY, seed=0)
    plain, dropping = training.network(), ten_permutations.with_dropout(training.network())
    rates = [layer.p for layer in dropping if isinstance(layer, nn.Dropout)]
    assert rates == [0.2, 0.5, 0.5]
    judged = training.tasks()[0].judged
    assert accuracy(dropping, judged) == accuracy(plain, judged)
    assert dropping.training
    assert not torch.equal(dropping(judged.pixels), plain(judged.pixels))


@pytest.mark.parametrize("method", [PLAIN, DROPOUT, GRADIENT, ALONE], ids=lambda m: m.name)
def test_a_seed_repeats_bit_for_bit_with_a_row_for_each_number_of_tasks(method):
    training = Training(replace(method, ewc_lambda=10.0), TINY, seed=3)
    if method == ALONE:
        training = Training(method, TINY, seed=3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    learned = ten_permutations.learn(training)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert ten_permutations.learn(training) == learned
    assert [len(row) for row in learned] == [1, 2, 3]


def test_tasks_alone_are_learned_by_networks_of_their_own():
    rows = ten_permutations.learn(Training(ALONE, TINY, seed=0))
    assert rows[1] == rows[2][:2]
    assert rows[0] == ten_permutations.learn(Training(PLAIN, TINY, seed=0))[0]


def test_the_target_is_asked_of_ewc_after_all_tasks():
    def found(ewc: float) -> ten_permutations.Found:
        methods = (PLAIN, DROPOUT, ten_permutations.UNIFORM)
        low = {method: [[[50.0], [50.0, 40.0]]] for method in methods}
        return low | {GRADIENT: [[[90.0], [90.0, 2 * ewc - 90.0]]]}

    assert all(claim.holds for claim in ten_permutations.claims(found(78.0)))
    target, *others = ten_permutations.claims(found(77.9))
    assert not target.holds
    assert all(claim.holds for claim in others)


def test_the_short_form_runs_and_records_every_seed(tmp_path, monkeypatch, capsys):
    quick = replace(ten_permutations.QUICK, protocol=replace(TINY, epochs=1))
    monkeypatch.setattr(ten_permutations, "QUICK", quick)
    options = Options(out=tmp_path, quick=True, seeds=2, workers=1)
    assert experiments.run("ten-permutations", options)
    record = json.loads((tmp_path / "ten-permutations.json").read_text())
    accuracies = record["results"]["accuracy"]
    assert len(accuracies) == 6
    assert all(len(seeds) == 2 for seeds in accuracies.values())
    assert len(record["results"]["choice"]) == len(quick.candidates())
    assert (tmp_path / "ten-permutations.png").stat().st_size > 10_000
    assert "each task alone" in capsys.readouterr().out
    assert ten_permutations.FULL.seeds < permuted.CHOOSING

"""The three scenarios: which outputs compete, how lambda is chosen, what is shared."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from ewc_fast import EWC
from ewc_fast.experiments import scenarios
from ewc_fast.experiments.scenarios import Cell, learning
from ewc_fast.experiments.scenarios.learning import (
    CLASS,
    DOMAIN,
    FINE_TUNING,
    JOINT,
    MASKED,
    METHODS,
    PLAIN_EWC,
    QUICK,
    SCENARIOS,
    SPLIT,
    TASK,
    Job,
    Method,
    Outputs,
)
from ewc_fast.experiments.shared.digit_tasks import five_thousand, permuted
from ewc_fast.experiments.shared.experiment import Options

ONE = replace(PLAIN_EWC, lambdas=(1e3, 1e5))
TINY = replace(
    QUICK,
    problems=tuple(replace(problem, tasks=problem.tasks, steps=2) for problem in QUICK.problems),
    methods=(FINE_TUNING, ONE, JOINT),
    width=5,
    samples=20,
)
TINY_SPLIT, TINY_PERMUTED = TINY.problems

pytestmark = pytest.mark.usefixtures("one_thread")


def job(softmax: learning.Softmax, method: Method, ewc_lambda: float = 0.0, seed: int = 0) -> Job:
    return Job(TINY, TINY_SPLIT, softmax, method, ewc_lambda, seed)


def listed(mask: torch.Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


# Outputs


@pytest.mark.parametrize(
    ("softmax", "count", "trained", "together"),
    [
        ("own", 6, [[0, 1], [2, 3], [4, 5]], [[0, 1], [2, 3], [4, 5]]),
        ("shared", 2, [[0, 1]] * 3, [[0, 1]] * 3),
        ("seen", 6, [[0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5]], [[0, 1, 2, 3, 4, 5]] * 3),
    ],
)
def test_which_outputs_compete_in_training(softmax, count, trained, together):
    outputs = Outputs(softmax, tasks=3, classes=2)
    assert outputs.count == count
    assert [listed(outputs.trained(n)) for n in range(3)] == trained
    assert [listed(outputs.together(n)) for n in range(3)] == together


def test_a_named_task_is_tested_among_its_own_outputs_and_others_among_all():
    """A network whose last task's outputs are the largest: right there, and elsewhere if named."""
    outputs = Outputs("own", tasks=2, classes=2)
    tasks = [learning.relabelled(t, 2 * n) for n, t in enumerate(SPLIT.draw(0)[:2])]
    model = torch.nn.Linear(784, 4)
    torch.nn.init.zeros_(model.weight)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([1.0, 0.0, 3.0, 2.0]))
    first = [100 * (task.test.digits == 2 * n).double().mean() for n, task in enumerate(tasks)]
    named = learning._tested(model, tasks, outputs, TASK, "test")
    among_all = learning._tested(model, tasks, outputs, MASKED, "test")
    assert named == pytest.approx(float(first[0] + first[1]) / 2)
    assert among_all == pytest.approx(float(first[1]) / 2)


# Tasks


def test_a_permutation_is_the_same_for_all_of_a_task_and_another_for_the_next():
    digits = five_thousand().at_most(train=50, test=20)
    one, two = permuted(digits, 2, seed=0)
    for part in ("train", "validation", "test"):
        plain, moved = getattr(digits, part), getattr(one, part)
        assert torch.equal(moved.digits, plain.digits)
        assert torch.equal(moved.pixels.sort(dim=1).values, plain.pixels.sort(dim=1).values)
    order = torch.randperm(784, generator=torch.Generator().manual_seed(0))
    assert torch.equal(one.train.pixels, digits.train.pixels[:, order])
    assert torch.equal(one.test.pixels, digits.test.pixels[:, order])
    assert not torch.equal(one.train.pixels, two.train.pixels)


# Trainings


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("softmax", ["own", "shared", "seen"])
def test_a_seed_decides_a_training_with_every_method(method, softmax):
    one = job(softmax, method, ewc_lambda=method.lambdas[0] if method.lambdas else 0.0)
    assert learning.train(one) == learning.train(one)


def test_masked_class_incremental_networks_are_the_task_incremental_ones():
    for seed in range(2):
        jobs = [Cell(SPLIT, each, PLAIN_EWC).jobs(TINY, 1e3, [seed]) for each in (TASK, MASKED)]
        assert jobs[0] == jobs[1]
    assert set(learning.train(job("own", FINE_TUNING)).test) == {TASK, MASKED}
    assert set(learning.train(job("shared", FINE_TUNING)).test) == {DOMAIN}
    assert set(learning.train(job("seen", FINE_TUNING)).test) == {CLASS}


def test_for_two_tasks_merged_and_latest_anchors_are_the_same():
    two = replace(TINY_SPLIT, tasks=2)
    latest = replace(PLAIN_EWC, anchor="latest")
    merged, online = (
        learning.train(Job(TINY, two, "own", method, 1e3, 0)) for method in (PLAIN_EWC, latest)
    )
    assert merged.test == online.test


@pytest.mark.parametrize("importance", ["fisher", "mas"])
def test_importance_is_measured_on_the_outputs_in_training_alone(importance):
    model = torch.nn.Linear(4, 6)
    ewc = EWC(model, importance=importance, ewc_lambda=1.0)
    allowed = Outputs("own", tasks=3, classes=2).of(1)
    data = [(torch.rand(5, 4), torch.tensor([2, 3, 2, 2, 3]))]
    ewc.consolidate(data, **learning._measured_on(Method("", importance), allowed))
    assert ewc.fisher["bias"].nonzero().flatten().tolist() == [2, 3]


# Lambda


def test_lambda_is_chosen_on_other_seeds_by_validation_images(monkeypatch):
    trained: list[Job] = []

    def pretend(one: Job) -> learning.Trained:
        trained.append(one)
        score = {1e3: 50.0, 1e5: 60.0}.get(one.ewc_lambda, 0.0)
        each = [scenario for scenario in SCENARIOS if scenario.softmax == one.softmax]
        return learning.Trained(
            validation=dict.fromkeys(each, score), test=dict.fromkeys(each, -score)
        )

    monkeypatch.setattr(scenarios, "train", pretend)
    settings = replace(TINY, seeds=2, choosing=(100, 101))
    found = scenarios.compare(settings, workers=1)
    assert all(each.ewc_lambda == 1e5 for cell, each in found.items() if cell.method == ONE)
    assert all(each.accuracies == [-60, -60] for c, each in found.items() if c.method == ONE)
    assert len(set(trained)) == len(trained)  # each once, though two scenarios share the first
    choosing = [one for one in trained if one.seed >= 100]
    assert {one.ewc_lambda for one in choosing} == {1e3, 1e5}
    assert {one.seed for one in trained} == {0, 1, 100, 101}


def test_it_runs_and_its_record_has_every_cell(tmp_path, monkeypatch):
    monkeypatch.setattr(scenarios, "QUICK", TINY)
    found = scenarios.run(Options(out=tmp_path, quick=True, workers=1))
    assert not found.claims
    cells = json.loads(json.dumps(found.results))["cells"]
    assert len(cells) == len(TINY.problems) * len(SCENARIOS) * len(TINY.methods)
    assert all(len(cell["test"]) == TINY.seeds for cell in cells)
    assert all(method.name in found.table for method in TINY.methods)
    assert len(found.figure.axes) == len(TINY.problems)

"""The experiment on kinds of Fisher: its tasks, its trainings, what it makes of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from ewc_fast import fisher_diagonal
from ewc_fast.experiments import fisher_kinds
from ewc_fast.experiments.fisher_kinds import learning, sweep
from ewc_fast.experiments.fisher_kinds.learning import EXACT, QUICK, RADEMACHER, Job, Training
from ewc_fast.experiments.shared.digit_tasks import five_thousand, split
from ewc_fast.experiments.shared.experiment import Options
from ewc_fast.experiments.shared.heads import mask, train_steps
from ewc_fast.experiments.shared.mnist import Images
from ewc_fast.experiments.shared.training import perceptron
from ewc_fast.fisher import Categorical

TINY = replace(QUICK, lambdas=(1e2, 1e8), width=5, steps=3)

pytestmark = pytest.mark.usefixtures("one_thread")


def some_images(count: int = 6, pixels: int = 4) -> Images:
    return Images(torch.rand(count, pixels), torch.randint(2, (count,)))


# Tasks


def test_a_split_gives_every_image_to_the_task_of_its_digit():
    digits = five_thousand()
    tasks = split(digits, 2, seed=3)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3)).tolist()
    for n, task in enumerate(tasks):
        for part in ("train", "validation", "test"):
            whole = getattr(digits, part)
            rows = [r for r, d in enumerate(whole.digits.tolist()) if d in order[2 * n : 2 * n + 2]]
            assert torch.equal(getattr(task, part).pixels, whole.pixels[rows])
            expected = [order[2 * n : 2 * n + 2].index(d) for d in whole.digits[rows].tolist()]
            assert getattr(task, part).digits.tolist() == expected


def test_the_labels_of_a_task_are_the_outputs_of_its_head():
    for n, task in enumerate(learning.digit_pairs(five_thousand(), 0)):
        assert set(task.train.digits.tolist()) == {2 * n, 2 * n + 1}
        assert learning.head_of(n).nonzero().flatten().tolist() == [2 * n, 2 * n + 1]


# Heads


def test_the_loss_is_that_of_a_network_with_the_allowed_outputs_alone():
    """Cut the other rows out of the last layer: the same images move the rest the same way."""
    images = some_images()
    whole = perceptron([4, 3, 6], seed=0)
    part = perceptron([4, 3, 2], seed=0)
    part[0].load_state_dict(whole[0].state_dict())
    with torch.no_grad():
        part[2].weight.copy_(whole[2].weight[2:4])
        part[2].bias.copy_(whole[2].bias[2:4])
    before = whole[2].weight.detach().clone()
    for model, first, allowed in ((whole, 2, mask(range(2, 4), 6)), (part, 0, mask(range(2), 2))):
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        of_head = Images(images.pixels, images.digits + first)
        order = torch.Generator().manual_seed(1)
        train_steps(model, sgd, of_head, allowed, order, steps=5, batch=3)
    torch.testing.assert_close(whole[2].weight[2:4], part[2].weight)
    torch.testing.assert_close(whole[0].weight, part[0].weight)
    assert torch.equal(whole[2].weight[[0, 1, 4, 5]], before[[0, 1, 4, 5]])


def test_masks_may_be_one_for_each_image():
    """Two heads in one batch: the loss's gradient is the sum of the heads' own."""
    images = some_images(4)
    labels = torch.tensor([0, 1, 2, 3])
    allowed = torch.eye(2, dtype=torch.bool).repeat_interleave(2, dim=1)[labels // 2]
    model = torch.nn.Linear(4, 4)
    with torch.no_grad():
        logits = model(images.pixels)
        p = torch.cat([logits[:2, :2].softmax(1), logits[2:, 2:].softmax(1)])
        score = torch.zeros(4, 4)
        score[:2, :2], score[2:, 2:] = p[:2] - torch.eye(2), p[2:] - torch.eye(2)
        rows = torch.randint(4, (1, 64), generator=torch.Generator().manual_seed(0))[0]
        expected = model.weight - 0.5 * score[rows].T @ images.pixels[rows] / 64
    train_steps(
        model,
        torch.optim.SGD(model.parameters(), lr=0.5),
        Images(images.pixels, labels),
        allowed,
        torch.Generator().manual_seed(0),
        steps=1,
        batch=64,
    )
    torch.testing.assert_close(model.weight, expected)


# Fisher


@pytest.mark.parametrize("kind", [EXACT, RADEMACHER], ids=lambda kind: kind.name)
def test_of_two_classes_the_fisher_is_p_q_times_the_squared_gradient_of_the_logits_difference(kind):
    r"""With p of two: E[(d log p)^2] = p (q d)^2 + q (p d)^2 = p q d^2, d = d(z_1 - z_0)."""
    images, model = some_images(), perceptron([4, 3, 10], seed=0)
    fisher = fisher_diagonal(
        model,
        learning.batches(Images(images.pixels, images.digits + 4), 4),
        likelihood=Categorical(classes=learning.head_of(2)),
        estimator=kind.estimator,
    )
    exactly = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in fisher.items()}
    model.double()
    for pixels in images.pixels.double():
        z = model(pixels)
        p = z[4:6].softmax(0).detach()
        difference = torch.autograd.grad(z[5] - z[4], list(model.parameters()))
        for total, gradient in zip(exactly.values(), difference, strict=True):
            total += p[0] * p[1] * gradient.square() / len(images)
    for name, values in fisher.items():
        # float32's gradients have lost some 10 roundings by the first layer
        torch.testing.assert_close(values.double(), exactly[name], rtol=40 * 2**-24, atol=1e-12)


# Trainings


def test_a_seed_decides_a_training():
    job = Job(TINY, 1, learning.KINDS[3], "gradient", 1e4)
    first, again = learning.train(job), learning.train(job)
    assert replace(first, fisher_seconds=0) == replace(again, fisher_seconds=0)


@pytest.mark.parametrize("mode", learning.MODES)
def test_without_lambda_the_fisher_changes_nothing(mode):
    without, with_fisher = learning.train(Job(TINY, 0)), learning.train(Job(TINY, 0, EXACT, mode))
    assert (with_fisher.test, with_fisher.validation) == (without.test, without.validation)
    assert with_fisher.first_trace > 0 == without.first_trace


# What it makes of them


def trainings(validation: dict[float, list[float]]) -> tuple[Training, ...]:
    return tuple(
        Training(Job(TINY, seed, EXACT, "gradient", each), [score, score], [score - 1], 0.5, 2.0)
        for each, scores in validation.items()
        for seed, score in enumerate(scores)
    )


def test_lambda_is_the_smallest_of_the_best_by_the_mean_over_seeds():
    scores = {1.0: [99.0, 88.0], 10.0: [96.0, 94.0], 100.0: [95.0, 95.0], 1e3: [94.0, 94.0]}
    found = sweep.Sweep(EXACT, "gradient", trainings(scores))
    assert found.best == 10
    assert found.test == [95, 93]
    assert found.decades == 3  # those at 94 or more


def test_it_runs_and_its_record_has_every_training(tmp_path, monkeypatch):
    monkeypatch.setattr(fisher_kinds, "QUICK", TINY)
    found = fisher_kinds.run(Options(out=tmp_path, quick=True, workers=1))
    assert not found.claims
    record = json.loads(json.dumps(found.results))
    assert len(record["sweeps"]) == len(learning.KINDS) * len(learning.MODES)
    assert all(len(each["trainings"]) == len(TINY.lambdas) for each in record["sweeps"])
    assert all(kind.name in found.table for kind in learning.KINDS)
    assert len(found.figure.axes) == len(learning.MODES)
    without = [sweep.training_record(t) for t in (learning.train(Job(TINY, 0)),)]
    assert record["without"] == without

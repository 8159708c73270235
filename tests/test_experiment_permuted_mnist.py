"""Three permuted tasks: what is trained, what is chosen, and what is said about it; the demo."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ewc_fast import experiments
from ewc_fast.experiments import Options, permuted_mnist
from ewc_fast.experiments.permuted_mnist import GRADIENT, PLAIN, PROXIMAL, SLOW, UNIFORM
from ewc_fast.experiments.shared import permuted
from ewc_fast.experiments.shared.permuted import Learner, Method, Protocol, Training

TINY = Protocol(tasks=3, epochs=2, width=8, train=300, test=100)
IN_ORDER = (PLAIN, UNIFORM, GRADIENT)

pytestmark = pytest.mark.usefixtures("one_thread")


# Training


def test_each_task_permutes_all_pixels_in_an_order_of_its_own():
    plain = [Training(PLAIN, TINY, seed).tasks() for seed in (0, 1)]
    tasks = [task for tasks in plain for task in tasks]
    images = [task.images().pixels for task in tasks]
    for pixels in images:  # the same values in every image, in other places
        assert torch.equal(pixels.sort(dim=1).values, images[0].sort(dim=1).values)
    assert len({pixels.numpy().tobytes() for pixels in images}) == len(tasks) == 6


def test_what_is_learned_and_what_is_judged_share_an_order_but_no_image():
    for part in ("test", "validation"):
        task = Training(PLAIN, TINY, seed=0, judged_on=part).tasks()[1]
        order = torch.from_numpy(_second_order(784, seed=0))
        whole = permuted.mnist.load(None)
        expected = {"test": whole.test[:100], "validation": whole.validation}[part]
        assert torch.equal(task.judged.pixels, expected.pixels[:, order])
        assert torch.equal(task.images().pixels, whole.train[:300].pixels[:, order])


def _second_order(pixels: int, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return [draw.permutation(pixels) for _ in range(2)][1]


def test_a_seed_repeats_bit_for_bit_and_leaves_the_global_random_state():
    training = Training(GRADIENT, TINY, seed=3)
    before = torch.get_rng_state()
    assert permuted_mnist.learn(training) == permuted_mnist.learn(training)
    assert torch.equal(torch.get_rng_state(), before)


def test_methods_with_one_learning_rate_are_equal_until_the_first_task_ends():
    protocol = replace(TINY, width=32, epochs=5)
    plain = permuted_mnist.learn(Training(PLAIN, protocol, seed=0))
    stronger_l2 = replace(UNIFORM, ewc_lambda=1.0)  # seen after few steps
    for method in (stronger_l2, GRADIENT, PROXIMAL):
        curves = permuted_mnist.learn(Training(method, protocol, seed=0))
        assert curves[: protocol.epochs] == plain[: protocol.epochs]
        assert curves[protocol.epochs :] != plain[protocol.epochs :]


def test_a_diverged_network_keeps_nothing_and_is_no_better_than_chance():
    diverging = replace(GRADIENT, ewc_lambda=1e6)
    curves = permuted_mnist.learn(Training(diverging, TINY, seed=0))
    assert all(accuracy < 30 for accuracy in curves[-1])


def test_plain_sgd_is_what_pytorch_does():
    training = Training(PLAIN, TINY, seed=0)
    images = training.tasks()[0].images()
    learner, model = Learner(training.network(), PLAIN, seed=0), training.network()
    learner.epoch(images)
    optimizer = torch.optim.SGD(model.parameters(), lr=PLAIN.lr)
    permuted.train_epoch(model, optimizer, images, torch.Generator().manual_seed(0))
    for ours, theirs in zip(learner.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# Choosing


def test_the_best_of_each_name_is_chosen_by_its_mean_over_seeds():
    first, second, other = Method("a", lr=1.0), Method("a", lr=2.0), Method("b")
    choice = permuted.Choice({first: [9.0, 1.0], second: [4.0, 7.0], other: [0.0, 0.0]})
    assert choice.best() == [second, other]
    assert [each["scores"] for each in choice.record()] == [[9.0, 1.0], [4.0, 7.0], [0.0, 0.0]]


def test_candidates_are_judged_on_validation_images_over_permutations_never_reported_on():
    seen = []

    def score(training):
        seen.append(training)
        return 0.0

    permuted.choose(score, [PLAIN, SLOW], TINY, 2, Options(out=Path(), workers=1))
    assert {training.judged_on for training in seen} == {"validation"}
    assert [training.seed for training in seen] == [100, 101, 100, 101]
    assert max(permuted_mnist.FULL.seeds, permuted_mnist.DEMO_SEEDS) < permuted.CHOOSING


# Reporting


def found_with_final(*means: float, seeds: int = 1) -> permuted_mnist.Found:
    """Accuracies of the order's methods; every seed and epoch is the same."""
    shape = (seeds, 3 * TINY.epochs, 3)
    return {m: np.full(shape, mean) for m, mean in zip(IN_ORDER, means, strict=True)}


@pytest.mark.parametrize(
    ("means", "held"),
    [
        pytest.param((67, 81, 92), True, id="in order"),
        pytest.param((70, 73, 76), False, id="just the margin"),
        pytest.param((70, 72, 92), False, id="SGD too close"),
        pytest.param((67, 90, 92), False, id="L2 too close"),
        pytest.param((81, 67, 92), False, id="L2 below SGD"),
        pytest.param((67, 92, 81), False, id="EWC below L2"),
        pytest.param((67, 81, float("nan")), False, id="not a number"),
    ],
)
def test_the_claims_ask_for_the_order_with_its_margins(means, held):
    claims = permuted_mnist.claims(found_with_final(*means), margin=3.0)
    assert all(claim.holds for claim in claims) == held
    assert any("DOES NOT HOLD" in str(claim) for claim in claims) != held


def test_the_claims_show_the_numbers_they_rest_on():
    first, second = permuted_mnist.claims(found_with_final(67, 81, 91.5), margin=3.0)
    assert first.text == "SGD 67.0 < uniform L2 81.0, by more than 3"
    assert second.text == "uniform L2 81.0 < EWC 91.5, by more than 3"


@pytest.mark.parametrize(("l2", "held"), [(67.1, True), (67.0, False)])
def test_a_margin_of_zero_asks_for_the_order_alone(l2, held):
    claims = permuted_mnist.claims(found_with_final(67.0, l2, 92), margin=0.0)
    assert all(claim.holds for claim in claims) == held


def test_the_table_shows_known_tasks_after_each_task_and_their_mean_at_the_end():
    found = found_with_final(0, 0, 0, seeds=3)
    accuracy = found[GRADIENT]
    accuracy[:, 1] = [90, 11, 12]
    accuracy[:, 3] = [80, 91, 13]
    accuracy[:, 5] = [70, 81, 92]
    accuracy[:, 5] += np.array([[-3], [0], [3]])
    row = " ".join(permuted_mnist.summary(found).splitlines()[-1].split())
    assert row == "EWC, lambda 30 90.0 80.0 91.0 70.0 81.0 92.0 81.0 +- 3.0"


def test_one_seed_has_no_deviation_in_the_table():
    assert "+-" not in permuted_mnist.summary(found_with_final(67, 81, 92))


def test_the_figure_leaves_no_trace_in_pyplot():
    permuted_mnist.figure(found_with_final(67, 81, 92))
    pyplot = pytest.importorskip("matplotlib.pyplot")
    assert pyplot.get_fignums() == []


# Running


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_demo_prints_table_and_verdict_and_saves_the_figure(
    seeds, tmp_path, monkeypatch, capsys
):
    tiny = replace(permuted_mnist.FULL, protocol=replace(TINY, epochs=1))
    monkeypatch.setattr(permuted_mnist, "FULL", tiny)
    folder = tmp_path / "new" / "folder"
    held = experiments.demo(Options(out=folder, seeds=seeds, workers=1))
    printed = capsys.readouterr().out
    for method in permuted_mnist.CHOSEN:
        assert f"\n{method.label} " in printed
    assert ("DOES NOT HOLD" in printed) != held
    assert f"Figure: {folder / 'permuted_mnist.png'}" in printed
    assert (folder / "permuted_mnist.png").read_bytes().startswith(b"\x89PNG")


def test_the_experiment_records_its_choice_and_each_seed(tmp_path, monkeypatch):
    tiny = replace(permuted_mnist.QUICK, protocol=replace(TINY, epochs=1))
    monkeypatch.setattr(permuted_mnist, "QUICK", tiny)
    experiments.run("permuted-mnist", Options(out=tmp_path, quick=True, seeds=2, workers=1))
    record = json.loads((tmp_path / "permuted-mnist.json").read_text())
    grids = permuted_mnist.QUICK_GRIDS
    assert len(record["results"]["choice"]) == len(grids.candidates())
    assert len(record["results"]["accuracy"]) == 5
    for found in record["results"]["accuracy"].values():
        assert len(found["final_mean"]) == 2
        assert np.shape(found["after_each_task"]) == (2, 3, 3)
        assert np.shape(found["curves"]) == (3, 3)
    assert (tmp_path / "permuted-mnist.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("quick", "whole", "protocol", "seeds"),
    [
        pytest.param(False, False, permuted_mnist.FULL.protocol, 3, id="full"),
        pytest.param(True, False, permuted_mnist.QUICK.protocol, 1, id="quick"),
        pytest.param(False, True, permuted_mnist.WHOLE_MNIST.protocol, 3, id="whole MNIST"),
        # of which the short form learns a part
        pytest.param(True, True, permuted_mnist.QUICK.protocol, 1, id="whole MNIST, quick"),
    ],
)
def test_the_demo_trains_what_was_asked_for(quick, whole, protocol, seeds, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(permuted_mnist, "compare", lambda *asked: seen.append(asked))
    permuted_mnist.demo(Options(out=tmp_path, quick=quick, data=tmp_path if whole else None))
    ((methods, settings, _),) = seen
    assert (settings.protocol, settings.seeds) == (protocol, seeds)
    assert tuple(methods) == (IN_ORDER if quick else permuted_mnist.CHOSEN)

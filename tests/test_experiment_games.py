"""The games experiment: its agent, its recogniser of tasks, and that it runs."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import exp, lgamma

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")

from ewc_fast.experiments import Options, games
from ewc_fast.experiments.games import experiment
from ewc_fast.experiments.games.agent import Agent, double_q_targets
from ewc_fast.experiments.games.forget_me_not import ForgetMeNot, filtered, log_predictive
from ewc_fast.experiments.games.labels import Inferred, accuracy
from ewc_fast.experiments.games.network import OfTask, QNetwork
from ewc_fast.experiments.games.play import Job, Run, play
from ewc_fast.experiments.games.protection import Protection, of_action
from ewc_fast.experiments.games.replay import Lookahead, Replay, Transitions
from ewc_fast.experiments.games.scales import Scale, summary
from ewc_fast.experiments.games.settings import ATARI_QUICK, QUICK, Kind
from ewc_fast.experiments.games.worlds import ALE, MINATAR, Step, Worlds

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = replace(
    QUICK,
    games=("breakout", "space_invaders", "freeway"),
    block=160,
    visits=2,
    strengths=(10.0,),
    search_block=160,
    learn_after=32,
    explore=32,
    greedy_from=100,
    minibatches=1,
    evaluation_copies=2,
    evaluation_steps=10,
    dwell=8,
)


def transitions(count: int, seed: int = 0) -> Transitions:
    random = torch.Generator().manual_seed(seed)
    states = torch.randint(2, (2, count, *MINATAR.frame), generator=random).byte()
    actions = torch.randint(6, (count,), generator=random)
    rewards, ends = torch.rand(2, count, generator=random)
    return Transitions(states[0], actions, rewards, states[1], ends.round())


# The forget-me-not process


def test_the_filter_gives_the_posterior_of_all_paths_added_up():
    random = np.random.default_rng(0)
    likelihood, rates = random.random((5, 3)), [0.0, 0.5, 0.3, 0.25, 0.2]
    posterior = np.log(np.full(3, 1 / 3))
    for seen, rate in zip(likelihood, rates, strict=True):
        posterior = filtered(posterior, np.log(seen), rate)

    last = np.zeros(3)
    for path in product(range(3), repeat=5):
        weight = likelihood[0, path[0]] / 3
        for t in range(1, 5):
            stays = path[t] == path[t - 1]
            weight *= likelihood[t, path[t]] * (1 - rates[t] if stays else rates[t] / 2)
        last[path[-1]] += weight
    np.testing.assert_allclose(np.exp(posterior), last / last.sum(), rtol=1e-12)


def test_the_process_weighs_models_as_enumerating_all_paths_does():
    """Two models, one of which has seen a window; then three observations, predicted in turn."""
    process = ForgetMeNot(pixels=2, values=2, prior=0.5, window=4, most=2)
    first, later = [[0, 1]] * 4, [[0, 1], [1, 0], [1, 0]]
    for frame in first:
        process.observe(np.array([frame]))
    assert process.tasks == 1
    before = np.exp(process.log_posterior)
    np.testing.assert_allclose(before, [4 / 5, 1 / 5])  # the new held-out one's is the next rate
    for frame in later:
        process.observe(np.array([frame]))

    def predicted(start: int, t: int) -> float:
        found = 1.0
        for pixel in range(2):
            seen = [f[pixel] for f in first[:start] + later[:t]]
            found *= (seen.count(later[t][pixel]) + 0.5) / (len(seen) + 1)
        return found

    weights = np.zeros(2)
    for path in product(range(2), repeat=4):  # the model before, then of each observation
        weight = before[path[0]]
        for t in range(3):
            rate = 1 / (5 + t)
            weight *= (1 - rate) if path[t + 1] == path[t] else rate
            weight *= predicted([4, 0][path[t + 1]], t)
        weights[path[-1]] += weight
    expected = weights / weights.sum()
    np.testing.assert_allclose(np.exp(process.log_posterior), expected, rtol=1e-12)


@pytest.mark.parametrize("prior", [0.5, 1.0])
def test_predictions_multiply_to_the_closed_form_of_beta_bernoulli(prior):
    """prod_t p(x_t | x_<t) = B(a + n1, a + n0) / B(a, a)."""
    bits, counts, found = [1, 0, 0, 1, 1, 0, 1], np.zeros((1, 2)), 0.0
    for bit in bits:
        found += log_predictive(counts, prior)[0, bit]
        counts[0, bit] += 1

    def log_beta(a: float, b: float) -> float:
        return lgamma(a) + lgamma(b) - lgamma(a + b)

    expected = log_beta(prior + counts[0, 1], prior + counts[0, 0]) - log_beta(prior, prior)
    assert exp(found) == pytest.approx(exp(expected), rel=1e-12)


def test_only_the_best_model_keeps_what_a_window_taught():
    process = ForgetMeNot(pixels=4, values=2, prior=0.5, window=4, most=3)
    dark, bright = np.zeros((1, 4), np.int64), np.ones((1, 4), np.int64)
    named = [process.observe(dark) for _ in range(40)]
    named += [process.observe(bright) for _ in range(40)]
    named += [process.observe(dark) for _ in range(40)]
    assert process.tasks == 2
    assert named[:40] == [0] * 40
    assert named[44:80] == [1] * 36
    assert named[84:] == [0] * 36
    assert (process.recognise(dark), process.recognise(bright)) == (0, 1)


def test_frames_of_several_copies_count_as_one_observation():
    one, several = (ForgetMeNot(4, 2, prior=1.0, window=4, most=3) for _ in range(2))
    frame = np.array([[0, 1, 1, 0]])
    for _ in range(10):
        one.observe(frame)
        several.observe(np.repeat(frame, 8, axis=0))
    np.testing.assert_allclose(one.log_posterior, several.log_posterior)


def test_another_task_is_believed_only_after_a_while():
    labels = Inferred(replace(TINY, dwell=5))
    said = iter([0, 0, 0, 0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1])
    labels._process.observe = lambda pixels: next(said)
    frames = np.zeros((1, *MINATAR.frame), np.uint8)
    found = [(labels.observe(frames, "unknown"), labels.sure) for _ in range(14)]
    assert [task for task, _ in found] == [0] * 12 + [1] * 2
    assert [at for at, (_, sure) in enumerate(found) if not sure] == [5, 6, 8, 9, 10, 11]


def test_labels_are_right_whatever_they_are_called_but_not_if_two_games_share_one():
    played = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    assert accuracy(played, np.array([3, 3, 3, 3, 0, 0, 0, 3])) == 87.5
    assert accuracy(played, np.zeros(8, np.int64)) == 50


def test_the_process_tells_three_games_apart():
    pytest.importorskip("minatar")
    process = ForgetMeNot(100, MINATAR.levels, prior=0.5, window=4, most=6)
    random = np.random.default_rng(0)
    played, named = [], []
    for game in ["breakout", "space_invaders", "freeway"] * 2:
        worlds = Worlds(MINATAR, game, copies=8, seed=0)
        for _ in range(300):
            played.append(TINY.games.index(game))
            named.append(process.observe(MINATAR.pixels(worlds.frames)))
            worlds.act(random.integers(6, size=8))
    assert process.tasks == 3
    assert accuracy(np.array(played), np.array(named)) > 97


# The agent


@pytest.mark.parametrize("weights", [nn.Conv2d(2, 3, 3, bias=False), nn.Linear(4, 3, bias=False)])
def test_a_layer_adds_its_tasks_biases_then_multiplies_by_its_gains(weights):
    layer = OfTask(weights, tasks=2)
    x = torch.randn(5, 2, 4, 4) if isinstance(weights, nn.Conv2d) else torch.randn(5, 4)
    torch.testing.assert_close(layer(x, 1), weights(x))  # b = 0, g = 1 at first
    with torch.no_grad():
        layer.biases[1].normal_()
        layer.gains[1].normal_()
    torch.testing.assert_close(layer(x, 0), weights(x))  # another task's are others
    expected = weights(x).clone()
    for unit in range(3):
        bias, gain = layer.biases[1].flatten()[unit], layer.gains[1].flatten()[unit]
        expected[:, unit] = (expected[:, unit] + bias) * gain
    torch.testing.assert_close(layer(x, 1), expected)


def test_double_q_targets_are_those_computed_by_hand():
    online = torch.tensor([[1.0, 3.0], [5.0, 2.0]])  # picks action 1, then 0
    target = torch.tensor([[10.0, 20.0], [30.0, 40.0]])

    class Table(nn.Module):
        def __init__(self, values):
            super().__init__()
            self.values = values

        def forward(self, states, task):
            return self.values[states.long()]

    batch = Transitions(
        states=torch.tensor([0, 0, 0]),
        actions=torch.tensor([0, 0, 0]),
        rewards=torch.tensor([1.0, 0.0, 1.0]),
        next_states=torch.tensor([0, 1, 1]),
        ends=torch.tensor([0.0, 0.0, 1.0]),
    )
    found = double_q_targets(batch, Table(online), Table(target), task=0, discount=0.5)
    assert found.tolist() == [1 + 0.5 * 20, 0.5 * 30, 1]


def test_a_replay_keeps_the_last_transitions_whole():
    replay, frame = Replay(capacity=10, frame=(1, 2, 2)), np.ones((4, 1, 2, 2), np.uint8)
    for number in range(5):
        value = number * 4 + np.arange(4)
        step = Step(
            frame * (value[:, None, None, None] + 100).astype(np.uint8),
            value.astype(np.float32),
            value % 2 == 1,
        )
        replay.add(frame * value[:, None, None, None].astype(np.uint8), value, step)
    assert len(replay) == 10
    drawn = replay.sample(1000, np.random.default_rng(0))
    assert drawn.actions.unique().tolist() == list(range(10, 20))
    assert torch.equal(drawn.states[:, 0, 0, 0].long(), drawn.actions)
    assert torch.equal(drawn.next_states[:, 0, 1, 1].long(), drawn.actions + 100)
    assert torch.equal(drawn.rewards.long(), drawn.actions)
    assert torch.equal(drawn.ends.long(), drawn.actions % 2)


def test_a_lookahead_adds_up_rewards_until_an_episode_ends():
    ahead, frame = Lookahead(steps=3, discount=0.5), np.zeros((2, 1, 1, 1), np.uint8)
    ends = [[False, False], [False, True], [False, False], [False, False]]
    for number, over in enumerate(ends):
        rewards = np.array([1, 10], np.float32)
        found = ahead.add(
            frame + number,
            np.array([number] * 2),
            Step(frame + number + 1, rewards, np.array(over)),
        )
        if number < 2:
            assert found is None
            continue
        states, actions, step = found
        assert states.ravel().tolist() == actions.tolist() == [number - 2] * 2
        assert step.frames.ravel().tolist() == [number + 1] * 2
        assert step.ends.tolist() == [False, True]
        assert step.rewards.tolist() == [1.75, 15 if number == 2 else 10]
    ahead.clear()
    assert ahead.add(frame, np.zeros(2, np.int64), step) is None


def test_the_fisher_information_is_that_of_the_value_of_the_action_taken():
    network, batch, task = QNetwork(MINATAR, tasks=2, seed=0), transitions(6), 1
    protection = Protection(network)
    parts = [Transitions(*(each[rows] for each in batch)) for rows in (slice(4), slice(4, 6))]
    protection.memorise(task, parts, variance=0.25)
    fisher, _ = protection._kept[task]
    expected = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for state, action in zip(batch.states, batch.actions, strict=True):
        network.zero_grad()
        network(state[None], task)[0, action].backward()
        for name, parameter in network.named_parameters():
            if parameter.grad is not None:
                expected[name] += parameter.grad.square() / 6 / 0.25
    for name, value in expected.items():
        torch.testing.assert_close(fisher[name], value, rtol=1e-4, atol=1e-6)
    assert not fisher["hidden.gains.0"].any()
    assert fisher["hidden.gains.1"].any()


def test_penalties_of_all_other_tasks_hold_each_around_its_own_parameters():
    network = QNetwork(MINATAR, tasks=3, seed=0)
    protection, kept = Protection(network), {}
    for task in range(3):
        protection.memorise(task, [transitions(8, seed=task)], variance=1.0)
        kept[task] = {name: p.detach().clone() for name, p in network.named_parameters()}
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    now = [parameter.detach().clone() for parameter in network.parameters()]
    penalty = protection.of_all_but(1, strength=3.0).penalty().item()
    assert all(map(torch.equal, network.parameters(), now))
    expected = sum(
        3 / 2 * (protection._kept[task][0][name] * (p - kept[task][name]) ** 2).sum().item()
        for task in (0, 2)
        for name, p in network.named_parameters()
    )
    assert penalty == pytest.approx(expected, rel=1e-4)


def test_epsilon_has_a_timer_for_each_task():
    agent = Agent(
        replace(TINY, explore=80, greedy_from=81, least_epsilon=0.0, persistence=20.0), 0.0, seed=0
    )
    frames = np.zeros((8, *MINATAR.frame), np.uint8)
    drawn = np.array([agent.act(frames) for _ in range(10)])
    greedy = agent.best(frames, 0)
    assert (drawn != greedy).any()
    assert (np.array([agent.act(frames) for _ in range(10)])[1:] == greedy).all()
    agent.switch(1)
    assert (np.array([agent.act(frames) for _ in range(10)]) != agent.best(frames, 1)).any()
    agent.switch(0)
    assert (agent.act(frames) == greedy).all()


# The whole


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name.lower())
def test_a_run_repeats_for_a_seed(kind):
    pytest.importorskip("minatar")
    first, again = (play(Job(kind, TINY, seed=3, strength=10.0)) for _ in range(2))
    assert first == again
    assert first.frames == [160 * number for number in range(7)]


def test_an_episode_that_ends_is_followed_by_another():
    pytest.importorskip("minatar")
    worlds, ended = Worlds(MINATAR, "breakout", copies=4, seed=0), False
    start = worlds.frames[:, 3].copy()  # all bricks
    for _ in range(200):
        step = worlds.act(np.zeros(4, np.int64))
        for copy in np.flatnonzero(step.ends):
            assert (worlds.frames[copy, 3] == start[copy]).all()
            ended = True
    assert ended


def test_a_score_is_on_the_scale_from_random_play_to_the_expert():
    assert Scale(random=2.0, expert=10.0).of(6.0) == 0.5
    assert Scale(random=2.0, expert=1.0).of(6.0) == 0.0  # an expert that has learned nothing


def test_games_left_count_while_others_are_played():
    settings = replace(TINY, games=("a", "b"), visits=1, evaluations=1)
    run = Run([0, 160, 320], {"a": [0.0, 8.0, 4.0], "b": [0.0, 1.0, 6.0]}, [], 100.0, 2)
    scales = dict.fromkeys("ab", Scale(random=0.0, expert=10.0))
    found = summary(run, settings, scales)
    assert found.games == {"a": 0.4, "b": 0.6}
    assert (found.last, found.left) == (0.5, 0.4)


def test_the_experiment_runs(tmp_path, monkeypatch):
    pytest.importorskip("minatar")
    monkeypatch.setattr(experiment, "QUICK", TINY)
    findings = games.run(Options(tmp_path, quick=True, workers=1))
    assert set(findings.results["runs"]) == {kind.value for kind in Kind}
    assert findings.results["lambda"] == 10.0
    assert not findings.claims
    assert all(kind.value in findings.table for kind in Kind)


def test_atari_games_run(tmp_path):
    pytest.importorskip("ale_py")
    worlds = Worlds(ALE, "breakout", copies=2, seed=0)
    step = worlds.act(np.array([1, 3]))
    assert step.frames.shape == (2, 4, 84, 84)
    assert step.frames.max() > 0
    assert ALE.pixels(step.frames).shape == (2, 42 * 42)
    assert ALE.pixels(step.frames).max() < 8
    settings = replace(ATARI_QUICK, games=("breakout", "pong"), block=16, learn_after=8)
    run = play(Job(Kind.GIVEN, replace(settings, evaluation_steps=3), seed=0, strength=1.0))
    assert run.tasks == 2


def test_the_action_taken_is_what_counts():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert of_action(values, torch.tensor([1, 0])).tolist() == [2.0, 3.0]

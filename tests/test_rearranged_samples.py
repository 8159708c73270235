"""Models that put samples elsewhere than in dimension 0, drop, route or multiply them."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
import torch.nn.functional as F
from models import (
    CLASSES,
    FEATURES,
    POSITIONS,
    Net,
    features,
    head,
    linear,
    routes_to_an_expert,
    sequences,
)
from operations import Operation, images, parameter
from torch import Tensor, nn

from ewc_fast import fisher_diagonal
from ewc_fast.fisher.recorder.rules import own_backward

pytestmark = pytest.mark.usefixtures("one_thread")


def on(run, inputs=sequences, **parts) -> Operation:
    return Operation(run, lambda: {"body": linear()} | {k: v() for k, v in parts.items()}, inputs)


def windows(m: Net, x: Tensor) -> Tensor:
    """Four windows of 2 x 2 pixels: rows are samples, windows, pixels."""
    n = len(x)
    cut = x.unflatten(1, (2, 2)).unflatten(3, (2, 2)).permute(0, 1, 3, 2, 4, 5)
    rows = m.body(cut.reshape(n * 4, 4, FEATURES)).tanh()
    mixed = F.scaled_dot_product_attention(rows, rows, rows)
    return mixed.view(n, 4, 4, -1).mean((1, 2))


def grids(n: int) -> Tensor:
    return torch.randn(n, 4, 4, FEATURES)


def beams(m: Net, x: Tensor) -> Tensor:
    """Three hypotheses for each sample, hypothesis after hypothesis."""
    return m.body(x.repeat(3, 1)).tanh().view(3, len(x), -1).prod(0)


REARRANGED = {
    "time_first": on(lambda m, x: m.body(x.transpose(0, 1)).tanh().mean(0)),
    "time_first_in_rows": on(
        lambda m, x: m.body(x.transpose(0, 1).reshape(-1, FEATURES)).tanh()
        .view(POSITIONS, len(x), -1).mean(0)
    ),
    "samples_last": on(
        lambda m, x: torch.einsum("oi,itn->otn", m.body.weight, x.permute(2, 1, 0)).tanh()
        .mean(1).t()
    ),
    "samples_between_positions": on(
        lambda m, x: m.body(x.permute(1, 0, 2, 3).reshape(-1, FEATURES)).tanh()
        .view(4, len(x), 4, -1).mean((0, 2)), grids,
    ),
    "flattened": on(lambda m, x: m.body(x.flatten(0, 1)).tanh().view(len(x), POSITIONS, -1).sum(1)),
    "reversed": on(lambda m, x: m.body(x.flip(0)).tanh().flip(0), features),
    "rolled": on(lambda m, x: m.body(x.roll(1, 0)).tanh().roll(-1, 0), features),
    "reversed_in_rows": on(
        lambda m, x: m.body(x.flip(0).flatten(0, 1)).tanh().view(len(x), POSITIONS, -1).flip(0)
    ),
    "windows": on(windows, grids),
    "shifted_windows": on(lambda m, x: windows(m, x.roll((1, 1), (1, 2))), grids),
    "hypotheses_after_hypotheses": on(beams, features),
    "every_sample_twice_in_a_row": on(
        lambda m, x: m.body(x.repeat_interleave(2, 0)).tanh().view(len(x), 2, -1).prod(1), features
    ),
    "patches_of_images": Operation(
        lambda m, x: m.body(F.unfold(x, 2, stride=2).mT.flatten(0, 1)).view(len(x), -1).tanh(),
        lambda: {"body": nn.Linear(8, 3)}, images(2, 4),
    ),
    "time_as_channels": Operation(
        lambda m, x: m.body(x.transpose(0, 1).reshape(-1, 1, FEATURES))
        .view(POSITIONS, len(x), -1).tanh().sum(0),
        lambda: {"body": nn.Conv1d(1, 2, 3)}, sequences,
    ),
}  # fmt: skip

SIZES = [(3,), (1, 3, 2), (17, 1, 4), (40, 2), (2, 17, 40)]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "_".join(map(str, sizes)))
@pytest.mark.parametrize("name", REARRANGED)
def test_samples_are_found_wherever_they_are_in_batches_of_any_size(name, sizes):
    operation = REARRANGED[name]
    model, data = operation.model(), operation.data(*sizes)
    found = fisher_diagonal(model, data, estimator="empirical")
    oracle.assert_fisher(found, model, data, estimator="empirical")
    assert not found.report.slow


@pytest.mark.parametrize("first", ["tokens", "samples"])
def test_as_many_positions_as_samples_in_the_first_batch_do_not_confuse_them(first):
    model = REARRANGED["time_first" if first == "tokens" else "flattened"].model()
    data = [(torch.randn(n, POSITIONS, FEATURES), torch.arange(n) % CLASSES) for n in (4, 5, 3)]
    found = fisher_diagonal(model, data)
    oracle.assert_fisher(found, model, data)
    assert not found.report.slow


def routed(*positions: int) -> tuple[Tensor, Tensor]:
    """Return inputs in which sample i sends ``positions[i]`` of its two positions."""
    x = torch.randn(len(positions), 2, FEATURES)
    x[:, :, 0] = x[:, :, 0].abs()
    for sample, count in enumerate(positions):
        x[sample, count:, 0] *= -1
    return x, torch.randint(CLASSES, (len(positions),))


ROUTES = {
    "first_sample_sends_two": [(2, 0, 1, 1)],
    "middle_samples_send_none_and_two": [(1, 0, 2, 1)],
    "one_row_a_sample_in_the_first_batch_only": [(1, 1, 1, 1), (2, 0, 1, 1), (0, 2, 2)],
    "one_row_a_sample_in_the_second_batch_only": [(2, 0, 1, 1), (1, 1, 1, 1)],
    "two_rows_a_sample_first": [(2, 2, 2), (0, 1, 2), (1, 1, 1)],
    "nobody_in_the_first_batch": [(0, 0, 0), (1, 0, 2)],
    "nobody_among_the_first_samples": [(0, 0, 0, 2, 1)],
    "nobody_in_a_later_batch": [(1, 2, 1), (0, 0, 0), (2, 1, 0)],
    "a_batch_of_one_first": [(1,), (1, 2, 0, 1)],
    "batches_of_one": [(1,), (1,), (2,), (0,)],
    "many": [(1, 2, 0), tuple(n % 3 for n in range(40)), (1,) * 17],
}


@pytest.mark.parametrize("routes", ROUTES.values(), ids=ROUTES.keys())
def test_rows_sent_to_an_expert_stay_with_their_samples(routes):
    model = Net(routes_to_an_expert, expert=linear(), head=head())
    data = [routed(*route) for route in routes]
    found = fisher_diagonal(model, data)
    oracle.assert_fisher(found, model, data)
    if not any("nobody" in name for name, these in ROUTES.items() if these is routes):
        assert not found.report.slow


def mixture(m: Net, x: Tensor) -> Tensor:
    """Send each position to the expert its gate prefers, by masks."""
    rows = x.flatten(0, 1)
    share, chosen = m.gate(rows).softmax(-1).max(-1)
    out = torch.zeros(len(rows), 6).to(rows)
    for number, expert in enumerate(m.experts):
        out[chosen == number] = expert(rows[chosen == number]) * share[chosen == number, None]
    return out.view(len(x), -1, 6).mean(1)


def mixture_of_the_chosen(m: Net, x: Tensor) -> Tensor:
    """Run only those experts that somebody chose."""
    rows = x.flatten(0, 1)
    share, chosen = m.gate(rows).softmax(-1).max(-1)
    out = torch.zeros(len(rows), 6).to(rows)
    for number in chosen.unique().tolist():
        (at,) = (chosen == number).nonzero(as_tuple=True)
        out = out.index_add(0, at, m.experts[number](rows[at]) * share[at, None])
    return out.view(len(x), -1, 6).mean(1)


def with_capacity(m: Net, x: Tensor) -> Tensor:
    """Take the two positions of each sample that the gate likes best, for each expert."""
    likes = m.gate(x).softmax(-1)
    share, at = likes.topk(2, dim=1)  # (samples, 2, experts)
    out = torch.zeros(*x.shape[:2], 6).to(x)
    for number, expert in enumerate(m.experts):
        places = at[:, :, number, None]
        chosen = x.gather(1, places.expand(-1, -1, FEATURES))
        sent = expert(chosen) * share[:, :, number, None]
        out = out.scatter_add(1, places.expand(-1, -1, 6), sent)
    return out.mean(1)


def grouped(m: Net, x: Tensor) -> Tensor:
    """Sort positions by the expert they choose: one product for all experts."""
    rows = x.flatten(0, 1)
    rows = F.pad(rows, (0, 8 - FEATURES))  # the product wants multiples of 16 bytes
    share, chosen = m.gate(rows[:, :FEATURES]).softmax(-1).max(-1)
    order = chosen.argsort(stable=True)
    ends = torch.bincount(chosen, minlength=3).cumsum(0).to(torch.int32)
    product = F.grouped_mm(rows[order].float(), m.weights.float(), offs=ends)  # has no float64
    sent = product.to(x) * share[order, None]
    return torch.zeros_like(sent).index_copy(0, order, sent).view(len(x), POSITIONS, -1).mean(1)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this PyTorch has no grouped_mm")
@pytest.mark.parametrize("sizes", [(3, 2), (17, 40, 1, 5)], ids=["few", "many"])
def test_experts_in_one_grouped_product_are_recorded_by_its_rule(sizes, monkeypatch):
    parts = lambda: {"gate": linear(outputs=3), "weights": parameter(3, 8, 8)}  # noqa: E731
    operation = Operation(grouped, parts, alike_at_first(sequences))
    monkeypatch.delattr(own_backward, "one_by_one")
    model, data = operation.model(), operation.data(*sizes)
    found = fisher_diagonal(model, data, estimator="empirical")
    oracle.assert_fisher(found, model, data, estimator="empirical")
    assert not found.report.slow


def experts(run, inputs=sequences) -> Operation:
    parts = lambda: {  # noqa: E731
        "gate": linear(outputs=3), "experts": nn.ModuleList(linear() for _ in range(3))
    }  # fmt: skip
    return Operation(run, parts, inputs)


@pytest.mark.parametrize("sizes", [(3, 2), (17, 40, 1, 5)], ids=["few", "many"])
@pytest.mark.parametrize("run", [mixture, with_capacity], ids=lambda run: run.__name__)
def test_experts_are_recorded(run, sizes):
    operation = experts(run)
    model, data = operation.model(), operation.data(*sizes)
    found = fisher_diagonal(model, data, estimator="empirical")
    oracle.assert_fisher(found, model, data, estimator="empirical")
    assert not found.report.slow


def alike_at_first(inputs: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    """Return inputs of which the first three samples are small and equal."""

    def make(n: int) -> Tensor:
        x = inputs(n)
        x[:3] = 0.1
        return x

    return make


def dynamic_depth(m: Net, x: Tensor) -> Tensor:
    """Run as many steps as the largest of the inputs asks for; the others stand still."""
    steps = (x[:, 0].abs() * 2).long().clamp(max=3)
    h = m.body(x)
    for step in range(int(steps.max())):
        h = torch.where((step < steps)[:, None], m.step(h).tanh(), h)
    return h


DYNAMIC = {
    "experts_run_if_somebody_chose_them": experts(mixture_of_the_chosen, alike_at_first(sequences)),
    "depth_by_the_inputs": on(dynamic_depth, alike_at_first(features), step=lambda: linear(6)),
    "another_path_for_large_batches": on(
        lambda m, x: m.body(x).tanh() if len(x) > 4 else m.body(x[:, None]).tanh()[:, 0], features
    ),
    "a_node_for_each_sample": on(
        lambda m, x: torch.cat([m.body(row) for row in x.split(1)]), features
    ),
}


@pytest.mark.parametrize("sizes", [(5, 4, 3), (1, 3, 17, 2)], ids=["falling", "mixed"])
@pytest.mark.parametrize("name", DYNAMIC)
def test_graphs_that_change_from_batch_to_batch_are_right(name, sizes):
    operation = DYNAMIC[name]
    model, data = operation.model(), operation.data(*sizes)
    oracle.assert_fisher(
        fisher_diagonal(model, data, estimator="empirical"), model, data, estimator="empirical"
    )


@pytest.mark.parametrize("name", DYNAMIC)
def test_graphs_that_change_from_batch_to_batch_are_recorded(name):
    operation = DYNAMIC[name]
    model, data = operation.model(), operation.data(5, 17, 2)
    assert not fisher_diagonal(model, data, estimator="empirical").report.slow

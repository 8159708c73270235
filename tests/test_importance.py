"""The choice of importance: uniform, unknown, and states that don't fit."""

from __future__ import annotations

import copy

import pytest
import torch
from models import mlp
from training import batch, loss, same, shift

from ewc_fast import EWC, EWCOptimizer


def trained(importance, tasks=1, dtype=torch.float32):
    """Return a model, its EWC after some tasks, and its optimizer; all of one seed."""
    torch.manual_seed(0)
    model = mlp().to(dtype)
    ewc = EWC(model, ewc_lambda=2.0, importance=importance)
    optimizer = EWCOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), ewc)
    for _ in range(tasks):
        data = batch(model)
        optimizer.zero_grad()
        loss(model, data).backward()
        optimizer.step()
        ewc.consolidate([data])
    return model, ewc, optimizer


KINDS = ["fisher", "mas", "si", "l2"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("importance", KINDS)
def test_one_loop_serves_all(importance, dtype):
    model, ewc, _ = trained(importance, tasks=2, dtype=dtype)
    assert all(values.dtype == torch.float32 for values in ewc.fisher.values())
    assert ewc.importance == importance
    assert (f"importance={importance!r}" in repr(ewc)) == (importance != "fisher")
    shift(model)
    assert ewc.penalty().item() > 0


def test_uniform_importance_is_one_spring_a_task_of_equal_stiffness():
    torch.manual_seed(0)
    model = mlp().double()
    ewc = EWC(model, ewc_lambda=3.0, importance="l2")
    solutions = []
    for _ in range(3):
        shift(model)
        solutions.append([p.detach().clone() for p in model.parameters()])
        ewc.consolidate()
    for name, anchor, *each in zip(ewc.anchor, ewc.anchor.values(), *solutions, strict=True):
        assert torch.equal(ewc.fisher[name], torch.full_like(anchor, 3.0))
        torch.testing.assert_close(anchor, sum(each) / 3, rtol=1e-14, atol=1e-14)
    shift(model)
    by_definition = sum(
        3.0 / 2 * (p.detach() - theta).square().sum()
        for solution in solutions
        for p, theta in zip(model.parameters(), solution, strict=True)
    )
    assert ewc.penalty().item() == pytest.approx(by_definition.item(), rel=1e-12)


def test_uniform_importance_holds_the_latest_solution_of_the_online_form():
    model = mlp()
    ewc = EWC(model, ewc_lambda=3.0, importance="l2", anchor="latest")
    for _ in range(2):
        shift(model)
        ewc.consolidate()
    for name, p in model.named_parameters():
        assert torch.equal(ewc.anchor[name], p)
        assert torch.equal(ewc.fisher[name], torch.full_like(p, 2.0))


@pytest.mark.parametrize("importance", KINDS)
def test_a_state_round_trips_through_a_file(importance, tmp_path):
    _, ewc, optimizer = trained(importance)
    optimizer.step()  # SI is on its way then
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    _, other, other_optimizer = trained(importance, tasks=0)
    other_optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same(other.state_dict(), ewc.state_dict())
    ewc.to("cpu")
    assert same(other.state_dict(), ewc.state_dict())


@pytest.mark.parametrize(("saved", "own"), [("mas", "fisher"), ("fisher", "si"), ("si", "l2")])
def test_a_state_of_another_importance_is_refused_and_changes_nothing(saved, own):
    state = trained(saved)[1].state_dict()
    _, ewc, optimizer = trained(own)
    before = copy.deepcopy(optimizer.state_dict())
    message = f"importance is '{saved}'.*measures '{own}'.*build it as.*importance='{saved}'"
    with pytest.raises(ValueError, match=message):
        ewc.load_state_dict(state)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict({**before, "ewc": state})
    assert same(optimizer.state_dict(), before)


def test_a_state_that_names_none_is_of_fishers():
    _, ewc, _ = trained("fisher")
    state = ewc.state_dict()
    del state["importance"]
    ewc.load_state_dict(state)
    with pytest.raises(ValueError, match="its importance is 'fisher'"):
        trained("l2")[1].load_state_dict(state)


SPOILED = {
    "without_omega": (lambda s: s.pop("omega"), "state: truncated, it lacks 'omega'"),
    "without_one_start": (
        lambda s: s["start"].pop("2.bias"),
        "state: truncated, omega and start name different parameters",
    ),
    "another_model": (
        lambda s: (s["omega"].update(x=torch.ones(1)), s["start"].update(x=torch.ones(1))),
        "state: of another model, this one has no parameter 'x', whose path it holds",
    ),
    "another_shape": (
        lambda s: s["omega"].update({"2.bias": torch.ones(9)}),
        r"state\['omega'\]\['2.bias'\]: expected shape \(6,\).*got \(9,\)",
    ),
    "no_tensor": (
        lambda s: s["start"].update({"2.bias": 1.0}),
        r"state\['start'\]\['2.bias'\]: expected a torch.Tensor, got float",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED.keys())
def test_bad_paths_are_refused_and_change_nothing(spoil, message):
    _, ewc, optimizer = trained("si")
    optimizer.step()
    before = copy.deepcopy(ewc.state_dict())
    state = copy.deepcopy(before)
    spoil(state)
    with pytest.raises((TypeError, ValueError), match=message):
        ewc.load_state_dict(state)
    assert same(ewc.state_dict(), before)


def test_importances_are_known_by_name():
    with pytest.raises(ValueError, match="importance: expected one of 'fisher', 'mas', 'si', 'l2'"):
        EWC(mlp(), ewc_lambda=1.0, importance="rwalk")


@pytest.mark.parametrize("importance", ["fisher", "mas"])
def test_what_is_measured_on_data_needs_data(importance):
    with pytest.raises(TypeError, match=f"importance='{importance}' is measured on data"):
        EWC(mlp(), ewc_lambda=1.0, importance=importance).consolidate()


def test_options_of_another_importance_are_refused():
    model, ewc, _ = trained("l2")
    with pytest.raises(TypeError, match="estimator"):
        ewc.consolidate(estimator="exact")
    with pytest.raises(TypeError, match="xi"):
        trained("mas")[1].consolidate([batch(model)], xi=0.1)

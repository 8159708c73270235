"""Models that grow, shrink and change between tasks: what is new is free, nothing is lost."""

from __future__ import annotations

import copy

import pytest
import torch
from models import CLASSES, FEATURES, features, head, linear
from torch import nn
from training import all_of, batch, consolidated, penalty_by_definition, same, shift

from ewc_fast import EWC, EWCOptimizer


class Tasks(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = linear(), head()

    def forward(self, x):
        return self.head(self.body(x).tanh())

    def grow(self, rows):
        """Replace the head by one with more classes, as users do."""
        old, new = self.head, nn.Linear(6, CLASSES + rows)
        with torch.no_grad():
            new.weight[:CLASSES], new.bias[:CLASSES] = old.weight, old.bias
        self.head = new


def consolidated_tasks():
    return consolidated(Tasks)


TAKE_UP = {
    "track": lambda model, ewc: ewc.track(),
    "consolidate_from": lambda model, ewc: ewc.consolidate_from(
        {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    ),
    "EWCOptimizer": lambda model, ewc: EWCOptimizer(torch.optim.SGD(model.parameters()), ewc),
}
each_way_to_take_up = pytest.mark.parametrize("take_up", TAKE_UP.values(), ids=TAKE_UP.keys())


@each_way_to_take_up
def test_added_rows_start_free_and_old_ones_keep_what_they_have(take_up):
    model, ewc = consolidated_tasks()
    penalty = ewc.penalty()
    old = copy.deepcopy(ewc.state_dict())
    model.grow(2)
    take_up(model, ewc)
    for field in ("fisher", "anchor", "residual"):
        grown = ewc.state_dict()[field]
        assert torch.equal(grown["head.weight"][:CLASSES], old[field]["head.weight"])
        assert torch.equal(grown["body.weight"], old[field]["body.weight"])
    assert not ewc.fisher["head.weight"][CLASSES:].any()
    assert not ewc.fisher["head.bias"][CLASSES:].any()
    assert torch.equal(ewc.anchor["head.bias"][CLASSES:], model.head.bias[CLASSES:])
    assert torch.equal(ewc.penalty(), penalty)
    assert ewc.add_penalty_grad_().item() == pytest.approx(penalty.item(), rel=2**-20)
    assert model.head.weight.grad[:CLASSES].any()
    assert not model.head.weight.grad[CLASSES:].any()


def test_a_parameter_grown_in_place_is_noticed():
    model, ewc = consolidated_tasks()
    weight = model.head.weight
    model.zero_grad()
    weight.data = torch.cat([weight.data, torch.randn(2, 6)])
    with pytest.raises(ValueError, match=r"expected shape \(5, 6\).*got \(3, 6\)"):
        ewc.penalty()
    ewc.track()
    assert not ewc.fisher["head.weight"][CLASSES:].any()
    assert ewc.fisher["head.weight"][:CLASSES].any()


def test_a_new_head_starts_free_and_joins_at_its_first_task():
    model, ewc = consolidated_tasks()
    penalty = ewc.penalty()
    model.second = nn.Linear(6, 2)
    ewc.track()
    assert "second.weight" in ewc.parameters
    assert torch.equal(ewc.penalty(), penalty)
    before = copy.deepcopy(ewc.fisher)
    ewc.consolidate([batch(model)], forward=lambda m, x: m.second(m.body(x).tanh()))
    assert ewc.fisher["second.weight"].any()
    assert torch.equal(ewc.anchor["second.weight"], model.second.weight)
    assert torch.equal(ewc.fisher["head.weight"], before["head.weight"])


def test_the_optimizer_takes_up_a_new_head_as_a_group():
    model, ewc = consolidated_tasks()
    optimizer = EWCOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), ewc)
    model.second = nn.Linear(6, 2)
    optimizer.add_param_group({"params": model.second.parameters(), "lr": 0.5})
    assert "second.weight" in ewc.parameters
    ewc.consolidate([batch(model)], forward=lambda m, x: m.second(m.body(x).tanh()))
    shift(model)
    optimizer.zero_grad()
    optimizer.step()
    assert model.second.weight.grad.any()


def test_what_leaves_the_model_is_kept_until_it_returns():
    model, ewc = consolidated_tasks()
    value, _ = penalty_by_definition(model, ewc)
    fisher, removed = ewc.fisher["head.weight"].clone(), model.head
    model.head = nn.Identity()
    ewc.track()
    assert "head.weight" not in ewc.parameters
    assert torch.equal(ewc.state_dict()["fisher"]["head.weight"], fisher)
    part = ewc.penalty().item()
    assert part < value + ewc.constant_penalty
    ewc.consolidate_from({n: torch.zeros_like(p) for n, p in model.named_parameters()})
    model.head = removed
    ewc.track()
    assert torch.equal(ewc.fisher["head.weight"], fisher)
    assert ewc.penalty().item() > part


SHAPES = {
    "fewer_rows": (CLASSES - 1, 6),
    "more_columns": (CLASSES, 7),
    "more_rows_and_columns": (CLASSES + 1, 7),
    "another_dimension": (CLASSES, 6, 1),
}


@each_way_to_take_up
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_any_other_change_of_shape_is_refused_and_nothing_is_lost(shape, take_up):
    model, ewc = consolidated_tasks()
    model.head.weight = nn.Parameter(torch.randn(shape))
    before, everything = copy.deepcopy(ewc.state_dict()), all_of(model)
    with pytest.raises(ValueError, match=r"'head.weight': expected shape \(3, 6\).*more rows"):
        take_up(model, ewc)
    assert same(ewc.state_dict(), before)
    assert same(all_of(model), everything)


def test_where_one_shape_is_refused_none_is_taken_up():
    model, ewc = consolidated_tasks()
    before = copy.deepcopy(ewc.state_dict())
    model.body.weight = nn.Parameter(torch.randn(7, FEATURES))  # by itself it could be
    model.head.weight = nn.Parameter(torch.randn(CLASSES, 7))
    with pytest.raises(ValueError, match=r"'head.weight': expected shape"):
        ewc.track()
    assert same(ewc.state_dict(), before)


def test_a_grown_state_resumes_in_a_model_of_its_size():
    model, ewc = consolidated_tasks()
    model.grow(2)
    ewc.track()
    other = Tasks()
    other.grow(2)
    resumed = EWC(other, ewc_lambda=1.0)
    resumed.load_state_dict(ewc.state_dict())
    assert same(resumed.state_dict(), ewc.state_dict())


def test_unknown_names_are_kept_for_later_where_asked():
    model, ewc = consolidated_tasks()
    small = nn.Module()
    small.body = model.body
    other = EWC(small, ewc_lambda=1.0)
    other.load_state_dict(ewc.state_dict(), strict=False)
    assert same(other.state_dict(), ewc.state_dict())
    assert other.add_penalty_grad_().item() > 0
    small.head = model.head
    other.track()
    assert torch.equal(other.penalty(), ewc.penalty())


def test_a_model_with_more_parameters_takes_a_state_with_fewer():
    model, ewc = consolidated_tasks()
    state = copy.deepcopy(ewc.state_dict())
    model.second = nn.Linear(6, 2)
    other = EWC(model, ewc_lambda=1.0)
    other.load_state_dict(state)
    assert torch.equal(other.penalty(), ewc.penalty())
    other.consolidate([(features(4), torch.randint(CLASSES, (4,)))])
    assert not other.fisher["second.weight"].any()

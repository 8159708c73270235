"""Many tasks in one penalty: merged exactly, or online."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_within, gradient_budget, u, value_budget
from torch import nn
from training import penalty_by_definition, shift

from ewc_fast import EWC


def tasks(count, size=600):
    """Fishers from 1e-12 to 1e2, a tenth of them 0, at wandering parameters."""
    theta = torch.randn(size)
    for _ in range(count):
        fisher = 10 ** torch.empty(size).uniform_(-12, 2)
        fisher[torch.rand(size) < 0.1] = 0
        fisher[:5] = 0  # in every task
        theta = theta + 0.3 * torch.randn(size)
        yield fisher, theta


def merged(seen, **options):
    model = nn.Linear(600, 1, bias=False)
    ewc = EWC(model, **({"ewc_lambda": 7.0} | options))
    for fisher, theta in seen:
        with torch.no_grad():
            model.weight.copy_(theta[None])
        ewc.consolidate_from({"weight": fisher[None]})
    shift(model)
    return model, ewc


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("count", [1, 10, 100])
def test_merged_equals_one_penalty_per_task(count, gamma):
    seen = list(tasks(count))
    model, ewc = merged(seen, gamma=gamma)
    theta, strength = model.weight.detach()[0].double(), ewc.ewc_lambda
    weights = [gamma ** (count - 1 - t) for t in range(count)]
    pulls = [
        strength * w * f.double() * (theta - at.double())
        for w, (f, at) in zip(weights, seen, strict=True)
    ]
    exact_pull = sum(pulls)
    exact_value = sum(
        (0.5 * pull * (theta - at.double())).sum().item()
        for pull, (_, at) in zip(pulls, seen, strict=True)
    )

    # Every merge rounds F' once, which scales the tasks before it by 1 + u; and the anchor to
    # float32 (u |a'|, read in each step) and its residual to bfloat16 (u / 256 each merge).
    stiffness = strength * sum(w * f.double() for w, (f, _) in zip(weights, seen, strict=True))
    reach = torch.stack([at for _, at in seen]).abs().amax(0).double()
    offset = u(torch.float32) * (1 + count / 256) * reach
    once = u(torch.float32)
    pull_budget = (count + 5) * once * sum(p.abs() for p in pulls) + stiffness * offset
    value_error = (count + 262) * once * exact_value + (exact_pull.abs() * offset).sum().item()

    assert abs(ewc.penalty().item() - exact_value) <= value_error
    assert abs(ewc.add_penalty_grad_().item() - exact_value) <= value_error
    assert_within(model.weight.grad[0], exact_pull, pull_budget, "gradient")
    assert not model.weight.grad[0, :5].any()


@pytest.mark.parametrize("count", [1, 2, 50])
def test_merging_costs_the_same_for_any_number_of_tasks(count):
    _, ewc = merged(tasks(count))
    state = ewc.state_dict()
    sizes = {k: {n: t.numel() for n, t in state[k].items()} for k in ("fisher", "anchor")}
    assert sizes == {"fisher": {"weight": 600}, "anchor": {"weight": 600}}
    assert ewc.tasks == count


def test_merging_where_no_task_had_information_leaves_the_parameter_free():
    zeros = [(torch.zeros(600), theta) for _, theta in tasks(3)]
    model, ewc = merged(zeros)
    assert ewc.penalty().item() == 0.0
    ewc.add_penalty_grad_()
    assert not model.weight.grad.any()
    assert torch.equal(ewc.anchor["weight"][0], zeros[-1][1])


@pytest.mark.parametrize("gamma", [1.0, 0.7], ids=["huszar", "schwarz"])
def test_latest_is_online_ewc(gamma):
    seen = list(tasks(5))
    model, ewc = merged(seen, gamma=gamma, anchor="latest")
    fisher = sum(gamma ** (4 - t) * f.double() for t, (f, _) in enumerate(seen))
    assert_within(ewc.fisher["weight"][0], fisher, 5 * u(torch.float32) * fisher, "fisher")
    assert torch.equal(ewc.anchor["weight"][0], seen[-1][1])
    assert ewc.constant_penalty == 0.0
    value, pulls = penalty_by_definition(model, ewc)
    assert abs(ewc.add_penalty_grad_().item() - value) <= value_budget(value, torch.float32)
    budget = gradient_budget(torch.zeros(1, 600), pulls["weight"], torch.float32)
    assert_within(model.weight.grad, pulls["weight"], budget, "gradient")

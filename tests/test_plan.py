"""A plan skips what has not changed and notices everything that has."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from cases import copies, state_like

from ewc_fast import functional
from ewc_fast._native import core, reader
from ewc_fast._plan import ADD_PENALTY_GRAD, Plan

SPECS = [(o.name, o.role, o.written, o.stacked, False) for o in ADD_PENALTY_GRAD.operands]
READERS = [
    pytest.param(core.TensorReader(None), id="attributes"),
    pytest.param(
        reader,
        id="exchange",
        marks=pytest.mark.skipif(not reader.uses_exchange, reason="this PyTorch has no exchange"),
    ),
]


@pytest.fixture
def lists():
    params = [torch.nn.Parameter(torch.randn(4, 4)), torch.nn.Parameter(torch.randn(7))]
    grads = [torch.randn_like(p) for p in params]
    return [grads, params, state_like(params, True), state_like(params)]


def fresh_result(lists):
    grads = copies(lists[0])
    value = functional.add_penalty_grad_(grads, *lists[1:], ewc_lambda=2.0)
    return value, grads


def check_planned_call(plan, lists):
    value, grads = fresh_result(lists)
    planned = functional.add_penalty_grad_(*lists, ewc_lambda=2.0, plan=plan)
    assert torch.equal(planned, value)
    assert all(torch.equal(a, b) for a, b in zip(lists[0], grads, strict=True))


def test_a_planned_call_computes_what_an_unplanned_one_does(lists):
    plan = Plan()
    for _ in range(3):
        check_planned_call(plan, lists)


@pytest.mark.parametrize("operand", range(4))
def test_a_new_address_is_taken_over(lists, operand):
    plan = Plan()
    check_planned_call(plan, lists)
    with torch.no_grad():
        if operand == 1:
            lists[1][0].data = torch.randn(4, 4)
        else:
            lists[operand][0] = torch.randn(4, 4).abs()
    check_planned_call(plan, lists)


def test_addresses_taken_over_are_checked_for_shared_memory(lists):
    plan = Plan()
    check_planned_call(plan, lists)
    lists[3][0] = lists[0][0]
    with pytest.raises(ValueError, match=r"grads\[0\].*shares memory with anchor\[0\]"):
        functional.add_penalty_grad_(*lists, ewc_lambda=2.0, plan=plan)
    lists[3][0] = torch.zeros(4, 4)
    check_planned_call(plan, lists)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda t: t.view(16), id="shape"),
        pytest.param(lambda t: t[:2], id="fewer_rows"),
        pytest.param(lambda t: t.t(), id="strides"),
        pytest.param(lambda t: t.double(), id="dtype"),
        pytest.param(lambda t: t.bfloat16(), id="half_dtype"),
        pytest.param(lambda t: t.resize_(1, 2), id="resized_in_place"),
        pytest.param(lambda t: t.to("meta"), id="device"),
    ],
)
def test_a_change_of_form_is_noticed(lists, reader, change):
    lists[1] = [p.detach().clone() for p in lists[1]]
    plan = core.Plan(reader, SPECS)
    plan.adopt(*lists)
    assert plan.refresh(*lists)
    lists[1][0] = change(lists[1][0])
    assert not plan.refresh(*lists)


@pytest.mark.parametrize("reader", READERS)
def test_a_parameter_whose_data_was_replaced_is_noticed(lists, reader):
    plan = core.Plan(reader, SPECS)
    plan.adopt(*lists)
    lists[1][0].data = lists[1][0].data.t()  # same object, same address, other strides
    assert not plan.refresh(*lists)


@pytest.mark.parametrize("reader", READERS)
def test_other_lengths_and_missing_tensors_are_noticed(lists, reader):
    plan = core.Plan(reader, SPECS)
    plan.adopt(*lists)
    assert not plan.refresh(lists[0][:1], *lists[1:])
    plan.adopt(*lists)
    assert not plan.refresh([None, lists[0][1]], *lists[1:])
    plan.adopt(*lists)
    assert not plan.refresh(["no tensor", lists[0][1]], *lists[1:])


@pytest.mark.skipif(not reader.uses_exchange, reason="this PyTorch has no exchange")
def test_both_ways_of_reading_a_tensor_agree(lists):
    tensors = [*lists[1], torch.randn(()), torch.randn(0, 3), torch.randn(9)[2:5]]
    tensors += [torch.randn(3, 4).t(), torch.randn(3).half(), torch.randn(2, 2).double()]
    rows = [tensors, *(state_like([t.detach() for t in tensors]) for _ in range(2))]
    specs = [SPECS[1], SPECS[2], SPECS[3]]
    values = []
    for one in (reader, core.TensorReader(None)):
        plan = core.Plan(one, specs)
        plan.adopt(*rows)
        values.append(core.penalty(plan, 1.0, 1))
    assert values[0] == values[1]


def test_a_failed_call_forgets_the_plan_and_a_good_one_restores_it(lists):
    plan = Plan()
    check_planned_call(plan, lists)
    good = lists[1][0]
    lists[1][0] = torch.randn(4, 5)
    with pytest.raises(ValueError, match="shape"):
        functional.add_penalty_grad_(*lists, ewc_lambda=2.0, plan=plan)
    lists[1][0] = good
    check_planned_call(plan, lists)


def test_one_plan_may_serve_several_operations(lists):
    plan = Plan()
    check_planned_call(plan, lists)
    params = copies([p.detach() for p in lists[1]])
    functional.proximal_step_(params, *lists[2:], ewc_lambda=1.0, lr=1.0, plan=plan)
    check_planned_call(plan, lists)


def test_a_plan_keeps_no_tensor_alive():
    plan, params = Plan(), [torch.randn(5)]
    fisher, anchor, grads = [torch.ones(5)], [torch.zeros(5)], [torch.zeros(5)]
    functional.add_penalty_grad_(grads, params, fisher, anchor, ewc_lambda=1.0, plan=plan)
    watched = weakref.ref(grads[0])
    del grads
    gc.collect()
    assert watched() is None

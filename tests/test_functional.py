"""Every operation against exact arithmetic, over all layouts and dtypes."""

from __future__ import annotations

import pytest
import torch
from cases import copies, every_dtype, every_layout, on_every_device, state_like
from numerics import assert_within, compute_dtype, gradient_budget, smallest, u, value_budget

from ewc_fast import functional, reference
from ewc_fast._native import core, reader

LAMBDA = 2.7


def exact_pull(params, fisher, anchor):
    return [
        LAMBDA * f.double() * (p.double() - a.double())
        for p, f, a in zip(params, fisher, anchor, strict=True)
    ]


def exact_penalty(params, fisher, anchor):
    terms = [
        (f.double() * (p.double() - a.double()).square()).sum().item()
        for p, f, a in zip(params, fisher, anchor, strict=True)
    ]
    return LAMBDA / 2 * sum(terms)


@on_every_device
@every_dtype
@every_layout
def test_add_penalty_grad_adds_the_gradient_and_returns_the_value(make, dtype):
    params = make(dtype)
    grads, fisher, anchor = copies(make(dtype)), state_like(params, True), state_like(params)
    grads = [g.mul_(0.1) for g in grads]
    before = copies(grads)
    value = functional.add_penalty_grad_(grads, params, fisher, anchor, ewc_lambda=LAMBDA)
    for grad, old, pull in zip(grads, before, exact_pull(params, fisher, anchor), strict=True):
        assert_within(grad, old.double() + pull, gradient_budget(old.double(), pull, dtype), "grad")
    exact = exact_penalty(params, fisher, anchor)
    assert value.shape == ()
    assert value.dtype == torch.float64
    assert abs(value.item() - exact) <= value_budget(exact, dtype)


@on_every_device
@every_dtype
@every_layout
def test_penalty_equals_its_formula_in_value_and_gradient(make, dtype):
    params = [p.requires_grad_() for p in make(dtype)]
    fisher, anchor = state_like(params, True), state_like(params)
    value = functional.penalty(params, fisher, anchor, ewc_lambda=LAMBDA)
    exact = exact_penalty(params, fisher, anchor)
    assert abs(value.item() - exact) <= value_budget(exact, dtype)
    grads = torch.autograd.grad(3 * value, params) if params else []
    for grad, pull in zip(grads, exact_pull(params, fisher, anchor), strict=True):
        # the factor from above is one more product, rounded to the parameters' dtype
        budget = (
            3 * gradient_budget(torch.zeros_like(pull), pull, dtype) + 6 * u(dtype) * pull.abs()
        )
        assert_within(grad, 3 * pull, budget, "grad")


@on_every_device
@every_dtype
@every_layout
@pytest.mark.parametrize("samples", [None, 0, 1, 5], ids=lambda s: f"samples_{s}")
def test_accumulate_square_adds_weighted_squares_of_every_sample(make, dtype, samples):
    params = make(dtype)
    fisher = state_like(params, True)
    before = copies(fisher)
    if samples is None:
        grads, exact = make(dtype), []
        exact = [g.double().square() for g in grads]
    else:
        grads = [torch.randn(samples, *p.shape).to(dtype) for p in params]
        exact = [g.double().square().sum(0) for g in grads]
    functional.accumulate_square_(fisher, grads, weight=0.3)
    for f, old, squares in zip(fisher, before, exact, strict=True):
        total = old.double() + 0.3 * squares
        # one square, `samples` additions, weight, product, sum
        budget = 2 * (5 + (samples or 1)) * u(f.dtype) * total + smallest(f.dtype)
        assert_within(f, total, budget, "fisher")


@on_every_device
@every_dtype
@every_layout
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_merge_adds_two_quadratics_into_one(make, dtype, gamma):
    params = make(dtype)
    fisher, anchor, new = state_like(params, True), state_like(params), state_like(params, True)
    for f, n in zip(fisher, new, strict=True):
        f.flatten()[::3].zero_() if f.is_contiguous() else None
        n.flatten()[::2].zero_() if n.is_contiguous() else None
    residual = [torch.zeros_like(p, dtype=torch.bfloat16) for p in params]
    old_fisher, old_anchor = copies(fisher), copies(anchor)
    constant = functional.merge_(fisher, anchor, residual, new, params, gamma=gamma)

    exact_constant = 0.0
    for row in zip(fisher, anchor, residual, new, params, old_fisher, old_anchor, strict=True):
        f, a, r, n, p, f_old, a_old = (t.double() for t in row)
        kept = gamma * f_old
        total = kept + n
        share = torch.where(kept > 0, n / total, 1.0)
        exact_anchor = torch.where(kept > 0, a_old + share * (p - a_old), p)
        exact_constant += (0.5 * share * kept * (p - a_old).square()).sum().item()
        state, double = u(row[0].dtype), u(torch.float64)
        assert_within(f, total, (state + 2 * double) * total, "fisher: rounded once")
        # share, difference, product and sum in float64, here and in the oracle
        inner = 8 * double * (a_old.abs() + p.abs())
        assert_within(a, exact_anchor, state * exact_anchor.abs() + inner, "anchor: rounded once")
        # bfloat16 keeps 8 bits of what the anchor's dtype drops
        residual_budget = state * u(torch.bfloat16) * exact_anchor.abs() + inner + 1e-42
        assert_within(a + r, exact_anchor, residual_budget, "anchor + residual")
    assert constant.item() == pytest.approx(exact_constant, rel=1e-12, abs=0)


@on_every_device
@every_dtype
@every_layout
def test_merge_online_decays_adds_and_moves_the_anchor(make, dtype):
    params = make(dtype)
    fisher, anchor, new = state_like(params, True), state_like(params), state_like(params, True)
    exact = [0.8 * f.double() + n.double() for f, n in zip(fisher, new, strict=True)]
    functional.merge_online_(fisher, anchor, new, params, gamma=0.8)
    for f, a, total, p in zip(fisher, anchor, exact, params, strict=True):
        budget = (u(f.dtype) + 2 * u(torch.float64)) * total
        assert_within(f, total, budget, "fisher: float64 arithmetic, rounded once")
        assert torch.equal(a, p.to(a.dtype))


@on_every_device
@every_dtype
@every_layout
@pytest.mark.parametrize("strength", [0.0, 1e-3, 1.0, 1e6, 1e30])
def test_proximal_step_lands_between_parameter_and_anchor(make, dtype, strength):
    params = copies(make(dtype))
    before = copies(params)
    fisher, anchor = state_like(params, True), state_like(params)
    functional.proximal_step_(params, fisher, anchor, ewc_lambda=strength, lr=1.0)
    for p, old, f, a in zip(params, before, fisher, anchor, strict=True):
        s = strength * f.double()
        theta, rest = old.double(), a.double()
        exact = (theta + s * rest) / (1 + s)
        # five roundings of the pull, then the difference and the store
        moved = (theta - rest).abs()
        compute = u(compute_dtype(dtype))
        budget = 2 * (6 * compute * moved + (compute + u(dtype)) * (exact.abs() + moved * compute))
        assert_within(p, exact, budget + smallest(dtype), "params")
        if strength == 0:
            assert torch.equal(p, old)


@every_dtype
@pytest.mark.parametrize("level", range(len(core.vector_levels)), ids=core.vector_levels)
def test_every_vector_level_computes_the_same(dtype, level):
    params = [torch.randn(n).to(dtype) for n in (1, 15, 16, 17, 4097, 20000)]
    fisher, anchor = state_like(params, True), state_like(params)
    grads = [torch.randn_like(p) for p in params]
    by_level, by_reference = copies(grads), copies(grads)
    specs = [
        ("grads", "param", True, False, False),
        ("params", "param", False, False, False),
        ("fisher", "state", False, False, False),
        ("anchor", "state", False, False, False),
    ]
    plan = core.Plan(reader, specs)
    plan.adopt(by_level, params, fisher, anchor)
    value = core.add_penalty_grad(plan, LAMBDA, 1, level)
    exact = reference.add_penalty_grad_(by_reference, params, fisher, anchor, ewc_lambda=LAMBDA)
    assert abs(value - exact.item()) <= value_budget(exact.item(), dtype)
    for found, old, pull in zip(by_level, grads, exact_pull(params, fisher, anchor), strict=True):
        budget = gradient_budget(old.double(), pull, dtype)
        assert_within(found, old.double() + pull, budget, core.vector_levels[level])


@every_dtype
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_results_are_the_same_bits_for_any_number_of_threads(dtype, threads):
    params = [torch.randn(n).to(dtype) for n in (70_001, 3, 120_000)]
    fisher, anchor = state_like(params, True), state_like(params)
    new, base = state_like(params, True), [torch.randn_like(p) for p in params]

    def results():
        grads, state = copies(base), [copies(fisher), copies(anchor)]
        residual = [torch.zeros_like(p, dtype=torch.bfloat16) for p in params]
        value = functional.add_penalty_grad_(grads, params, fisher, anchor, ewc_lambda=LAMBDA)
        constant = functional.merge_(*state, residual, new, params)
        return [value, constant, *grads, *state[0], *state[1], *residual]

    torch.set_num_threads(threads)
    several = results()
    torch.set_num_threads(1)
    for one, other in zip(results(), several, strict=True):
        assert torch.equal(one, other)


@on_every_device
def test_a_flat_buffer_and_a_list_give_the_same_gradient():
    params = [torch.randn(n) for n in (5, 1000, 77)]
    fisher, anchor = state_like(params, True), state_like(params)
    grads = [torch.zeros_like(p) for p in params]
    flat = [torch.cat(tensors) for tensors in (params, fisher, anchor)]
    flat_grad = torch.zeros_like(flat[0])
    functional.add_penalty_grad_(grads, params, fisher, anchor, ewc_lambda=LAMBDA)
    functional.add_penalty_grad_(flat_grad, *flat, ewc_lambda=LAMBDA)
    assert torch.equal(flat_grad, torch.cat(grads))


@on_every_device
def test_the_penalty_is_zero_at_the_anchor_and_linear_in_lambda():
    params = [torch.randn(1000)]
    fisher, anchor = state_like(params, True), state_like(params)
    assert functional.penalty(params, fisher, params, ewc_lambda=5.0).item() == 0
    one = functional.penalty(params, fisher, anchor, ewc_lambda=1.0).item()
    eight = functional.penalty(params, fisher, anchor, ewc_lambda=8.0).item()
    assert eight == 8 * one  # a power of two rounds nothing


@on_every_device
def test_mixed_dtypes_in_one_list_are_each_computed_in_their_own():
    params = [torch.randn(50).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    fisher, anchor = state_like(params, True), state_like(params)
    grads = [torch.zeros_like(p) for p in params]
    functional.add_penalty_grad_(grads, params, fisher, anchor, ewc_lambda=LAMBDA)
    for grad, pull in zip(grads, exact_pull(params, fisher, anchor), strict=True):
        assert_within(grad, pull, gradient_budget(pull * 0, pull, grad.dtype), str(grad.dtype))


@on_every_device
def test_parameters_that_require_grad_can_be_stepped_and_autograd_notices():
    param = torch.randn(5, requires_grad=True)
    loss = (param * param).sum()
    functional.proximal_step_(param, torch.ones(5), torch.zeros(5), ewc_lambda=1.0, lr=1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

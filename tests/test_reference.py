"""The specification itself: against closed forms and autograd."""

from __future__ import annotations

import pytest
import torch
from cases import state_like

from ewc_fast import reference


def operands():
    params = [torch.randn(5, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)]
    return params, state_like(params, True), state_like(params)


def test_the_gradient_is_the_derivative_of_the_penalty():
    params, fisher, anchor = operands()
    params = [p.requires_grad_() for p in params]
    value = reference.penalty(params, fisher, anchor, ewc_lambda=1.7)
    derivative = torch.autograd.grad(value, params)
    pulls = reference.penalty_grad(params, fisher, anchor, ewc_lambda=1.7)
    for d, pull in zip(derivative, pulls, strict=True):
        torch.testing.assert_close(d, pull.detach(), rtol=1e-14, atol=0)


def test_the_penalty_by_hand():
    value = reference.penalty(
        [torch.tensor([3.0])], [torch.tensor([2.0])], [torch.tensor([1.0])], ewc_lambda=10.0
    )
    assert value.item() == 10.0 / 2 * 2.0 * (3.0 - 1.0) ** 2


def test_the_proximal_step_minimises_its_objective():
    (theta, *_), (f, *_), (a, *_) = operands()
    stepped = theta.clone()
    reference.proximal_step_([stepped], [f], [a], ewc_lambda=3.0, lr=0.5)
    # stationary: lambda F (x - a) + (x - theta) / lr = 0
    residual = 3.0 * f * (stepped - a) + (stepped - theta) / 0.5
    assert residual.abs().max() < 1e-13


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_a_merge_shifts_the_sum_of_two_quadratics_by_its_constant(gamma):
    (theta, *_), (f, *_), (a, *_) = operands()
    new, probe = torch.rand_like(f), torch.randn_like(theta)
    separate = 0.5 * (gamma * f * (probe - a) ** 2 + new * (probe - theta) ** 2).sum()
    residual = torch.zeros_like(f, dtype=torch.bfloat16)
    constant = reference.merge_([f], [a], [residual], [new], [theta], gamma=gamma)
    torch.testing.assert_close(0.5 * (f * (probe - a) ** 2).sum() + constant, separate)


def test_squares_are_taken_of_each_sample_not_of_the_sum():
    fisher = torch.zeros(1)
    reference.accumulate_square_([fisher], [torch.tensor([[1.0], [-1.0]])], weight=1.0)
    assert fisher.item() == 2.0

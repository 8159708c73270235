"""Properties that hold for any sizes, strides, dtypes and alignments."""

from __future__ import annotations

import torch
from cases import DTYPES, copies
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_within, gradient_budget, u, value_budget

from ewc_fast import functional, reference

settings.register_profile("ewc_fast", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("ewc_fast")


@st.composite
def laid_out(draw, dtype):
    """A shape with a way to lay tensors of it out: permuted, misaligned, perhaps with gaps."""
    shape = draw(st.lists(st.integers(0, 9), max_size=4))
    order = draw(st.permutations(range(len(shape))))
    gap = draw(st.sampled_from([1, 1, 1, 2]))
    offset = draw(st.integers(0, 5))
    strides, step = [0] * len(shape), gap
    for dim in order:
        strides[dim], step = step, step * max(shape[dim], 1)

    def make(dtype=dtype):
        room = torch.randn(offset + step + 1).to(dtype)
        return torch.as_strided(room, shape, strides, offset)

    return make


FISHER_DTYPES = (torch.float32, torch.bfloat16)  # beside parameters other than float64


@st.composite
def operands(draw):
    """Gradients, parameters, Fisher and anchor; layouts mostly shared within a row."""
    rows = []
    for _ in range(draw(st.integers(0, 4))):
        dtype = draw(st.sampled_from(DTYPES))
        state = torch.float64 if dtype == torch.float64 else torch.float32
        fisher = state if state == torch.float64 else draw(st.sampled_from(FISHER_DTYPES))
        make = draw(laid_out(dtype))
        row = [make(), make(), make(fisher).abs(), make(state)]
        if draw(st.booleans()):  # one operand laid out on its own
            which = draw(st.integers(0, 3))
            row[which] = row[which].contiguous()
        rows.append(row)
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    for row in rows:
        for index, tensor in enumerate(row):
            drawn = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(drawn.abs() if index == 2 else drawn)
    return [list(column) for column in zip(*rows, strict=True)] or [[], [], [], []]


# strengths whose pulls neither overflow float16 nor vanish in float32
STRENGTHS = st.one_of(st.just(0.0), st.floats(1e-6, 1e3))


@given(operands(), STRENGTHS)
def test_any_layout_gives_the_exact_gradient_within_rounding(lists, ewc_lambda):
    grads, params, fisher, anchor = lists
    before = copies(grads)
    value = functional.add_penalty_grad_(grads, params, fisher, anchor, ewc_lambda=ewc_lambda)
    exact = reference.penalty(params, fisher, anchor, ewc_lambda=ewc_lambda).item()
    widest = torch.float64 if all(p.dtype == torch.float64 for p in params) else torch.float32
    assert abs(value.item() - exact) <= value_budget(exact, widest)
    for g, old, p, f, a in zip(grads, before, params, fisher, anchor, strict=True):
        pull = ewc_lambda * f.double() * (p.double() - a.double())
        assert_within(g, old.double() + pull, gradient_budget(old.double(), pull, p.dtype), "grad")


@given(operands(), st.floats(1e-3, 1.0))
def test_merging_preserves_the_sum_of_the_two_penalties(lists, gamma):
    params, _, fisher, anchor = [[t.double() for t in tensors] for tensors in lists]
    new = [torch.rand_like(f) for f in fisher]
    probe = [p + torch.randn_like(p) for p in params]

    def quadratic(stiffness, rest):
        pairs = zip(probe, stiffness, rest, strict=True)
        return sum((0.5 * f * (t - a).square()).sum().item() for t, f, a in pairs)

    separate = gamma * quadratic(fisher, anchor) + quadratic(new, params)
    residual = [torch.zeros_like(p, dtype=torch.bfloat16) for p in params]
    constant = functional.merge_(fisher, anchor, residual, new, params, gamma=gamma).item()
    merged = quadratic(fisher, anchor) + constant
    # squares of distances up to 10 or so, a dozen roundings each
    assert abs(merged - separate) <= 1000 * u(torch.float64) * (separate + 1)


@given(operands(), st.floats(0, 1e20))
def test_the_proximal_step_never_leaves_the_segment_to_the_anchor(lists, strength):
    params, fisher, anchor = lists[1:]
    before = copies(params)
    functional.proximal_step_(params, fisher, anchor, ewc_lambda=strength, lr=1.0)
    for p, old, a in zip(params, before, anchor, strict=True):
        slack = 4 * u(p.dtype) * (old.double().abs() + a.double().abs())
        low = torch.minimum(old.double(), a.double()) - slack
        high = torch.maximum(old.double(), a.double()) + slack
        assert ((p.double() >= low) & (p.double() <= high)).all()

"""bfloat16 and float16 are read exactly and rounded to nearest even, as PyTorch does it."""

from __future__ import annotations

import pytest
import torch

from ewc_fast._native import core, reader

HALVES = [torch.bfloat16, torch.float16]
SPECS = [
    ("grads", "param", True, False, False),
    ("params", "param", False, False, False),
    ("fisher", "state", False, False, False),
    ("anchor", "state", False, False, False),
]
every_level = pytest.mark.parametrize(
    "level", range(len(core.vector_levels)), ids=core.vector_levels
)


def add_pull(grads, params, fisher, anchor, level):
    plan = core.Plan(reader, SPECS)
    plan.adopt([grads], [params], [fisher], [anchor])
    core.add_penalty_grad(plan, 1.0, 1, level)


@every_level
@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_number_survives_a_zero_pull(dtype, level):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    grads, zeros = every.clone(), torch.zeros(2**16)
    add_pull(grads, torch.zeros(2**16, dtype=dtype), zeros, zeros, level)
    numbers = ~every.isnan()
    zero = every == 0  # -0 + 0 is +0
    same = numbers & ~zero
    assert torch.equal(grads[same].view(torch.int16), every[same].view(torch.int16))
    assert grads[zero].eq(0).all()
    assert grads[~numbers].isnan().all()


@every_level
@pytest.mark.parametrize("dtype", HALVES)
def test_results_round_to_nearest_even_like_pytorch(dtype, level):
    # around every half number and halfway between neighbours, plus overflow and denormals
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    halves = halves[halves.isfinite()]
    step = (halves.nextafter(torch.tensor(torch.inf)) - halves).clamp_min(1e-45)
    middle = (halves[:-1].sort().values + halves[1:].sort().values) / 2
    values = torch.cat([halves, halves + step, halves - step, middle])
    values = torch.cat([values, torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30, 6e-8])])
    grads = torch.zeros(values.numel(), dtype=dtype)
    ones = torch.ones(values.numel(), dtype=dtype)
    add_pull(grads, ones, values, torch.zeros_like(values), level)
    expected = values.to(dtype)
    numbers = ~expected.isnan() & (expected != 0)
    assert torch.equal(grads[numbers].view(torch.int16), expected[numbers].view(torch.int16))
    assert torch.equal(grads.isnan(), expected.isnan())

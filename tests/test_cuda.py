"""The CUDA kernels on a GPU, where there is one."""

from __future__ import annotations

import pytest
import torch
from cases import every_dtype, state_like
from models import each_model
from numerics import assert_within, gradient_budget, value_budget

from ewc_fast import fisher_diagonal, functional, reference
from ewc_fast._native import cuda_unavailable

pytestmark = pytest.mark.skipif(cuda_unavailable() is not None, reason=str(cuda_unavailable()))

SIZES = [1, 3, 4, 1023, 16384, 16385, 100_003, *([17] * 100), 16384 * 330 + 3]


@every_dtype
def test_the_kernel_adds_the_gradient_and_returns_the_value(dtype):
    params = [torch.randn(n).to(dtype) for n in SIZES]
    fisher, anchor = state_like(params, True), state_like(params)
    grads = [torch.randn_like(p) for p in params]
    on_gpu = [[t.cuda() for t in tensors] for tensors in (grads, params, fisher, anchor)]
    value = functional.add_penalty_grad_(*on_gpu, ewc_lambda=1.7, impl="cuda")
    exact = reference.penalty(params, fisher, anchor, ewc_lambda=1.7).item()
    assert abs(value.item() - exact) <= value_budget(exact, dtype)
    for found, old, p, f, a in zip(on_gpu[0], grads, params, fisher, anchor, strict=True):
        pull = 1.7 * f.double() * (p.double() - a.double())
        budget = gradient_budget(old.double(), pull, dtype)
        assert_within(found.cpu(), old.double() + pull, budget, "grad")


def test_the_value_repeats_bit_for_bit():
    row = [torch.randn(3_000_001, device="cuda") for _ in range(4)]
    row[2].abs_()
    values = {
        functional.add_penalty_grad_(*row, ewc_lambda=0.0, impl="cuda").item() for _ in range(5)
    } | {
        functional.add_penalty_grad_(
            torch.zeros_like(row[0]), *row[1:], ewc_lambda=1.0, impl="cuda"
        ).item()
        for _ in range(20)
    }
    assert len(values) == 2  # zero, and one other


@each_model()
def test_the_fisher_on_the_gpu_is_that_on_the_cpu(case):
    model, data = case.make(), case.data(4, 3)
    on_cpu = fisher_diagonal(model, data, estimator="empirical")
    on_gpu = fisher_diagonal(model.cuda(), data, estimator="empirical")
    assert not on_gpu.report.slow
    half = any(param.dtype == torch.bfloat16 for param in model.parameters())
    for name, expected in on_cpu.items():
        assert on_gpu[name].device.type == "cuda"
        if expected.numel() == 0:
            continue
        error = (on_gpu[name].cpu() - expected).abs().max()
        assert error <= (16 * 2**-8 if half else 1e-4) * expected.max(), name

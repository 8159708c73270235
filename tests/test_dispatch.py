"""The choice of implementation follows its table; a backend asked for by name runs or raises."""

from __future__ import annotations

import pytest
import torch

from ewc_fast import _plan, _triton, functional
from ewc_fast._checks import Operation
from ewc_fast._dispatch import CUDA_OPERATIONS, choose
from ewc_fast._native import core, cuda_unavailable

LIST, PRODUCT = "add_penalty_grad_", "accumulate_squared_product_"


@pytest.mark.parametrize(
    ("requested", "operation", "device", "dense", "there", "chosen"),
    [
        ("auto", LIST, "cpu", True, "cuda triton", "cpu"),
        ("auto", LIST, "cpu", False, "cuda triton", "reference"),
        ("auto", LIST, "cuda", True, "cuda triton", "cuda"),
        ("auto", LIST, "cuda", True, "cuda", "cuda"),
        ("auto", LIST, "cuda", True, "triton", "triton"),
        ("auto", LIST, "cuda", True, "", "reference"),
        ("auto", LIST, "cuda", False, "cuda triton", "reference"),
        ("auto", LIST, "xpu", True, "triton", "reference"),
        ("auto", LIST, "mps", True, "", "reference"),
        ("auto", PRODUCT, "cpu", True, "cuda triton", "cpu"),
        ("auto", PRODUCT, "cuda", True, "cuda triton", "triton"),
        ("auto", PRODUCT, "cuda", True, "cuda", "reference"),
        ("auto", PRODUCT, "cuda", False, "cuda triton", "reference"),
        ("cpu", LIST, "cpu", True, "", "cpu"),
        ("cuda", LIST, "cuda", True, "cuda triton", "cuda"),
        ("triton", LIST, "cuda", True, "cuda triton", "triton"),
        ("triton", LIST, "cuda", True, "triton", "triton"),
        ("triton", LIST, "xpu", True, "triton", "triton"),
        ("triton", LIST, "cpu", True, "triton", "triton"),
        ("triton", PRODUCT, "cuda", True, "triton", "triton"),
        ("reference", LIST, "cpu", True, "cuda triton", "reference"),
        ("reference", PRODUCT, "cuda", False, "cuda triton", "reference"),
    ],
)
def test_the_table(requested, operation, device, dense, there, chosen):
    reasons = [None if name in there else "it is not there" for name in ("cuda", "triton")]
    assert choose(requested, operation, device, dense, *reasons) == chosen


@pytest.mark.parametrize(
    ("requested", "operation", "device", "dense", "error", "message"),
    [
        ("cpu", LIST, "cuda", True, ValueError, "'cpu' works on cpu tensors, got tensors on cuda"),
        ("cpu", LIST, "cpu", False, ValueError, "'cpu' needs operands with equal strides"),
        ("cuda", LIST, "cpu", True, ValueError, "'cuda' works on cuda tensors, got tensors on cpu"),
        ("cuda", LIST, "cuda", False, ValueError, "'cuda' needs operands with equal strides"),
        ("cuda", LIST, "cuda", True, RuntimeError, "'cuda' can't run: no driver"),
        ("triton", LIST, "cpu", True, ValueError, "'triton' works on GPU tensors, .* on cpu"),
        ("triton", LIST, "mps", True, ValueError, "'triton' works on GPU tensors, .* on mps"),
        ("triton", LIST, "cuda", False, ValueError, "'triton' needs operands with equal strides"),
        ("triton", LIST, "cuda", True, RuntimeError, "'triton' can't run: not installed"),
        ("triton", LIST, "xpu", True, RuntimeError, "'triton' can't run: not installed"),
    ],
)
def test_a_named_backend_that_cannot_run_says_why(
    requested, operation, device, dense, error, message
):
    with pytest.raises(error, match=message):
        choose(requested, operation, device, dense, "no driver", "not installed")


def test_cuda_has_no_kernels_for_the_products():
    with pytest.raises(RuntimeError, match="no kernel for accumulate_squared_product_"):
        choose("cuda", PRODUCT, "cuda", True, None, None)


@pytest.mark.parametrize(
    ("interpreted", "device", "reason"),
    [
        (True, "cpu", None),
        (False, "cuda", None),
        (False, "cpu", "no kernels for the CPU"),
        (True, "cuda", "interpreter works on CPU tensors only"),
    ],
)
def test_where_triton_can_run(interpreted, device, reason, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
    found = _triton.unavailable(device)
    assert found is None if reason is None else reason in found


def test_every_operation_on_lists_has_a_cuda_kernel():
    operations = [value for value in vars(_plan).values() if isinstance(value, Operation)]
    steps = {"adam_step_", "sgd_step_"}  # whose operands vary from call to call
    assert {operation.name for operation in operations} | steps == CUDA_OPERATIONS


def test_asking_for_cuda_on_cpu_tensors_never_falls_back():
    ones = torch.ones(3)
    with pytest.raises(ValueError, match="impl='cuda' works on cuda tensors"):
        functional.add_penalty_grad_(torch.zeros(3), ones, ones, ones, ewc_lambda=1.0, impl="cuda")


def test_strided_operands_run_on_the_cpu_backend_only_when_dense():
    row = [torch.zeros(4, 6)[:, ::2], *(torch.ones(4, 3) for _ in range(3))]
    functional.add_penalty_grad_(*row, ewc_lambda=1.0)
    with pytest.raises(ValueError, match="contiguous"):
        functional.add_penalty_grad_(*row, ewc_lambda=1.0, impl="cpu")


def test_what_is_missing_is_explained():
    if not core.cuda_architectures:
        assert "built without CUDA" in cuda_unavailable()
    elif not torch.cuda.is_available():
        assert "CUDA" in cuda_unavailable()
    else:
        assert cuda_unavailable() is None

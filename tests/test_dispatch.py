"""The choice of implementation follows its table; a backend asked for by name runs or raises."""

from __future__ import annotations

import pytest
import torch

from ewc_fast import _plan, functional
from ewc_fast._checks import Operation
from ewc_fast._dispatch import CUDA_OPERATIONS, choose
from ewc_fast._native import core, cuda_unavailable


@pytest.mark.parametrize(
    ("requested", "device", "dense", "chosen"),
    [
        ("auto", "cpu", True, "cpu"),
        ("auto", "cpu", False, "reference"),
        ("auto", "cuda", True, "cuda"),
        ("auto", "cuda", False, "reference"),
        ("auto", "mps", True, "reference"),
        ("cpu", "cpu", True, "cpu"),
        ("cuda", "cuda", True, "cuda"),
        ("reference", "cpu", True, "reference"),
        ("reference", "cuda", False, "reference"),
    ],
)
def test_the_table(requested, device, dense, chosen):
    assert choose(requested, "add_penalty_grad_", device, dense, None) == chosen


def test_where_cuda_has_no_kernel_cuda_tensors_take_pytorch():
    assert choose("auto", "merge_", "cuda", True, "built without CUDA") == "reference"
    assert choose("auto", "accumulate_squared_product_", "cuda", True, None) == "reference"


def test_every_operation_on_lists_has_a_cuda_kernel():
    operations = [value for value in vars(_plan).values() if isinstance(value, Operation)]
    assert {operation.name for operation in operations} == CUDA_OPERATIONS


def test_a_named_backend_that_cannot_run_says_why():
    with pytest.raises(ValueError, match="impl='cpu' works on cpu tensors, got tensors on cuda"):
        choose("cpu", "merge_", "cuda", True, None)
    with pytest.raises(ValueError, match="impl='cpu' needs operands with equal strides"):
        choose("cpu", "merge_", "cpu", False, None)
    with pytest.raises(RuntimeError, match="impl='cuda' can't run: no driver"):
        choose("cuda", "add_penalty_grad_", "cuda", True, "no driver")
    with pytest.raises(RuntimeError, match="no kernel for accumulate_squared_product_"):
        choose("cuda", "accumulate_squared_product_", "cuda", True, None)


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

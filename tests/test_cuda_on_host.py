"""The CUDA kernels' indexing, tails and reductions, run on the CPU with fibers for threads."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cases import copies, state_like
from numerics import assert_within, gradient_budget, value_budget

from ewc_fast import reference

HERE = Path(__file__).parent / "cuda_on_host"
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # in the core's order


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    library = tmp_path_factory.mktemp("cuda_on_host") / "add_penalty_grad.so"
    options = ["-O1", "-g", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wno-unused-function"]
    files = [f"-I{HERE}", str(HERE / "add_penalty_grad.cpp"), "-o", str(library)]
    subprocess.run([compiler, *options, *files], check=True)
    native = ctypes.CDLL(str(library)).add_penalty_grad
    native.restype = ctypes.c_double

    def call(grads, params, fisher, anchor, ewc_lambda, reverse=False):
        rows = len(params)
        pointers = [t.data_ptr() for tensors in (grads, params, fisher, anchor) for t in tensors]
        return native(
            rows,
            (ctypes.c_void_p * (4 * rows))(*pointers),
            (ctypes.c_int64 * rows)(*(p.numel() for p in params)),
            (ctypes.c_int * rows)(*(DTYPES.index(p.dtype) for p in params)),
            ctypes.c_double(ewc_lambda),
            int(reverse),
        )

    return call


# one element, whole packs and tails, chunk borders; more rows and more blocks than fit one launch
SIZES = {
    "tails": [1, 2, 3, 4, 5, 7, 8, 9, 1023, 1025],
    "chunk_borders": [16383, 16384, 16385, 0, 40001],
    "many_rows": [5] * 100,
    "many_blocks": [16384 * 330 + 3],
    "nothing": [],
}


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_every_element_is_visited_once_and_summed(run, sizes, dtype, reverse):
    if sizes == SIZES["many_blocks"] and (reverse or dtype != torch.float32):
        sizes = [16384 * 3 + 3]
    params = [torch.randn(n).to(dtype) for n in sizes]
    fisher, anchor = state_like(params, True), state_like(params)
    grads = [torch.randn_like(p) for p in params]
    before = copies(grads)
    value = run(grads, params, fisher, anchor, 1.7, reverse)
    exact = reference.penalty(params, fisher, anchor, ewc_lambda=1.7).item()
    assert abs(value - exact) <= value_budget(exact, dtype)
    for grad, old, p, f, a in zip(grads, before, params, fisher, anchor, strict=True):
        pull = 1.7 * f.double() * (p.double() - a.double())
        assert_within(grad, old.double() + pull, gradient_budget(old.double(), pull, dtype), "grad")


def test_misaligned_rows_and_mixed_dtypes_share_a_call(run):
    params = [torch.randn(1001)[1:], *(torch.randn(77).to(dtype) for dtype in DTYPES)]
    fisher, anchor = state_like(params, True), state_like(params)
    grads = [torch.zeros_like(p) for p in params]
    run(grads, params, fisher, anchor, 1.0)
    for grad, p, f, a in zip(grads, params, fisher, anchor, strict=True):
        pull = f.double() * (p.double() - a.double())
        assert_within(grad, pull, gradient_budget(0 * pull, pull, p.dtype), str(p.dtype))


def test_both_thread_orders_give_the_same_bits(run):
    params = [torch.randn(50_000)]
    state = state_like(params, True), state_like(params)
    grads = [torch.zeros(50_000)]
    values = {run(grads, params, *state, 1.0, reverse) for reverse in (False, True, False)}
    assert len(values) == 1

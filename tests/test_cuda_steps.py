"""The optimizers' CUDA steps on a GPU, where there is one."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import torch
from cases import DTYPES
from numerics import value_budget
from steps import STEPS, Lists, Step, copied
from torch import nn

from ewc_fast import EWC, _steps, functional, reference_steps
from ewc_fast._dispatch import Impl
from ewc_fast._native import cuda_unavailable
from ewc_fast.optim import SGD, Adam, AdamW

pytestmark = pytest.mark.skipif(cuda_unavailable() is not None, reason=str(cuda_unavailable()))

every_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
SIZES = [1, 3, 0, 1023, 16385, 100_003, *([17] * 60)]  # tails, chunks, the large parameters


@pytest.fixture(autouse=True)
def roots_rounded_to_nearest(monkeypatch):
    """As NumPy has them; PyTorch's may be one unit off."""
    exact = lambda values: torch.from_numpy(np.sqrt(values.numpy()))  # noqa: E731
    monkeypatch.setattr(reference_steps, "_square_root", exact)


def on(device: str, lists: Lists) -> Lists:
    return {name: [t.to(device, copy=True) for t in ts] for name, ts in lists.items()}


def take(step: Step, lists: Lists, lr=None, plan=None, impl: Impl = "cuda") -> torch.Tensor:
    run = _steps.adam_step if step.adam else _steps.sgd_step
    return run(lists, step.options, impl, plan, lr)()


def assert_same(found: Lists, right: Lists) -> None:
    for name, tensors in right.items():
        for i, tensor in enumerate(tensors):
            if tensor.dtype == torch.float64:  # whose pow() may be two units off the CPU's
                torch.testing.assert_close(found[name][i].cpu(), tensor, rtol=1e-13, atol=1e-14)
            else:
                assert torch.equal(found[name][i].cpu(), tensor), f"{name}[{i}]"


@every_dtype
@every_step
def test_a_step_is_the_specifications_bit_for_bit(step, dtype):
    if not step.fits(dtype):
        pytest.skip("no such operands beside this dtype")
    expected = step.make([torch.randn(n).to(dtype) for n in SIZES])
    lists = on("cuda", expected)
    value = take(step, lists).item()
    penalty = step.reference(expected)
    assert_same(lists, expected)
    assert abs(value - penalty) <= value_budget(penalty, dtype)


@pytest.mark.parametrize("impl", ["cuda", "triton"])
@pytest.mark.parametrize("name", ["adamw", "adamw_proximal", "adam_master", "sgd_nesterov"])
def test_a_cuda_graph_of_a_step_follows_learning_rate_and_count(name, impl):
    """Captured once; the gradients, the learning rate and the counts change between replays."""
    step, plan = STEPS[name], functional.Plan()
    dtype = torch.bfloat16 if step.master else torch.float32
    expected = step.make([torch.randn(n).to(dtype) for n in (5, 70_001, 300)])
    lists, lr = on("cuda", expected), torch.tensor(0.1, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        take(step, on("cuda", expected), lr, plan, impl)  # loads the kernels
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = take(step, lists, lr, plan, impl)
    assert_same(lists, expected)  # a capture runs nothing
    for rate in (0.1, 0.03, 0.0, 0.007):
        for grad, same in zip(lists["grads"], expected["grads"], strict=True):
            grad.copy_(same.normal_())
        lr.fill_(rate)
        graph.replay()
        penalty = step.with_options(lr=lr.item()).reference(expected)
        assert_same(lists, expected)
        assert abs(value.item() - penalty) <= value_budget(penalty, dtype)


OPTIMIZERS = {
    "adam": partial(Adam, amsgrad=True, capturable=True),
    "adamw": partial(AdamW, capturable=True),
    "adamw_master": partial(AdamW, capturable=True, master_weights=True),
    "sgd": partial(SGD, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_cuda_graph_of_training_follows_a_schedule(make):
    """Forward, backward and step captured once, against the same optimizer without a graph."""
    model = nn.Sequential(nn.Linear(9, 31), nn.Tanh(), nn.Linear(31, 4)).cuda()
    data = torch.randn(8, 9, device="cuda"), torch.randint(4, (8,), device="cuda")
    ewc = EWC(model, ewc_lambda=30.0)
    ewc.consolidate([data])
    lr = torch.tensor(0.01, device="cuda")
    optimizer = make(model.parameters(), lr=lr, ewc=ewc)

    def train() -> None:
        optimizer.zero_grad(set_to_none=False)
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        train(), train()  # makes gradients and state, and SGD's first step, which differs
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train()
    at_start = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    results = []
    for run in (graph.replay, train):
        model.load_state_dict(at_start[0])
        with torch.no_grad():  # the graph's own tensors, as loading would make others
            for param, kept in zip(model.parameters(), at_start[1]["state"].values(), strict=True):
                for name, value in kept.items():
                    optimizer.state[param][name].copy_(value)
        penalties = []
        for step in range(5):
            lr.fill_(0.01 / (1 + step))
            run()
            penalties.append(optimizer.last_penalty.item())
        results.append([torch.tensor(penalties), *(p.detach().clone() for p in model.parameters())])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", ["adamw", "sgd_nesterov"])
def test_a_step_on_the_gpu_waits_for_nothing(name):
    lists = on("cuda", STEPS[name].make([torch.randn(n) for n in (5, 70_001)]))
    lr, plan = torch.tensor(0.1, device="cuda"), functional.Plan()
    take(STEPS[name], lists, lr, plan)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        take(STEPS[name], lists, lr, plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["adamw", "adam_bfloat16_fisher"])
def test_a_thousand_steps_stay_with_the_specification(name):
    step = STEPS[name]
    expected = step.make([torch.randn(300), torch.randn(7)])
    lists, draw = on("cuda", expected), torch.Generator().manual_seed(1)
    for _ in range(1000):
        for grad, same in zip(lists["grads"], expected["grads"], strict=True):
            grad.copy_(same.normal_(generator=draw))
        take(step, lists)
        step.reference(expected)
    assert_same(lists, expected)


def test_triton_and_cuda_give_the_same_bits():
    for name, step in STEPS.items():
        if not step.fits(torch.bfloat16):
            continue
        lists = step.make([torch.randn(n).bfloat16() for n in (5, 3000)])
        by_cuda, by_triton = on("cuda", lists), on("cuda", copied(lists))
        take(step, by_cuda)
        take(step, by_triton, impl="triton")
        for key, tensors in by_cuda.items():
            assert all(map(torch.equal, tensors, by_triton[key])), (name, key)

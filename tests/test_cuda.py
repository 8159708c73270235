"""The CUDA kernels on a GPU, where there is one."""

from __future__ import annotations

import pytest
import torch
from cases import every_dtype
from list_operations import OPERATIONS, ListOperation, Lists, every_instance, noise, positive, state
from models import each_model
from numerics import u

from ewc_fast import _engine, fisher_diagonal, functional
from ewc_fast._native import cuda_unavailable

pytestmark = pytest.mark.skipif(cuda_unavailable() is not None, reason=str(cuda_unavailable()))

# packs, tails, borders of chunks; as many rows as take the large parameters; a large table
SIZES = {
    "mixed": [1, 3, 4, 0, 1023, 1024, 1025, 16384, 16385, 100_003, *([17] * 100)],
    "large": [16384 * 2300 + 3, 5],
}
CALLS = {
    "add_penalty_grad": lambda x, c: functional.add_penalty_grad_(*x, ewc_lambda=c, impl="cuda"),
    "penalty": lambda x, c: functional.penalty(*x, ewc_lambda=c),
    "penalty_grad": lambda x, c: torch._foreach_copy_(x[0], _engine.penalty_grad(*x[1:], c)),
    "accumulate_square": lambda x, c: functional.accumulate_square_(*x, weight=c, impl="cuda"),
    "merge": lambda x, c: functional.merge_(*x, gamma=c, impl="cuda"),
    "merge_online": lambda x, c: functional.merge_online_(*x, gamma=c, impl="cuda"),
    "proximal_step": lambda x, c: functional.proximal_step_(
        *x, ewc_lambda=c / 4, lr=4.0, impl="cuda"
    ),
}

every_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())


def on(device: str | torch.device, lists: Lists) -> Lists:
    return [[t.to(device, copy=True) for t in tensors] for tensors in lists]


def call(operation: ListOperation, lists: Lists) -> float | None:
    """Run an operation's kernel; return its value."""
    value = CALLS[operation.name](lists, operation.coefficient)
    assert operation.sums == isinstance(value, torch.Tensor)
    return value.item() if operation.sums else None


def kernels_launched(function) -> list[str]:
    """Return the names of the kernels that a call of ``function`` launches."""
    function()  # whatever the first call alone does
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return [event.name for event in profile.events() if event.device_type == on_device]


@every_operation
@every_instance
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_every_element_is_as_the_reference_has_it(operation, dtype, fisher, sizes):
    before = operation.make([torch.randn(n).to(dtype) for n in sizes], fisher)
    lists = on("cuda", before)
    value = call(operation, lists)
    operation.check(before, on("cpu", lists), operation.coefficient, value)


@every_operation
@every_dtype
def test_misaligned_views_take_part(operation, dtype):
    wide = operation.make([torch.randn(n).to(dtype) for n in (1002, 6, 70_001)], None)
    before = [[t[1:].clone() for t in tensors] for tensors in wide]
    lists = [[t[1:] for t in tensors] for tensors in on("cuda", wide)]
    value = call(operation, lists)
    operation.check(before, on("cpu", lists), operation.coefficient, value)


@every_instance
@pytest.mark.parametrize("samples", [0, 1, 7])
def test_stacked_gradients_are_squared_one_by_one(dtype, fisher, samples):
    params = [torch.randn(n).to(dtype) for n in (1, 1029, 40_000)]
    grads = [torch.randn(samples, p.numel()).to(dtype) for p in params]
    before = [positive(params, fisher), grads]
    lists = on("cuda", before)
    operation = OPERATIONS["accumulate_square"]
    call(operation, lists)
    operation.check(before, on("cpu", lists), operation.coefficient, None)


@every_operation
def test_results_repeat_bit_for_bit(operation):
    before = operation.make([torch.randn(3_000_001), torch.randn(70)], None)
    results = []
    for _ in range(10):
        lists = on("cuda", before)
        value = call(operation, lists)
        results.append([torch.tensor(value or 0.0), *(t for row in lists for t in row)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@every_operation
@pytest.mark.parametrize("rows", [40, 300])
def test_hundreds_of_small_tensors_are_one_launch(operation, rows):
    lists = on("cuda", operation.make([torch.randn(100 + i) for i in range(rows)], None))
    names = kernels_launched(lambda: CALLS[operation.name](lists, operation.coefficient))
    assert sum("over_rows" in name for name in names) == 1
    assert sum("sum_partials" in name for name in names) == operation.sums
    if operation.name not in ("penalty", "penalty_grad"):  # whose callers make tensors
        assert len(names) == 1 + operation.sums


def test_the_penalty_with_its_gradient_can_be_captured_in_a_cuda_graph():
    operation = OPERATIONS["add_penalty_grad"]
    lists = on("cuda", operation.make([torch.randn(n) for n in (5, 70_001, 300)], None))
    plan = functional.Plan()

    def step():
        return functional.add_penalty_grad_(*lists, ewc_lambda=operation.coefficient, plan=plan)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = step()
    for _ in range(2):  # a replay reads what the tensors hold then
        torch._foreach_mul_(lists[1], 2.0)
        before = on("cpu", lists)
        graph.replay()
        torch.cuda.synchronize()
        operation.check(before, on("cpu", lists), operation.coefficient, value.item())


@every_operation
def test_kernels_wait_for_what_is_before_them_on_their_stream(operation):
    before = operation.make([torch.randn(n) for n in (5, 70_001)], None)
    lists = [[torch.zeros_like(t, device="cuda") for t in tensors] for tensors in before]
    sources, stream = on("cuda", before), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a tenth of a second: only this stream's order helps
        for target, source in zip(lists, sources, strict=True):
            torch._foreach_copy_(target, source)
        value = call(operation, lists)
    stream.synchronize()
    operation.check(before, on("cpu", lists), operation.coefficient, value)


@every_operation
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_tensors_on_another_than_the_current_device_run_there(operation):
    before = operation.make([torch.randn(n) for n in (5, 70_001)], None)
    lists = on("cuda:1", before)
    value = call(operation, lists)
    assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(1)
    operation.check(before, on("cpu", lists), operation.coefficient, value)


def test_rows_on_the_cpu_and_on_the_gpu_share_a_call():
    operation = OPERATIONS["add_penalty_grad"]
    before = operation.make([torch.randn(n) for n in (5, 70, 11)], None)
    lists = [[a, b.cuda(), c] for a, b, c in on("cpu", before)]
    value = functional.add_penalty_grad_(*lists, ewc_lambda=operation.coefficient)
    operation.check(before, on("cpu", lists), operation.coefficient, value.item())


def test_a_plan_follows_new_addresses_on_the_gpu():
    operation, plan = OPERATIONS["add_penalty_grad"], functional.Plan()
    params = [torch.randn(n) for n in (5, 70_001)]
    for _ in range(3):
        before = [noise(params), params, positive(params), state(params)]
        lists = on("cuda", before)  # elsewhere each time, the last lists being alive
        value = functional.add_penalty_grad_(*lists, ewc_lambda=1.7, plan=plan)
        operation.check(before, on("cpu", lists), 1.7, value.item())


def test_rounding_by_chance_is_right_on_average():
    n, calls = 1_000_000, 64
    fisher, grad = torch.ones(n, dtype=torch.bfloat16, device="cuda"), torch.full((n,), 2.0**-6)
    for _ in range(calls):
        functional.accumulate_square_(fisher, grad.cuda(), impl="cuda")
    added, unit = calls * 2.0**-12, 2 * u(torch.bfloat16)
    deviation = (calls * 2.0**-12 * unit) ** 0.5
    assert abs(fisher.double().mean().item() - 1 - added) < 5 * deviation / n**0.5


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

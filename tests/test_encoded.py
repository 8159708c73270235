"""Kernels that decode an 8-bit Fisher do what the float32 kernels do with its decoded values.

Bit by bit: natively on the CPU at every vector level, by Triton (in its interpreter where there is
no GPU), and by CUDA where there is one; tests/test_cuda_on_host.py runs CUDA's kernels on the CPU.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from encoded_lists import READING, copies_of, pair_of_lists, shifted
from numerics import u
from torch import nn
from training import same, shift

from ewc_fast import EWC, _engine, _plan, _springs
from ewc_fast._encoded import EncodedSprings, in_8_bits
from ewc_fast._native import core, cuda_unavailable, reader
from ewc_fast._plan import Plan
from ewc_fast._springs import ActiveSprings, Spring
from ewc_fast._triton import unavailable
from ewc_fast.formats import decode_e5m3

GPU = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [  # of Triton's interpreter
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning"),
]
IMPLS = [
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param(
        *("triton", GPU),
        id="triton",
        marks=pytest.mark.skipif(unavailable(GPU) is not None, reason=str(unavailable(GPU))),
    ),
    pytest.param(
        *("cuda", "cuda"),
        id="cuda",
        marks=pytest.mark.skipif(cuda_unavailable() is not None, reason=str(cuda_unavailable())),
    ),
]
every_impl = pytest.mark.parametrize(("impl", "device"), IMPLS)
every_operation = pytest.mark.parametrize("operation", READING.values(), ids=READING.keys())
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)
# ends of blocks and of chunks, one element and none
SIZES = [1, 15, 0, 255, 256, 257, 300, 1027, 4097, 16385]
CALLED = {
    "add_penalty_grad": _plan.ADD_PENALTY_GRAD,
    "penalty": _plan.PENALTY,
    "penalty_grad": _plan.PENALTY_GRAD,
    "proximal_step": _plan.PROXIMAL_STEP,
}


def run(operation, lists, impl, **options):
    """Run an operation's kernels on the Fisher that is there; return its value."""
    called = CALLED[operation.name]
    if len(lists) > len(called.operands):
        called = in_8_bits(called)
    native = partial(getattr(core, operation.name), **options)
    native = native if options else native.func
    (group,) = Plan().groups(called, lists, impl)
    assert group.impl == impl
    if group.table is not None:
        assert len(group.table.launches) <= 1
    value = _engine.run_natively(called, native, group, operation.coefficient)
    return float(value) if operation.sums else value


def check(operation, lists, twin, impl, device="cpu", **options):
    """Compare the values and all that is written; what is only read stays as it is."""
    found, expected = (
        [[t.to(device) for t in ts] for ts in operands] for operands in (lists, twin)
    )
    before = copies_of(found)
    assert run(operation, found, impl, **options) == run(operation, expected, impl, **options)
    for place, tensors in enumerate(found):
        right = expected[place] if place in operation.written else before[place]
        assert all(map(torch.equal, tensors, right)), place


@every_impl
@every_dtype
@every_operation
def test_a_list_is_what_the_decoded_list_is(operation, dtype, impl, device):
    params = [torch.randn(n).to(dtype) for n in SIZES]
    check(operation, *pair_of_lists(operation, params), impl, device)


@pytest.mark.parametrize("level", range(len(core.vector_levels)), ids=core.vector_levels)
@every_dtype
@every_operation
def test_every_vector_level_and_several_threads_decode_alike(operation, dtype, level):
    torch.set_num_threads(2)
    params = [torch.randn(n).to(dtype) for n in (60_077, 3)]
    check(operation, *pair_of_lists(operation, params), "cpu", level=level)


@every_impl
@every_operation
def test_one_tensor_in_any_order_of_memory(operation, impl, device):
    for param in (torch.randn(()), torch.randn(37, 30).t(), torch.randn(0, 3)):
        lists, twin = pair_of_lists(operation, [param])
        for operands in (lists, twin):  # noise and state come in the order of the shape
            for place, (tensor,) in enumerate(operands[: len(twin)]):
                laid_out = torch.empty_strided(param.shape, param.stride(), dtype=tensor.dtype)
                operands[place] = [laid_out.copy_(tensor)]
        twin[operation.fisher] = [decode_e5m3(lists[operation.fisher][0], lists[-1][0])]
        check(operation, lists, twin, impl, device)


@every_impl
@every_operation
def test_misaligned_operands_are_walked_too(operation, impl, device):
    lists, twin = pair_of_lists(operation, [torch.randn(n) for n in (1001, 5, 4098)])
    for place in range(len(twin)):
        check(operation, shifted(lists, [place]), shifted(twin, [place]), impl, device)
    everything = range(len(twin))
    check(operation, shifted(lists, everything), shifted(twin, everything), impl, device)


def test_scales_of_another_number_of_blocks_are_refused():
    operation = READING["penalty"]
    lists, _ = pair_of_lists(operation, [torch.randn(600)])
    for wrong in (lists[-1][0][:2], lists[-1][0].reshape(3, 1), lists[-1][0].repeat(2)[::2]):
        with pytest.raises(ValueError, match=r"scales\[0\]: expected a contiguous vector of 3"):
            run(operation, [*lists[:-1], [wrong]], "cpu")


@every_operation
def test_codes_are_taken_for_nothing_but_codes(operation):
    lists, twin = pair_of_lists(operation, [torch.randn(600)])
    with pytest.raises(TypeError, match=r"fisher\[0\]: expected float32 or bfloat16.*got uint8"):
        run(operation, lists[:-1], "cpu")
    with pytest.raises(TypeError, match=r"fisher\[0\]: expected uint8.*got float32"):
        run(operation, [*twin, lists[-1]], "cpu")


@pytest.mark.parametrize(
    "tensor_reader", [reader, core.TensorReader(None)], ids=["default", "slow"]
)
def test_the_core_reads_codes_and_refuses_what_they_do_not_go_with(tensor_reader):
    lists, _ = pair_of_lists(READING["penalty"], [torch.randn(600)])
    (params, codes, anchor, scales) = lists
    specs = [(o.name, o.role, False, False, False) for o in in_8_bits(_plan.PENALTY).operands]
    plan = core.Plan(tensor_reader, specs)
    assert plan.accepts(params, codes, anchor, scales)
    doubles = [[t.double() for t in tensors] for tensors in (params, anchor)]
    assert not plan.accepts(doubles[0], codes, doubles[1], scales)
    assert not plan.accepts(codes, codes, anchor, scales)
    assert not plan.accepts(params, params, anchor, scales)
    assert not plan.accepts(params, codes, anchor, [scales[0][:2]])
    assert not plan.accepts(params, codes, codes, scales)
    total, factor = torch.zeros(3, 4), torch.zeros(2, 5, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="grads: expected a floating tensor"):
        core.squared_product(tensor_reader, total, factor[..., :3], factor, None, 1)


# Springs of several parameters, as an EWC uses them


def springs_of(params):
    return [
        Spring(
            *(torch.empty_like(p, dtype=torch.float64).normal_().abs_().to(s) for s in (s, s)),
            torch.zeros_like(p, dtype=torch.bfloat16),
        )
        for p in params
        for s in [torch.float64 if p.dtype == torch.float64 else torch.float32]
    ]


def pair_of_springs(make, impl):
    """Springs in 8 bits, and plain ones of the same values at parameters of the same values."""
    params = make()
    kept = [s.kept_in(_springs.Storage("e5m3", on_cpu=False)) for s in springs_of(params)]
    twins = [p.detach().clone().requires_grad_(p.requires_grad) for p in params]
    plain = [Spring(s.fisher_values(), s.anchor.clone(), s.residual) for s in kept]
    return EncodedSprings(params, kept, impl), ActiveSprings(twins, plain, impl)


def pulls_of(plain, ewc_lambda, impl):
    lists = ([t.detach() for t in tensors] for tensors in plain.operands)
    return _engine.penalty_grad(*lists, ewc_lambda, impl=impl)


def several(*dtypes):
    shapes = [(700, 2), (5,), (0, 3), ()]
    params = [torch.randn(s).to(d).requires_grad_() for d in dtypes for s in shapes]
    params.append(torch.randn(33, 20).to(dtypes[0]).t().requires_grad_())
    params.append(torch.randn(3).to(dtypes[0]))  # frozen
    return params


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize(
    "dtypes",
    [[torch.float32], [torch.float32, torch.bfloat16], [torch.float64, torch.float32]],
    ids=["float32", "mixed", "beside_float64"],
)
def test_springs_pull_as_plain_ones_do(dtypes, impl, triton_device):
    if impl == "triton" and unavailable(triton_device):
        pytest.skip(unavailable(triton_device))
    kept, plain = pair_of_springs(lambda: several(*dtypes), impl)
    for springs in (kept, plain):
        for number, param in enumerate(springs._params):
            if param.requires_grad and number % 2:
                param.grad = torch.ones_like(param)
    value, expected = (springs.add_penalty_grad_(3.0, 0.0).item() for springs in (kept, plain))
    # rows in float64 are a group of their own, whose value is added at another place
    assert value == pytest.approx(expected, rel=4 * u(torch.float64), abs=0)
    assert same([p.grad for p in kept._params], [p.grad for p in plain._params])
    assert kept.penalty(3.0).item() == pytest.approx(value, rel=4 * u(torch.float64), abs=0)
    (2 * kept.penalty(3.0)).backward()
    for param, pull in zip(plain._params, pulls_of(plain, 3.0, impl), strict=True):
        if param.requires_grad:
            param.grad += 2 * pull
    for springs in (kept, plain):
        springs.proximal_step_(3.0, 0.1)
    assert same([p.grad for p in kept._params], [p.grad for p in plain._params])
    assert same([p.detach() for p in kept._params], [p.detach() for p in plain._params])


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_nothing_is_decoded_for_kernels(impl, triton_device, monkeypatch):
    if impl == "triton" and unavailable(triton_device):
        pytest.skip(unavailable(triton_device))
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 3))
    ewc = EWC(model, ewc_lambda=2.0, storage="e5m3", impl=impl)
    ewc.consolidate_from({n: torch.rand(p.shape) for n, p in model.named_parameters()})
    shift(model)

    def refuse(spring):
        raise AssertionError("decoded")

    monkeypatch.setattr(Spring, "fisher_values", refuse)
    ewc.penalty().backward()
    ewc.add_penalty_grad_()
    ewc.springs_of(model.parameters()).proximal_step_(2.0, 0.1)


def test_addresses_may_change_from_step_to_step():
    kept, plain = pair_of_springs(lambda: several(torch.float32), "auto")
    for step in range(3):
        for springs in (kept, plain):
            torch.manual_seed(step)
            for param in springs._params:
                if param.requires_grad:
                    param.grad = torch.randn_like(param)
                    param.data = copy.deepcopy(param.data) + step
        values = [springs.add_penalty_grad_(3.0, 0.0).item() for springs in (kept, plain)]
        assert values[0] == values[1]
        assert same([p.grad for p in kept._params], [p.grad for p in plain._params])


@pytest.mark.skipif(cuda_unavailable() is not None, reason=str(cuda_unavailable()))
@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_a_captured_call_repeats(impl):
    torch.set_default_device("cuda")
    try:
        kept, plain = pair_of_springs(lambda: several(torch.float32)[:5], impl)
    finally:
        torch.set_default_device(None)
    for springs in (kept, plain):
        springs.add_penalty_grad_(3.0, 0.0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            springs.add_penalty_grad_(3.0, 0.0)
        graph.replay()
    assert same([p.grad for p in kept._params], [p.grad for p in plain._params])

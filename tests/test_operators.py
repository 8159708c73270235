"""The operations as PyTorch operators: contract, compilation, derivatives."""

from __future__ import annotations

import pytest
import torch
from cases import copies, state_like
from torch.library import opcheck

from ewc_fast import functional, reference

OPS = torch.ops.ewc_fast


def operands(dtype=torch.float32):
    params = [torch.randn(n, 3).to(dtype) for n in (1, 5, 40)]
    return params, state_like(params, True), state_like(params)


def residual(params):
    return [torch.zeros_like(p, dtype=torch.bfloat16) for p in params]


def half(fisher):
    return [f.bfloat16() for f in fisher]


def number(value):
    return torch.tensor(value, dtype=torch.float64)


SHARED = {"weight_decay": 0.1, "maximize": False, "proximal": False}
ADAM = SHARED | {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "decoupled": False}
SGD = SHARED | {"momentum": 0.9, "dampening": 0.0, "nesterov": False, "first": False}


def adam_operands(params, fisher, anchor, amsgrad=False):
    master = [p.float() for p in params if p.dtype == torch.bfloat16] if amsgrad else []
    moments = [[torch.rand_like(p, dtype=torch.float32) for p in params] for _ in range(3)]
    steps = [torch.tensor(3.0) for _ in params]
    return (
        *(params, copies(params), fisher, anchor, master, *moments[: 2 + amsgrad]),
        *([] if amsgrad else [[]]),
        *([], steps, number(0.1), number(2.0), None),
    )


CALLS = {
    "penalty": lambda p, f, a: (OPS.penalty, ([t.requires_grad_() for t in p], f, a, number(2.0))),
    "add_penalty_grad_": lambda p, f, a: (OPS.add_penalty_grad_, (copies(p), p, f, a, number(2.0))),
    "accumulate_square_": lambda p, f, a: (OPS.accumulate_square_, (f, p, 0.5)),
    "merge_": lambda p, f, a: (OPS.merge_, (f, a, residual(p), copies(f), p, 0.9)),
    "merge_online_": lambda p, f, a: (OPS.merge_online_, (f, a, copies(f), p, 0.9)),
    "proximal_step_": lambda p, f, a: (OPS.proximal_step_, (p, f, a, number(2.0), number(0.1))),
    "accumulate_square_with_a_seed": lambda p, f, a: (
        OPS.accumulate_square_,
        (half(f), p, 0.5, 7),
    ),
    "merge_with_a_seed": lambda p, f, a: (
        OPS.merge_,
        (half(f), a, residual(p), copies(f), p, 0.9, 7),
    ),
    "merge_online_with_a_seed": lambda p, f, a: (
        OPS.merge_online_,
        (half(f), a, copies(f), p, 0.9, 7),
    ),
    "adam_step_": lambda p, f, a: (OPS.adam_step_, adam_operands(p, f, a), ADAM),
    "adam_step_with_all_there_is": lambda p, f, a: (
        OPS.adam_step_,
        adam_operands(p, f, a, amsgrad=True),
        ADAM | {"proximal": True, "decoupled": True},
    ),
    "adam_step_without_springs": lambda p, f, a: (OPS.adam_step_, adam_operands(p, [], []), ADAM),
    "sgd_step_": lambda p, f, a: (
        OPS.sgd_step_,
        (p, copies(p), f, a, [], copies(p), [], number(0.1), number(2.0), None),
        SGD,
    ),
    "sgd_step_with_a_seed": lambda p, f, a: (
        OPS.sgd_step_,
        (p, copies(p), f, a, [], [], [], number(0.1), number(2.0), torch.tensor(7)),
        SGD | {"momentum": 0.0},
    ),
    "penalty_with_a_bfloat16_fisher": lambda p, f, a: (
        OPS.penalty,
        ([t.requires_grad_() for t in p], half(f), a, number(2.0)),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("make", CALLS.values(), ids=CALLS.keys())
def test_the_operator_keeps_pytorchs_contract(make, dtype):
    op, arguments, *options = make(*operands(dtype))
    opcheck(op.default, arguments, *options)


def test_the_penalty_compiles_into_a_loss_without_graph_breaks():
    params, fisher, anchor = operands()
    params = [p.requires_grad_() for p in params]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(params, fisher, anchor):
        return sum((p * p).sum() for p in params) + functional.penalty(
            params, fisher, anchor, ewc_lambda=3.0
        )

    compiled = torch.autograd.grad(loss(params, fisher, anchor), params)
    pulls = reference.penalty_grad(params, fisher, anchor, ewc_lambda=3.0)
    for grad, param, pull in zip(compiled, params, pulls, strict=True):
        torch.testing.assert_close(grad, 2 * param + pull)


@pytest.mark.parametrize("name", ["add_penalty_grad_", "proximal_step_", "merge_"])
def test_in_place_operations_compile_without_graph_breaks(name):
    def run(params, fisher, anchor, extra):
        if name == "add_penalty_grad_":
            return functional.add_penalty_grad_(extra, params, fisher, anchor, ewc_lambda=2.0)
        if name == "proximal_step_":
            return functional.proximal_step_(params, fisher, anchor, ewc_lambda=2.0, lr=0.1)
        return functional.merge_(fisher, anchor, residual(params), extra, params, gamma=0.9)

    lists = [*operands(), operands()[1]]
    eager = [copies(tensors) for tensors in lists]
    value = torch.compile(run, fullgraph=True, backend="aot_eager")(*lists)
    expected = run(*eager)
    assert value is None if expected is None else torch.equal(value, expected)
    for compiled, uncompiled in zip(lists, eager, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(compiled, uncompiled, strict=True))


@pytest.mark.parametrize("name", ["penalty", "add_penalty_grad_", "proximal_step_"])
def test_numbers_given_as_tensors_need_one_graph_and_are_checked_when_it_runs(name):
    operation, graphs = getattr(functional, name), []
    lr = {"lr": number(0.5)} if name == "proximal_step_" else {}

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def run(*lists, ewc_lambda):
        return operation(*lists, ewc_lambda=ewc_lambda, **lr)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    params, fisher, anchor = operands()
    lists = [copies(params)] * (name == "add_penalty_grad_") + [params, fisher, anchor]
    for strength in (2.0, 0.0, 7.5):
        eager = [copies(tensors) for tensors in lists]
        expected = run(*eager, ewc_lambda=strength)
        found = compiled(*lists, ewc_lambda=number(strength))
        assert found is None if expected is None else torch.equal(found, expected)
        for one, other in zip(lists, eager, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert len(graphs) == 1
    with pytest.raises(ValueError, match="ewc_lambda: expected a number >= 0"):
        compiled(*lists, ewc_lambda=number(-1.0))


def test_first_and_second_derivatives_match_finite_differences():
    param = torch.randn(4, dtype=torch.float64, requires_grad=True)
    fisher, anchor = torch.rand(4).double(), torch.randn(4).double()

    def penalty(theta):
        return functional.penalty(theta, fisher, anchor, ewc_lambda=2.0)

    assert torch.autograd.gradcheck(penalty, param)
    assert torch.autograd.gradgradcheck(penalty, param)


def test_the_hessian_is_lambda_times_the_fisher():
    fisher, anchor = torch.rand(4), torch.randn(4)
    hessian = torch.autograd.functional.hessian(
        lambda theta: functional.penalty(theta, fisher, anchor, ewc_lambda=3.0), torch.randn(4)
    )
    torch.testing.assert_close(hessian, torch.diag(3 * fisher))


def test_a_gradient_through_functional_transforms_is_the_same():
    (param, *_), (fisher, *_), (anchor, *_) = operands()
    grad = torch.func.grad(lambda p: functional.penalty(p, fisher, anchor, ewc_lambda=2.0))(param)
    torch.testing.assert_close(grad, 2 * fisher * (param - anchor))


def test_a_fisher_changed_between_forward_and_backward_is_noticed():
    param = torch.randn(3, requires_grad=True)
    fisher, anchor = torch.rand(3), torch.zeros(3)
    value = functional.penalty(param, fisher, anchor, ewc_lambda=2.0)
    functional.merge_online_(fisher, anchor, torch.rand(3), param)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()

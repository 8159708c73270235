"""Whole training steps in one compiled graph, or in a CUDA graph, made once for a whole run."""

from __future__ import annotations

import copy

import pytest
import torch
from numerics import assert_within, u
from torch import optim
from torch._dynamo.utils import counters
from training import batch, consolidated, loss

from ewc_fast import EWCOptimizer

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class TraceableSGD(optim.Optimizer):
    """SGD whose step is one graph: PyTorch's optimizers break the graph around theirs."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(group["lr"] * param.grad)


@pytest.fixture
def one_graph_only():
    """Make a second compilation of the same function an error; trace backward passes as well."""
    config = torch._dynamo.config
    if not hasattr(config, "trace_autograd_ops"):
        pytest.skip("this PyTorch traces no backward pass")
    torch._dynamo.reset()
    counters.clear()
    with config.patch(trace_autograd_ops=True, recompile_limit=1, fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def loop(way, model, ewc):
    """Return one whole step, which adds the penalty in one of the ways there are."""
    inner = TraceableSGD(model.parameters(), lr=0.05)
    mode = "proximal" if way == "proximal" else "gradient"
    optimizer = EWCOptimizer(inner, ewc, mode=mode) if way in ("wrapper", "proximal") else inner

    def step(*one):
        for param in model.parameters():  # a compiler does not trace Optimizer.zero_grad
            param.grad = None
        value = loss(model, one)
        if way == "loss":
            value = value + ewc.penalty()
        value.backward()
        if way == "in_place":
            ewc.add_penalty_grad_()
        optimizer.step()
        return optimizer.last_penalty if way == "wrapper" else value.detach()

    return step


def assert_near(model, other, steps):
    """Compilers fuse and reorder: some roundings of every addend, step by step."""
    for (name, param), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        budget = 32 * steps * u(torch.float32) * (1 + expected.detach().abs())
        assert_within(param.detach(), expected.detach(), budget, name)


STRENGTHS = (30.0, 30.0, 3.0, 0.0, 77.7)


@pytest.mark.parametrize("way", ["loss", "in_place", "wrapper", "proximal"])
def test_one_graph_serves_all_steps_and_every_lambda(way, device, one_graph_only):
    model, ewc = consolidated()
    plain, by_hand = copy.deepcopy((model, ewc))
    eager = loop(way, plain, by_hand)
    step = torch.compile(loop(way, model, ewc), fullgraph=True, backend="aot_eager")
    for strength in STRENGTHS:
        ewc.ewc_lambda = by_hand.ewc_lambda = strength
        one = batch(model)
        found, expected = step(*one).item(), eager(*one).item()
        assert found == pytest.approx(expected, rel=1e3 * u(torch.float32))
    assert counters["stats"]["unique_graphs"] == 1
    assert_near(model, plain, len(STRENGTHS))


def test_a_consolidation_recompiles_once(device):
    """A new task is new springs; their graph then serves all steps of that task."""
    torch._dynamo.reset()
    model, ewc = consolidated()
    plain, by_hand = copy.deepcopy((model, ewc))
    compiles = 0

    def backend(graph, example_inputs):
        nonlocal compiles
        compiles += 1
        return graph.forward

    step = torch.compile(ewc.add_penalty_grad_, fullgraph=True, backend=backend)
    expected = 0
    for _ in range(3):
        for strength in (2.0, 5.0, 5.0):
            ewc.ewc_lambda = by_hand.ewc_lambda = strength
            assert step().item() == by_hand.add_penalty_grad_().item()
        expected += 1
        assert compiles <= expected
        one = batch(model)
        ewc.consolidate([one])
        by_hand.consolidate([one])
    for param, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(param.grad, other.grad)


INNER = {
    "sgd": lambda ps: optim.SGD(ps, lr=0.05),
    "sgd_foreach": lambda ps: optim.SGD(ps, lr=0.05, momentum=0.9, foreach=True),
    "adamw": lambda ps: optim.AdamW(ps, lr=0.01),
}


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("inner", INNER.values(), ids=INNER.keys())
def test_around_pytorchs_optimizers_nothing_recompiles_that_would_not_without(inner, mode, device):
    """These break the graph around their own step; what they compile anew, they do alone too."""

    def run(wrap):
        torch.manual_seed(0)
        torch._dynamo.reset()
        counters.clear()
        model, ewc = consolidated()
        optimizer = inner(model.parameters())
        optimizer = EWCOptimizer(optimizer, ewc, mode=mode) if wrap else optimizer
        step, graphs = torch.compile(lambda: optimizer.step(), backend="aot_eager"), []
        for strength in STRENGTHS:
            ewc.ewc_lambda = strength
            optimizer.zero_grad()
            loss(model, batch(model)).backward()
            step()
            graphs.append(counters["stats"]["unique_graphs"])
        return [now - graphs[1] for now in graphs[2:]]  # the second step finds state

    assert run(wrap=True) == run(wrap=False)
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_a_compiled_model_is_anchored_like_any_other(mode, device):
    model, ewc = consolidated()
    plain, by_hand = copy.deepcopy((model, ewc))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for one_model, forward, one_ewc in ((model, compiled, ewc), (plain, plain, by_hand)):
        torch.manual_seed(1)
        optimizer = EWCOptimizer(optim.SGD(one_model.parameters(), lr=0.05), one_ewc, mode=mode)
        for one in [batch(one_model) for _ in range(3)]:
            optimizer.zero_grad()
            loss(
                forward, one
            ).backward() if forward is plain else torch.nn.functional.cross_entropy(
                forward(one[0]), one[1]
            ).backward()
            optimizer.step()
    assert_near(model, plain, 3)


@NEEDS_CUDA
@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_a_cuda_graph_of_a_whole_step_repeats_it(mode):
    torch.set_default_device("cuda")
    try:
        model, ewc = consolidated()
        plain, by_hand = copy.deepcopy((model, ewc))
        pairs = []
        for one_model, one_ewc in ((model, ewc), (plain, by_hand)):
            inner = optim.AdamW(one_model.parameters(), lr=0.01, capturable=True)
            pairs.append((one_model, EWCOptimizer(inner, one_ewc, mode=mode)))
        data = [batch(model) for _ in range(6)]
        place = tuple(tensor.clone() for tensor in data[0])

        def step(one_model, optimizer, one):
            optimizer.zero_grad(set_to_none=False)
            loss(one_model, one).backward()
            optimizer.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for one in data[:3]:
                for held, new in zip(place, one, strict=True):
                    held.copy_(new)
                step(*pairs[0], place)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(*pairs[0], place)
        for one in data[3:]:
            for held, new in zip(place, one, strict=True):
                held.copy_(new)
            graph.replay()
        for one in data:
            step(*pairs[1], one)
        torch.cuda.synchronize()
        assert_near(model, plain, len(data))
        if mode == "gradient":
            exact = pairs[1][1].last_penalty.item()
            assert pairs[0][1].last_penalty.item() == pytest.approx(exact, rel=1e-4)
    finally:
        torch.set_default_device(None)

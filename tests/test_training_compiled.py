"""Whole training steps in one compiled graph, or in a CUDA graph, made once for a whole run."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiled_steps import STRENGTHS, WAYS, assert_near
from torch import optim
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy
from training import batch, consolidated, gradients, loss, same

from ewc_fast import EWCOptimizer

each_device = pytest.mark.parametrize(  # not the fixture, whose mode would be compiled as well
    "device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
)
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def scene_on(device, batches):
    """Return a model, its EWC and data, all on a device."""
    with torch.device(device):
        model, ewc = consolidated()
        return model, ewc, [batch(model) for _ in range(batches)]


@each_device
@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"),
    reason="this PyTorch traces no backward pass",
)
def test_one_graph_serves_all_steps_and_every_lambda(device):
    script = Path(__file__).with_name("compiled_steps.py")
    result = subprocess.run(
        [sys.executable, str(script), device], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split() == [*WAYS]


@each_device
def test_a_consolidation_recompiles_once(device):
    """A new task is new springs; their graph then serves all steps of that task."""
    torch._dynamo.reset()
    model, ewc, (one,) = scene_on(device, 1)
    plain, by_hand = copy.deepcopy((model, ewc))
    for each in (model, plain):
        loss(each, one).backward()  # gradients that are not there yet are another graph
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    step = torch.compile(ewc.add_penalty_grad_, fullgraph=True, backend=backend)
    for task in range(3):
        for strength in (2.0, 5.0, 5.0):
            ewc.ewc_lambda = by_hand.ewc_lambda = strength
            assert step().item() == by_hand.add_penalty_grad_().item()
        assert len(graphs) <= 1 + task
        ewc.consolidate([one])
        by_hand.consolidate([one])
    assert same(gradients(model), gradients(plain))


INNER = {
    "sgd": lambda ps: optim.SGD(ps, lr=0.05),
    "sgd_foreach": lambda ps: optim.SGD(ps, lr=0.05, momentum=0.9, foreach=True),
    "adamw": lambda ps: optim.AdamW(ps, lr=0.01),
}


@each_device
@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("inner", INNER.values(), ids=INNER.keys())
def test_around_pytorchs_optimizers_nothing_recompiles_that_would_not_without(inner, mode, device):
    """These break the graph around their own step; what they compile anew, they do alone too."""

    def run(wrap):
        torch.manual_seed(0)
        torch._dynamo.reset()
        counters.clear()
        model, ewc, data = scene_on(device, len(STRENGTHS))
        optimizer = inner(model.parameters())
        optimizer = EWCOptimizer(optimizer, ewc, mode=mode) if wrap else optimizer
        step, graphs = torch.compile(lambda: optimizer.step(), backend="aot_eager"), []
        for strength, one in zip(STRENGTHS, data, strict=True):
            ewc.ewc_lambda = strength
            optimizer.zero_grad()
            loss(model, one).backward()
            step()
            graphs.append(counters["stats"]["unique_graphs"])
        return [now - graphs[1] for now in graphs[2:]]  # the second step finds state

    assert run(wrap=True) == run(wrap=False)
    torch._dynamo.reset()


@each_device
@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_a_compiled_model_is_anchored_like_any_other(mode, device):
    model, ewc, data = scene_on(device, 3)
    plain, by_hand = copy.deepcopy((model, ewc))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for one_model, forward, one_ewc in ((model, compiled, ewc), (plain, plain, by_hand)):
        optimizer = EWCOptimizer(optim.SGD(one_model.parameters(), lr=0.05), one_ewc, mode=mode)
        for inputs, targets in data:
            optimizer.zero_grad()
            cross_entropy(forward(inputs), targets).backward()
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

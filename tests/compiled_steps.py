"""Runs whole training steps in one compiled graph, made once, beside the same steps uncompiled.

A program of its own (``python compiled_steps.py DEVICE``), as tracing backward passes is an
experimental switch of PyTorch's compiler, which leaves traces in its process.
"""

from __future__ import annotations

import copy
import sys

import torch
from numerics import assert_within, u
from torch import optim
from torch._dynamo.utils import counters
from training import batch, consolidated, loss

from ewc_fast import EWCOptimizer
from ewc_fast.optim import SGD, Adam, AdamW

FUSED = {
    "fused_sgd": lambda ps, ewc: SGD(ps, lr=torch.tensor(0.05), momentum=0.9, ewc=ewc),
    "fused_adam": lambda ps, ewc: Adam(ps, lr=torch.tensor(0.01), ewc=ewc, amsgrad=True),
    "fused_adamw": lambda ps, ewc: AdamW(ps, lr=torch.tensor(0.01), ewc=ewc, mode="proximal"),
}
WAYS = ("loss", "in_place", "wrapper", "proximal", *FUSED)
STRENGTHS = (30.0, 30.0, 3.0, 0.0, 77.7)


class TraceableSGD(optim.Optimizer):
    """SGD whose step is one graph: PyTorch's optimizers break the graph around theirs."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(group["lr"] * param.grad)


def loop(way, model, ewc):
    """Return one whole step, which adds the penalty in one of the ways there are."""
    make = FUSED.get(way, lambda params, _: TraceableSGD(params, lr=0.05))
    inner = make(model.parameters(), ewc)
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
        return optimizer.last_penalty if way in ("wrapper", *FUSED) else value.detach()

    return step


def assert_near(model, other, steps):
    """Compilers fuse and reorder: some roundings of every addend, step by step."""
    for (name, param), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        budget = 32 * steps * u(torch.float32) * (1 + expected.detach().abs())
        assert_within(param.detach(), expected.detach(), budget, name)


def one_graph_serves_all_steps_and_every_lambda(way, device):
    torch.manual_seed(0)
    torch._dynamo.reset()
    counters.clear()
    with torch.device(device):
        model, ewc = consolidated()
        data = [batch(model) for _ in STRENGTHS]
    plain, by_hand = copy.deepcopy((model, ewc))
    eager = loop(way, plain, by_hand)
    step = torch.compile(loop(way, model, ewc), fullgraph=True, backend="aot_eager")
    for strength, one in zip(STRENGTHS, data, strict=True):
        ewc.ewc_lambda = by_hand.ewc_lambda = strength
        found, expected = step(*one).item(), eager(*one).item()
        assert abs(found - expected) <= 1e3 * u(torch.float32) * expected, (way, found, expected)
    assert counters["stats"]["unique_graphs"] == 1, (way, counters["stats"])
    assert_near(model, plain, len(STRENGTHS))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch._dynamo.config.patch(  # a second compilation of the same function is an error
        trace_autograd_ops=True, recompile_limit=1, fail_on_recompile_limit_hit=True
    ):
        for each in WAYS:
            one_graph_serves_all_steps_and_every_lambda(each, sys.argv[1])
            print(each)

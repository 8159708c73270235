"""SI: the path integral of each task's own gradient, as adding up step by step gives it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from models import CLASSES, FEATURES, mlp
from numerics import u
from torch import nn
from training import batch, loss, same

from ewc_fast import EWC, EWCOptimizer

XI = 0.1


class ByDefinition:
    """The formulas of Zenke et al. 2017 in float64, told of each step from outside."""

    def __init__(self, model):
        self.model = model
        self.total = {name: 0.0 for name, _ in model.named_parameters()}
        self.begin_task()

    def now(self):
        return {name: p.detach().double().clone() for name, p in self.model.named_parameters()}

    def begin_task(self):
        self.start, self.omega = self.now(), dict.fromkeys(self.total, 0.0)

    def add(self, gradients, before):
        for name, after in self.now().items():
            self.omega[name] = self.omega[name] - gradients[name] * (after - before[name])

    def end_task(self, xi=XI):
        for name, end in self.now().items():
            away = (end - self.start[name]).square()
            self.total[name] = self.total[name] + self.omega[name].clamp(min=0) / (away + xi)
        self.anchor = self.now()
        self.begin_task()

    def penalty(self, c):
        return c * sum(
            (self.total[name] * (theta - self.anchor[name]).square()).sum().item()
            for name, theta in self.now().items()
        )


def task_gradients(model, data):
    """Return the task's gradients, without the penalty, from a copy of the model."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    loss(twin, data).backward()
    return {name: p.grad.double() for name, p in twin.named_parameters()}


def close(found, expected, dtype):
    """Whether two sums over some 20 steps agree up to roundings of their largest terms."""
    return all(
        (found[name].double() - values).abs().max() <= 256 * u(dtype) * values.abs().max()
        for name, values in expected.items()
    )


INNER = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum_and_decay": lambda params: torch.optim.SGD(
        params, lr=0.05, momentum=0.9, weight_decay=1e-2
    ),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "adam_foreach": lambda params: torch.optim.Adam(params, lr=1e-2, foreach=True),
}


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("inner", INNER.values(), ids=INNER.keys())
def test_two_tasks_give_the_papers_importance_and_penalty(inner, mode):
    torch.manual_seed(0)
    model = mlp().double()
    ewc = EWC(model, ewc_lambda=0.2, anchor="latest", importance="si")
    optimizer = EWCOptimizer(inner(model.parameters()), ewc, mode=mode)
    expected = ByDefinition(model)
    for _ in range(2):
        for _ in range(10):
            data = batch(model)
            gradients, before = task_gradients(model, data), expected.now()
            optimizer.zero_grad()
            loss(model, data).backward()
            optimizer.step()
            expected.add(gradients, before)
        ewc.consolidate()
        expected.end_task()
        assert close(ewc.fisher, expected.total, torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    # c = ewc_lambda / 2
    assert ewc.penalty().item() == pytest.approx(expected.penalty(0.1), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_parameters_accumulate_in_float32(dtype):
    torch.manual_seed(0)
    model = mlp().to(dtype)
    ewc = EWC(model, ewc_lambda=1.0, importance="si")
    optimizer = EWCOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), ewc)
    expected = ByDefinition(model)
    for _ in range(20):
        data, before = batch(model), expected.now()
        optimizer.zero_grad()
        loss(model, data).backward()
        gradients = {name: p.grad.double() for name, p in model.named_parameters()}
        optimizer.step()
        expected.add(gradients, before)
    ewc.consolidate()
    expected.end_task()
    assert all(values.dtype == torch.float32 for values in ewc.fisher.values())
    assert close(ewc.fisher, expected.total, torch.float32)


def test_a_descent_explains_the_losss_fall():
    torch.manual_seed(0)
    model = nn.Linear(FEATURES, CLASSES).double()
    ewc = EWC(model, ewc_lambda=1.0, importance="si")
    optimizer = EWCOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3), ewc)
    data = batch(model)
    first = loss(model, data).item()
    for _ in range(300):
        optimizer.zero_grad()
        loss(model, data).backward()
        optimizer.step()
    explained = sum(values.sum().item() for values in ewc.state_dict()["omega"].values())
    # Each step's fall is g^2 lr less half the curvature times its square: a part of lr.
    assert explained == pytest.approx(first - loss(model, data).item(), rel=1e-2)


def test_each_evaluation_of_a_closure_counts_for_the_way_to_the_next():
    torch.manual_seed(0)
    model = mlp().double()
    ewc = EWC(model, ewc_lambda=1.0, importance="si")
    inner = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    optimizer = EWCOptimizer(inner, ewc)
    expected, data, seen = ByDefinition(model), batch(model), []

    def closure():
        optimizer.zero_grad()
        value = loss(model, data)
        value.backward()
        if seen:
            expected.add(*seen.pop())
        grads = {name: p.grad.double().clone() for name, p in model.named_parameters()}
        seen.append((grads, expected.now()))
        return value

    for _ in range(3):
        optimizer.step(closure)
        expected.add(*seen.pop())
    ewc.consolidate()
    expected.end_task()
    assert close(ewc.fisher, expected.total, torch.float64)


def test_a_step_that_a_gradient_scaler_skips_adds_nothing():
    torch.manual_seed(0)
    model = mlp()
    ewc = EWC(model, ewc_lambda=1.0, importance="si")
    optimizer = EWCOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), ewc)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(factor):
        optimizer.zero_grad()
        scaler.scale(factor * loss(model, data)).backward()
        scaler.step(optimizer)
        scaler.update()

    data = batch(model)
    step(1.0)
    before = copy.deepcopy(optimizer.state_dict())
    step(float("inf"))
    assert same(optimizer.state_dict()["ewc"], before["ewc"])


def test_training_resumes_bit_for_bit_in_mid_task():
    def run(model, seed):
        torch.manual_seed(seed)
        ewc = EWC(model, ewc_lambda=0.5, importance="si")
        return ewc, EWCOptimizer(torch.optim.Adam(model.parameters(), lr=1e-2), ewc)

    def train(model, optimizer, data):
        for one in data:
            optimizer.zero_grad()
            loss(model, one).backward()
            optimizer.step()

    torch.manual_seed(0)
    model = mlp()
    ewc, optimizer = run(model, 0)
    tasks = [[batch(model) for _ in range(4)] for _ in range(2)]
    train(model, optimizer, tasks[0])
    ewc.consolidate()
    train(model, optimizer, tasks[1][:2])
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    twin = mlp()
    twin_ewc, twin_optimizer = run(twin, 1)
    twin.load_state_dict(saved[0])
    twin_optimizer.load_state_dict(saved[1])
    for each, wrapper, state in ((model, optimizer, ewc), (twin, twin_optimizer, twin_ewc)):
        train(each, wrapper, tasks[1][2:])
        state.consolidate()
    assert same(twin_optimizer.state_dict(), optimizer.state_dict())


def test_a_copy_goes_its_own_way():
    model = mlp()
    ewc = EWC(model, ewc_lambda=1.0, importance="si")
    optimizer = EWCOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), ewc)
    data = batch(model)

    def step(model, optimizer):
        optimizer.zero_grad()
        loss(model, data).backward()
        optimizer.step()

    step(model, optimizer)
    twin_model, twin = copy.deepcopy((model, optimizer))
    before = copy.deepcopy(twin.state_dict())
    step(model, optimizer)
    assert same(twin.state_dict(), before)
    step(twin_model, twin)
    assert same(twin.state_dict(), optimizer.state_dict())


def test_a_head_that_grows_keeps_the_path_of_its_old_rows():
    torch.manual_seed(0)
    model = nn.Linear(FEATURES, 2).double()
    ewc = EWC(model, ewc_lambda=1.0, importance="si")
    x = torch.randn(8, FEATURES, dtype=torch.float64)

    def step():
        optimizer = EWCOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), ewc)
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.zeros(8, dtype=torch.long)).backward()
        optimizer.step()

    step()
    old = copy.deepcopy(ewc.state_dict())
    more = torch.randn(1, FEATURES, dtype=torch.float64)
    model.weight = nn.Parameter(torch.cat([model.weight.detach(), more]))
    model.bias = nn.Parameter(torch.cat([model.bias.detach(), more[0, :1]]))
    ewc.track(model)
    new = ewc.state_dict()
    assert torch.equal(new["omega"]["weight"][:2], old["omega"]["weight"])
    assert torch.equal(new["start"]["weight"][:2], old["start"]["weight"])
    assert torch.equal(new["start"]["weight"][2:], more)
    assert not new["omega"]["weight"][2:].any()
    step()
    ewc.consolidate()
    assert ewc.fisher["weight"].shape == (3, FEATURES)


def test_frozen_parameters_and_those_without_gradient_have_no_path():
    model = mlp()
    model[0].weight.requires_grad_(False)
    ewc = EWC(model, ewc_lambda=1.0, importance="si")
    optimizer = EWCOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), ewc)
    model[-1].bias.sum().backward()
    optimizer.step()
    assert ewc.state_dict()["omega"].keys() == {"4.bias"}
    ewc.consolidate()
    assert not ewc.fisher["0.weight"].any()
    assert not ewc.fisher["2.weight"].any()
    assert ewc.fisher["4.bias"].all()


def test_it_needs_steps_of_the_wrapper():
    model = mlp()
    ewc = EWC(model, ewc_lambda=1.0, importance="si")
    with pytest.raises(
        ValueError, match=r"no step was taken since.*EWCOptimizer\(optimizer, ewc\)"
    ):
        ewc.consolidate()
    optimizer = EWCOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), ewc)
    loss(model, batch(model)).backward()
    optimizer.step()
    for xi, message in ((0.0, "xi: expected a number > 0"), (-1.0, "xi: expected a number >= 0")):
        with pytest.raises(ValueError, match=message):
            ewc.consolidate(xi=xi)
    assert ewc.tasks == 0
    ewc.consolidate(xi=1e-3)
    with pytest.raises(ValueError, match="no step was taken since the last task"):
        ewc.consolidate()


def test_optimizers_that_share_an_ewc_accumulate_each_its_own():
    torch.manual_seed(0)
    model = mlp().double()
    ewc = EWC(model, ewc_lambda=1.0, importance="si")
    first, *others = model.parameters()
    optimizers = [
        EWCOptimizer(torch.optim.SGD([first], lr=0.1), ewc),
        EWCOptimizer(torch.optim.Adam(others, lr=1e-2), ewc),
    ]
    expected = ByDefinition(model)
    for _ in range(5):
        data, before = batch(model), expected.now()
        gradients = task_gradients(model, data)
        model.zero_grad()
        loss(model, data).backward()
        for optimizer in optimizers:
            optimizer.step()
        expected.add(gradients, before)
    ewc.consolidate()
    expected.end_task()
    assert close(ewc.fisher, expected.total, torch.float64)


def test_parameters_by_name_are_enough():
    model = mlp()
    ewc = EWC(model.named_parameters(), ewc_lambda=1.0, importance="si")
    optimizer = EWCOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), ewc)
    loss(model, batch(model)).backward()
    optimizer.step()
    ewc.consolidate()
    assert ewc.tasks == 1


def test_sparse_gradients_are_refused_by_name():
    model = nn.Embedding(5, 3, sparse=True)
    ewc = EWC(model, ewc_lambda=1.0, importance="si")
    optimizer = EWCOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), ewc)
    before = model.weight.detach().clone()
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"gradient of parameter 'weight': expected a dense tensor"):
        optimizer.step()
    assert torch.equal(model.weight, before)


def test_paths_can_be_part_of_a_compiled_step():
    def omegas(compiled):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(5)) for _ in range(3)]
        pairs = [(str(n), p) for n, p in enumerate(params)]
        ewc = EWC(pairs, ewc_lambda=1.0, importance="si")
        path = ewc.path_of(params)

        def step():
            path.begin()
            with torch.no_grad():
                for p in params:
                    p.sub_(0.1 * p.grad)
            path.end()

        if compiled:
            step = torch.compile(step, fullgraph=True, backend="aot_eager")
        for _ in range(4):
            for p in params:
                p.grad = torch.randn(5)
            step()
        return ewc.state_dict()["omega"]

    found, expected = omegas(True), omegas(False)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-6, atol=0)

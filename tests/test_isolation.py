"""Measuring a Fisher leaves the model, and everything else, as it was."""

from __future__ import annotations

import pytest
import torch
from models import CLASSES, Net, each_model, features, linear, mlp
from training import all_of, same

from ewc_fast import fisher_diagonal

pytestmark = pytest.mark.usefixtures("one_thread")


def world(model):
    return all_of(model), torch.get_rng_state()


def some_batches(*sizes):
    return [(features(n), torch.randint(CLASSES, (n,))) for n in sizes or (8, 5, 1)]


@each_model()
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_the_model_comes_back_as_it_was(case, training):
    model, data = case.make().train(training), case.data(4, 3)
    for index, param in enumerate(model.parameters()):
        if index % 2:
            param.grad = torch.randn_like(param)
    before = world(model)
    for estimator in ("exact", "sampled", "empirical"):
        fisher_diagonal(model, data, estimator=estimator)
        assert same(world(model), before)


def test_modes_come_back_module_by_module():
    model = mlp()
    model[1].eval()
    fisher_diagonal(model, some_batches())
    assert [m.training for m in model] == [True, False, True, True, True]


@pytest.mark.parametrize("how", ["in_place", "replaced"])
def test_buffers_that_the_forward_pass_writes_come_back(how):
    def forward(m, x):
        if how == "in_place":
            m.calls.add_(1)
        else:
            m.calls = m.calls + 1
        return m.head(x)

    model = Net(forward, head=linear(outputs=CLASSES))
    model.register_buffer("calls", torch.zeros(()))
    data = some_batches()
    before = world(model)
    fisher_diagonal(model, data)
    assert same(world(model), before)


@pytest.mark.parametrize("culprit", ["data", "model"])
def test_the_model_comes_back_as_it_was_when_something_raises(culprit):
    def forward(m, x):
        m.calls.add_(1)
        if culprit == "model" and m.calls > 3:
            raise ArithmeticError
        return m.head(x)

    data = some_batches(4, 4)

    def batches():
        yield from data
        raise ArithmeticError

    model = Net(forward, head=linear(outputs=CLASSES))
    model.register_buffer("calls", torch.zeros(()))
    before = world(model)
    with pytest.raises(ArithmeticError):
        fisher_diagonal(model, batches())
    assert same(world(model), before)

"""What a run costs, what it leaves behind, and what its sums lose."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.utils.checkpoint
from models import CLASSES, FEATURES, Net, each_model, features, head, mlp, sequences
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training import same

from ewc_fast import fisher_diagonal
from ewc_fast.fisher import passes
from ewc_fast.fisher.recorder import recorder
from ewc_fast.fisher.recorder.per_sample import Dense, Outer

pytestmark = pytest.mark.usefixtures("one_thread")


def batches(*sizes, inputs=features):
    return [(inputs(n), torch.randint(CLASSES, (n,))) for n in sizes]


@pytest.fixture
def sizes():
    """A model, and the sizes of the batches it is called on."""
    model, sizes = mlp(), []
    model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    return model, sizes


TRIAL = [3, 1, 1, 1]  # three samples together, and each of them alone


@pytest.mark.parametrize("estimator", ["exact", "sampled", "rademacher", "empirical"])
def test_the_model_runs_once_a_batch_and_on_few_samples_of_the_first(estimator, sizes):
    model, called = sizes
    fisher_diagonal(model, batches(8, 5, 3), estimator=estimator)
    assert called == [*TRIAL, 8, 5, 3]


def test_without_verification_no_single_sample_is_run_and_the_result_is_the_same(sizes):
    model, called = sizes
    data = batches(8, 5, 3)
    found = fisher_diagonal(model, data, verify=False)
    assert called == [3, 8, 5, 3]
    assert same(found, fisher_diagonal(model, data))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((1, 1), [1, 1]),
        ((1, 8, 5), [1, *TRIAL, 8, 5]),
        ((2, 8), [2, 1, 1, 2, 8]),
        ((8, 1), [*TRIAL, 8, 1]),
    ],
    ids=str,
)
def test_batches_of_one_sample_need_no_trial(given, expected, sizes):
    model, called = sizes
    fisher_diagonal(model, batches(*given))
    assert called == expected


def test_the_square_of_a_batchs_gradient_needs_no_trial(sizes):
    model, called = sizes
    fisher_diagonal(model, batches(8, 5), estimator="batched")
    assert called == [8, 5]


def test_a_parameter_that_takes_the_slow_way_costs_one_call_a_sample(sizes, monkeypatch):
    model, called = sizes
    monkeypatch.setattr(recorder, "by_rule", lambda use: None)
    monkeypatch.setattr(
        recorder, "by_its_own_backward", lambda use: Dense(torch.zeros(3, *use.shape))
    )
    data = batches(4, 2)
    found = fisher_diagonal(model, data)
    assert len(found.report.slow) == 6
    assert called[:4] == TRIAL
    assert called[4:] == [4, 1, 1, 1, 1, 2, 1, 1]


def test_graphs_of_their_own_are_recorded_in_one_call_a_batch(sizes):
    """Of a graph that a batch's first samples don't have, these are tried once."""
    model, called = sizes
    net = Net(lambda m, x: m.net(x if len(x) < 4 else x.flip(1).flip(1)), net=model)
    found = fisher_diagonal(net, batches(8, 5, 3, 9))
    assert not found.report.slow
    assert called == [*TRIAL, 8, 5, 3, 9]


def test_exact_needs_one_product_a_layer_for_all_classes(monkeypatch):
    products, real = [], Outer._add
    monkeypatch.setattr(Outer, "_add", lambda *args: (products.append(1), real(*args)))
    fisher_diagonal(mlp(), batches(8, 8))
    trial, layers = 1, 3
    assert len(products) == (trial + 2) * layers


class Produced(TorchDispatchMode):
    """Notes the shapes of all tensors that operations allocate."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.untyped_storage().data_ptr() not in given
            ):
                self.shapes.append(tuple(tensor.shape))
        return result


def test_linear_networks_form_no_per_sample_gradient_and_no_weight_gradient():
    n, model = 64, nn.Sequential(nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, CLASSES))
    data = [(torch.randn(n, 50), torch.randint(CLASSES, (n,))) for _ in range(3)]

    def seen():
        with Produced() as produced:
            yield data[0]
            produced.shapes.clear()  # the first batch was tried, on single samples too
            yield from data[1:]
        shapes.extend(produced.shapes)

    shapes = []
    fisher_diagonal(model, seen())
    assert (n, 40) in shapes  # it did watch
    assert max(torch.Size(shape).numel() for shape in shapes) <= n * 50
    assert (40, 50) not in shapes
    assert (CLASSES, 40) not in shapes


@each_model("compiled", "compiled_layer")
def test_results_repeat_bit_for_bit(case):
    model, data = case.make(), case.data(8, 3)
    assert same(fisher_diagonal(model, data), fisher_diagonal(model, data))


# Recurrent layers are run step by step, in another order of operations.
@each_model("lstm", "dropout_in_training_mode", "compiled", "compiled_layer")
def test_the_forward_pass_is_bit_for_bit_the_usual_one(case):
    model, data = case.make().eval(), case.data(6)
    seen = []
    handle = model.register_forward_hook(lambda module, inputs, output: seen.append(output))
    fisher_diagonal(model, data)
    handle.remove()
    (x, _), whole = data[0], seen[-1]
    usual = model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)
    assert torch.equal(getattr(whole, "logits", whole), getattr(usual, "logits", usual))


class Fails(nn.Module):
    """Runs so many times, and then raises."""

    def __init__(self, times):
        super().__init__()
        self.times, self.body, self.head = times, nn.LSTM(FEATURES, 6, batch_first=True), head()

    def forward(self, x):
        self.times -= 1
        if self.times < 0:
            raise KeyError("on purpose")
        return self.head(self.body(x)[0][:, -1])


def settings():
    return (
        torch._C._get_mkldnn_enabled(),
        torch._C._get_cudnn_enabled(),
        torch.utils.checkpoint._checkpoint_hook,
        torch.utils.checkpoint.CheckpointFunction,
        torch._dynamo.eval_frame._stance.stance,
        len(torch.overrides._get_current_function_mode_stack()),
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("times", [0, 1, 2, 4, 5, 100])
def test_settings_are_as_before_also_after_an_exception(times):
    model, before = Fails(times), settings()
    data = batches(4, 3, inputs=sequences)
    if times < 100:
        with pytest.raises(KeyError, match="on purpose"):
            fisher_diagonal(model, data)
    else:
        fisher_diagonal(model, data)
    assert settings() == before


def test_settings_are_as_before_when_a_recurrent_layer_refuses_its_inputs():
    before = settings()
    with pytest.raises((ValueError, RuntimeError)):
        fisher_diagonal(Fails(100), [(torch.randn(4, 2, FEATURES + 1), torch.zeros(4).long())])
    assert settings() == before


@pytest.mark.parametrize("fails", [False, True], ids=["after_a_run", "after_an_exception"])
def test_nothing_is_watched_afterwards(fails, monkeypatch):
    """A graph that the user keeps has no hooks left, and gradients arrive as usual."""
    calls, kept, model, data = [], [], mlp(), batches(6)
    model.register_forward_hook(lambda module, inputs, output: kept.append(output))
    real = recorder.Recorder._arrive

    def arrive(self, at, grads):
        calls.append(at)
        if fails and len(kept) > len(TRIAL):
            raise KeyError("on purpose")
        return real(self, at, grads)

    monkeypatch.setattr(recorder.Recorder, "_arrive", arrive)
    run = lambda: fisher_diagonal(model, data, estimator="empirical")  # noqa: E731
    if fails:
        with pytest.raises(KeyError, match="on purpose"):
            run()
    else:
        run()
    calls.clear()
    model(data[0][0]).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    if fails:  # the graph was not freed
        kept[len(TRIAL)].sum().backward()
    assert not calls


def test_no_graph_is_kept_alive():
    model, data, kept = mlp(), batches(6, 5), []
    model.register_forward_hook(lambda module, inputs, output: kept.append(weakref.ref(output)))
    found = fisher_diagonal(model, data)
    gc.collect()
    assert len(kept) == len(TRIAL) + 2
    assert all(output() is None for output in kept)
    assert len(found) == 6


@pytest.mark.parametrize("estimator", ["exact", "sampled", "rademacher", "empirical"])
@each_model()
def test_large_batches_run_in_parts_and_give_the_same_result(case, estimator, monkeypatch):
    model, data = case.make(), case.data(37)
    whole = fisher_diagonal(model, data, estimator=estimator)
    monkeypatch.setattr(passes, "LARGE", 1)
    monkeypatch.setattr(passes, "PART", 1)
    parts = fisher_diagonal(model, data, estimator=estimator)
    half = any(param.dtype == torch.bfloat16 for param in model.parameters())
    for name, expected in whole.items():
        # other sums in other orders, and in products of other sizes
        budget = (16 * 2**-8 if half else 1e-5) * expected.max() if expected.numel() else 0
        assert ((parts[name] - expected).abs() <= budget).all(), name


@pytest.mark.parametrize(
    ("samples", "kilobytes", "expected"),
    [(128, 128, 4), (127, 128, 1), (256, 128, 8), (40, 1024, 2), (20, 1024, 1), (4, 2**20, 1)],
)
def test_parts_hold_sixteen_samples_or_more_and_begin_at_16_mebibytes(samples, kilobytes, expected):
    parts = passes.parts_of(samples, kilobytes * 1024)
    assert parts == expected
    assert parts == 1 or samples // parts >= 16


def test_a_batch_in_parts_runs_the_model_on_each_sample_once(sizes, monkeypatch):
    monkeypatch.setattr(passes, "LARGE", 1)
    monkeypatch.setattr(passes, "PART", 1)
    model, called = sizes
    fisher_diagonal(model, batches(50, 20))
    assert called == [*TRIAL, 16, 17, 17, 20]

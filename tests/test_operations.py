"""Whatever operation a parameter enters: the Fisher is the definition, and it was recorded."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import on_every_device
from layers import LAYERS, PACKED
from models import FEATURES, POSITIONS, each_model, sequences
from operations import (
    CALLED_FOR_EACH_SAMPLE,
    CONVOLUTIONS,
    OUT,
    OWN_BACKWARD,
    PRODUCTS,
    RULE,
    SAMPLE_BY_SAMPLE,
    TABLES,
    WAYS,
    WORDS,
    B,
    W,
    layer,
    of,
    repeated_tokens,
)
from torch import Tensor, nn

from ewc_fast import fisher_diagonal
from ewc_fast.fisher.recorder import recorder
from ewc_fast.fisher.recorder.rules import own_backward

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

COMPLEX = {
    "product_of_spectra": of(
        lambda m, x: torch.view_as_real(torch.fft.rfft(x) * torch.view_as_complex(m.w)),
        w=(FEATURES // 2 + 1, 2),
    ),
    "mixing_of_spectra": of(
        lambda m, x: torch.fft.irfft(
            torch.einsum("nti,tsi->nsi", torch.fft.rfft(x), torch.view_as_complex(m.w))),
        inputs=sequences, w=(POSITIONS, 2, FEATURES // 2 + 1, 2),
    ),
    "scaled_spectrum": of(
        lambda m, x: torch.fft.irfft(torch.fft.rfft(x) * m.w), w=(FEATURES // 2 + 1,)
    ),
    "polar": of(lambda m, x: torch.polar(x.exp(), m.w.expand_as(x)).real, w=(FEATURES,)),
}  # fmt: skip


def hooked(scale: Callable[[Tensor], Tensor]) -> nn.Linear:
    body = nn.Linear(FEATURES, OUT)
    body.register_forward_hook(lambda module, inputs, output: scale(output))
    body.register_forward_pre_hook(lambda module, inputs: (inputs[0].flip(-1),))
    return body


OTHERS = {
    "hooks_that_change_inputs_and_outputs": layer(lambda: hooked(lambda y: y.relu() * 3)),
    "hook_that_replaces_outputs_in_place": layer(lambda: hooked(lambda y: y.mul_(2))),
    "in_place_activation": layer(lambda: nn.Sequential(nn.Linear(FEATURES, OUT),
                                                       nn.ReLU(inplace=True))),
    "matmul_in_float64": of(
        lambda m, x: (x.double() @ m.w.double()).to(m.w.dtype), w=(FEATURES, OUT)
    ),
    "mul_in_float64": of(lambda m, x: (x.double() * m.w).to(m.w.dtype), w=(FEATURES,)),
    "layer_norm_in_float64": of(
        lambda m, x: F.layer_norm(x.double(), (FEATURES,), m.w.double()).to(m.w.dtype),
        w=(FEATURES,),
    ),
    "convolution_in_float64": of(
        lambda m, x: F.conv1d(x.double(), m.w.double()).to(m.w.dtype), inputs=sequences,
        w=(3, POSITIONS, 2),
    ),
    "embedding_in_float64": of(
        lambda m, x: F.embedding(x, m.w.double()).to(m.w.dtype),
        inputs=lambda n: torch.randint(8, (n, POSITIONS)), w=(8, 3),
    ),
    "detached_inputs": of(lambda m, x: F.linear(x.detach(), m.w), w=(OUT, FEATURES)),
}  # fmt: skip

OPERATIONS = PRODUCTS | CONVOLUTIONS | TABLES | LAYERS | OTHERS


@pytest.fixture
def ways(monkeypatch):
    """The ways taken with the gradients of parameters, as they are taken."""
    taken = [RULE]

    def noted(module, name, way):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda use: (taken.append(way), real(use))[1])

    noted(recorder, "by_its_own_backward", OWN_BACKWARD)
    noted(own_backward, "one_by_one", SAMPLE_BY_SAMPLE)
    return taken


@on_every_device
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_fisher_is_the_definition_and_every_parameter_is_recorded(name, ways):
    operation = OPERATIONS[name]
    model, data = operation.model(), operation.data(4, 3)
    found = fisher_diagonal(model, data)
    oracle.assert_fisher(found, model, data)
    assert not found.report.slow
    slowest = max(ways, key=WAYS.index)
    assert WAYS.index(slowest) <= WAYS.index(operation.way), slowest


@each_model()
def test_every_parameter_of_the_models_of_the_tests_is_recorded(case):
    model = case.make()
    assert not fisher_diagonal(model, case.data(5, 4)).report.slow


@pytest.mark.parametrize("name", CALLED_FOR_EACH_SAMPLE)
def test_operations_called_for_each_sample_are_recorded_in_batches_of_one_size(name):
    operation = CALLED_FOR_EACH_SAMPLE[name]
    model, data = operation.model(), operation.data(3, 3)
    found = fisher_diagonal(model, data)
    oracle.assert_fisher(found, model, data)
    assert not found.report.slow


@pytest.mark.parametrize("name", CALLED_FOR_EACH_SAMPLE)
def test_operations_called_for_each_sample_are_right_in_batches_of_other_sizes(name):
    operation = CALLED_FOR_EACH_SAMPLE[name]
    model, data = operation.model(), operation.data(4, 2)
    found = fisher_diagonal(model, data)
    oracle.assert_fisher(found, model, data)


@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences_are_right_and_recorded(name):
    operation = PACKED[name]
    model, data = operation.model(), operation.data(4, 3)
    found = fisher_diagonal(model, data)
    oracle.assert_fisher(found, model, data)
    assert not found.report.slow


@pytest.mark.parametrize("name", COMPLEX)
def test_parameters_of_complex_operations_are_right(name):
    operation = COMPLEX[name]
    model, data = operation.model(), operation.data(4, 3)
    oracle.assert_fisher(fisher_diagonal(model, data), model, data)


def test_gradients_scaled_by_frequency_in_the_batch_take_the_slow_way():
    """A sample's own gradient is scaled by the frequency in that sample."""
    operation = layer(lambda: nn.Embedding(WORDS, OUT, scale_grad_by_freq=True), repeated_tokens)
    model, data = operation.model(), operation.data(4, 3)
    found = fisher_diagonal(model, data)
    oracle.assert_fisher(found, model, data)
    assert found.report.slow.keys() == {"body.weight"}


BIAS_AND_SELECTION = {
    "linear_with_one_bias_for_all": of(lambda m, x: F.linear(x, m.w, m.b), w=W, b=(1,)),
    "addmm_with_one_bias_for_all": of(lambda m, x: torch.addmm(m.b, x, m.w.t()), w=W, b=(1,)),
    "rows_selected_by_keywords": of(
        lambda m, x: torch.index_select(
            input=F.linear(x, m.w, m.b), dim=0, index=torch.arange(len(x))
        ),
        w=W, b=B,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BIAS_AND_SELECTION)
@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_unusual_biases_and_calls_are_right(name, estimator):
    operation = BIAS_AND_SELECTION[name]
    model, data = operation.model(), operation.data(4, 3)
    found = fisher_diagonal(model, data, estimator=estimator)
    oracle.assert_fisher(found, model, data, estimator=estimator)
    assert not found.report.slow

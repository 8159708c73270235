"""Recurrent layers as the recorder runs them are torch's own, and their Fisher the definition."""

from __future__ import annotations

import copy
import itertools

import oracle
import pytest
import torch
from models import Net
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence

from ewc_fast import fisher_diagonal
from ewc_fast.fisher.recorder.watch import Watch

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")

CLASSES, FEATURES, WIDTH, STEPS = 3, 4, 3, 4
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "tanh": nn.RNN, "relu": nn.RNN}
each_kind = pytest.mark.parametrize("kind", KINDS)


def layers(kind, features=FEATURES, width=WIDTH, **options):
    if kind == "relu":
        options["nonlinearity"] = "relu"
    return KINDS[kind](features, width, **options)


def states_of(rnn, samples):
    """One random state for each of a layer's: a tensor, or two of them for an LSTM."""
    number = rnn.num_layers * (2 if rnn.bidirectional else 1)
    of_input = {"dtype": rnn.weight_ih_l0.dtype, "requires_grad": True}
    made = [
        torch.randn(number, samples, rnn.proj_size or rnn.hidden_size, **of_input),
        torch.randn(number, samples, rnn.hidden_size, **of_input),
    ]
    return made if isinstance(rnn, nn.LSTM) else made[:1]


def run(rnn, x, states):
    given = None if not states else states[0] if len(states) == 1 else tuple(states)
    out, last = rnn(x, given)
    return [out, *(last if isinstance(last, tuple) else [last])]


def assert_torchs(rnn, x, states=(), of=(0, 1, 2), tolerance=1e-12):
    """Assert that outputs and all gradients of some of them are those of torch's own."""
    results = run(rnn, x, states)
    with Watch():
        found = run(rnn, x, states)
    vectors = [torch.randn_like(result) for result in results]
    sources = [x, *states, *rnn.parameters()]
    sources = [source for source in sources if source.requires_grad]
    pairs = [zip(results, found, strict=True)]
    chosen = [at for at in of if at < len(results)]
    for _ in range(2):  # a graph that is kept is left as it was
        grads = [
            torch.autograd.grad([r[at] for at in chosen], sources, [vectors[at] for at in chosen],
                                retain_graph=True, allow_unused=True)
            for r in (results, found)
        ]  # fmt: skip
        pairs.append(zip(*grads, strict=True))
    for expected, ours in itertools.chain(*pairs):
        if expected is None or ours is None:
            assert all(g is None or not g.any() for g in (expected, ours))
            continue
        assert ours.dtype == expected.dtype
        assert ours.shape == expected.shape
        slack = tolerance * max(1.0, expected.abs().max().item())
        assert (ours - expected).abs().max().item() <= slack


@each_kind
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_outputs_and_gradients_are_torchs(kind, number, bidirectional, batch_first, bias, given):
    rnn = layers(kind, num_layers=number, bidirectional=bidirectional,
                 batch_first=batch_first, bias=bias).double()  # fmt: skip
    shape = (5, STEPS, FEATURES) if batch_first else (STEPS, 5, FEATURES)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert_torchs(rnn, x, states_of(rnn, 5) if given else ())


@each_kind
@pytest.mark.parametrize("of", [(0,), (1,), (0, 1), (2,)])
def test_gradients_of_some_of_the_outputs(kind, of):
    rnn = layers(kind, num_layers=2, bidirectional=True).double()
    x = torch.randn(STEPS, 5, FEATURES, dtype=torch.float64, requires_grad=True)
    if kind == "lstm" or of != (2,):
        assert_torchs(rnn, x, states_of(rnn, 5), of)


@each_kind
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4e-6), (torch.bfloat16, 0.1)])
def test_other_dtypes(kind, dtype, tolerance):
    rnn = layers(kind, num_layers=2, bidirectional=True).to(dtype)
    x = torch.randn(STEPS, 5, FEATURES, dtype=dtype, requires_grad=True)
    assert_torchs(rnn, x, states_of(rnn, 5), tolerance=tolerance)


@each_kind
@pytest.mark.parametrize("shape", [(1, 5, FEATURES), (STEPS, 1, FEATURES), (STEPS, FEATURES)])
def test_one_step_one_sample_and_no_dimension_of_samples(kind, shape):
    rnn = layers(kind).double()
    assert_torchs(rnn, torch.randn(shape, dtype=torch.float64, requires_grad=True))


@each_kind
def test_one_feature_and_one_unit(kind):
    rnn = layers(kind, 1, 1, bidirectional=True).double()
    assert_torchs(rnn, torch.randn(STEPS, 5, 1, dtype=torch.float64), states_of(rnn, 5))


def test_projections_are_torchs():
    rnn = nn.LSTM(FEATURES, WIDTH, proj_size=2, num_layers=2).double()
    x = torch.randn(STEPS, 5, FEATURES, dtype=torch.float64, requires_grad=True)
    assert_torchs(rnn, x, states_of(rnn, 5))


def test_the_graph_has_a_few_nodes_for_any_number_of_steps():
    rnn, nodes = nn.LSTM(FEATURES, WIDTH), set()
    with Watch():
        stack = [rnn(torch.randn(100, 2, FEATURES))[0].grad_fn]
    while stack:
        nodes.add(node := stack.pop())
        stack += [after for after, _ in node.next_functions if after is not None]
    assert len(nodes) < 10


def test_outputs_may_be_changed_in_place():
    rnn, results = nn.GRU(FEATURES, WIDTH), []
    x = torch.randn(STEPS, 5, FEATURES)
    for change in (torch.relu, torch.relu_):
        with Watch():
            out, _ = rnn(x)
        results.append(torch.autograd.grad(change(out).sum(), rnn.weight_hh_l0)[0])
    assert torch.equal(*results)


# The Fisher


def data(*sizes, steps=STEPS, batch_first=True):
    return [
        (torch.randn((n, steps, FEATURES) if batch_first else (steps, n, FEATURES)),
         torch.randint(CLASSES, (n,)))
        for n in sizes or (4, 3)
    ]  # fmt: skip


def last_output(m, x):
    return m.head(m.rnn(x)[0][:, -1])


def mean_output(m, x):
    return m.head(m.rnn(x)[0].mean(1))


def model(rnn, forward=mean_output, **parts):
    number = 2 if rnn.bidirectional else 1
    head = nn.Linear((rnn.proj_size or rnn.hidden_size) * number, CLASSES)
    return Net(forward, rnn=rnn, head=head, **parts)


def assert_all_recorded(net, batches, estimator="empirical"):
    before = copy.deepcopy(net)  # a layer keeps computed weights, which can't be copied
    found = fisher_diagonal(net, batches, estimator=estimator)
    assert not found.report.slow
    oracle.assert_fisher(found, before, batches, estimator=estimator)


@each_kind
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_fisher_of_each_kind(kind, number, bidirectional, bias):
    rnn = layers(kind, num_layers=number, bidirectional=bidirectional, bias=bias, batch_first=True)
    assert_all_recorded(model(rnn), data())


@each_kind
@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_fisher_with_time_in_front(kind, estimator):
    def forward(m, x):  # samples are first in the data, as they must be
        return m.head(m.rnn(x.transpose(0, 1))[0][-1])

    assert_all_recorded(model(layers(kind), forward), data(), estimator)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_fisher_in_other_dtypes(dtype):
    net = model(nn.LSTM(FEATURES, WIDTH, batch_first=True)).to(dtype)
    assert_all_recorded(net, [(x.to(dtype), y) for x, y in data()])


@each_kind
def test_learned_initial_states(kind):
    rnn = layers(kind, num_layers=2, batch_first=True)

    def forward(m, x):
        states = [m.h.expand(-1, len(x), -1), m.c.expand(-1, len(x), -1)]
        return m.head(run(m.rnn, x, states if kind == "lstm" else states[:1])[0].mean(1))

    first = {name: nn.Parameter(torch.randn(2, 1, WIDTH)) for name in "hc"}
    net = model(rnn, forward, **first)
    net.c.requires_grad_(kind == "lstm")
    assert_all_recorded(net, data())


@pytest.mark.parametrize("frozen", [["weight_hh"], ["bias_hh"], ["hh"], ["ih"], ["weight"]])
def test_frozen_weights_are_no_obstacle(frozen):
    net = model(nn.LSTM(FEATURES, WIDTH, num_layers=2, batch_first=True))
    for name, param in net.rnn.named_parameters():
        param.requires_grad_(not any(part in name for part in frozen))
    assert_all_recorded(net, data())


@each_kind
def test_computed_weights(kind):
    rnn = weight_norm(layers(kind, batch_first=True), "weight_hh_l0")
    assert_all_recorded(model(rnn), data())


def test_one_layer_run_twice():
    def forward(m, x):
        again = m.rnn(m.rnn(x)[0])[0]
        return m.head(again[:, -1])

    assert_all_recorded(model(nn.GRU(FEATURES, FEATURES, batch_first=True), forward), data())


def test_layers_with_the_same_weights():
    net = model(nn.LSTM(FEATURES, FEATURES, num_layers=2, batch_first=True))
    net.rnn.weight_hh_l1 = net.rnn.weight_hh_l0
    net.rnn.bias_ih_l1 = net.rnn.bias_ih_l0
    assert_all_recorded(net, data())


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("lengths", [(3, 1, 6), (1, 5), (2, 3)])
def test_sequences_of_other_lengths(batch_first, lengths):
    def forward(m, x):
        out = m.rnn(x if batch_first else x.transpose(0, 1))[0]
        return m.head(out[:, -1] if batch_first else out[-1])

    batches = [batch for steps in lengths for batch in data(3, steps=steps)]
    assert_all_recorded(model(nn.LSTM(FEATURES, WIDTH, batch_first=batch_first), forward), batches)


def test_the_last_states_alone():
    def forward(m, x):
        _, (h, c) = m.rnn(x)
        return m.head(h[-1] + c[-1])

    net = model(nn.LSTM(FEATURES, WIDTH, num_layers=2, batch_first=True), forward)
    assert_all_recorded(net, data())


def test_gradients_of_whole_batches():
    net, batches = model(nn.GRU(FEATURES, WIDTH, batch_first=True)), data(4, 1, 3)
    found = fisher_diagonal(net, batches, estimator="batched")
    expected = {name: torch.zeros_like(param) for name, param in net.named_parameters()}
    for x, y in batches:
        copied = copy.deepcopy(net)
        nn.functional.cross_entropy(copied(x), y).backward()
        for name, param in copied.named_parameters():
            expected[name] += param.grad.square() / len(batches)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-7)


def test_packed_sequences_whose_steps_have_other_numbers_of_samples_in_each_batch():
    def packed(m, x, lengths):
        together = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return m.head(m.rnn(together)[1][-1])

    lengths = iter([torch.tensor([2, STEPS, 3, 1]), torch.tensor([1, 3, STEPS])])
    batches = [((x, next(lengths)), y) for x, y in data()]
    net = model(nn.GRU(FEATURES, WIDTH), packed)
    found = fisher_diagonal(net, batches, estimator="empirical")
    oracle.assert_fisher(found, net, batches, estimator="empirical")


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("options", [{"proj_size": 2}, {"dropout": 0.5, "num_layers": 2}])
def test_projections_and_dropout(options):
    net = model(nn.LSTM(FEATURES, WIDTH, batch_first=True, **options)).train()
    assert_all_recorded(net, data())

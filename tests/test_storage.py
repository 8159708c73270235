"""A state in less memory pulls as its decoded values say, survives, grows, and does not drift."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from models import CLASSES, FEATURES, mlp
from numerics import assert_within, gradient_budget, value_budget
from torch import nn
from training import batch, gradients, loss, same, shift

from ewc_fast import EWC, EWCOptimizer, _piecewise, reference
from ewc_fast.formats import decode_e5m3

LESS = ["bfloat16", "e5m3", "float32@cpu", "bfloat16@cpu", "e5m3@cpu"]
STORAGES = ["float32", *LESS]
# relative errors: of one rounding to nearest, and of one by chance
NEAREST = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "e5m3": 1 / 17}
BY_CHANCE = {"float32": 2.0**-24, "bfloat16": 2.0**-7, "e5m3": 1 / 8}


def kept_as(storage):
    return storage.removesuffix("@cpu")


def wide(features=40):
    """A model with rows of several blocks, and one of none."""
    return nn.Sequential(
        nn.Linear(FEATURES, features), nn.Tanh(), nn.Linear(features, CLASSES, bias=False)
    )


def trained(storage, make=wide, **options):
    model = make()
    ewc = EWC(model, ewc_lambda=30.0, storage=storage, **options)
    for seed in (1, 2):
        torch.manual_seed(seed)
        ewc.consolidate_from(random_fisher(model))
        shift(model)
    return model, ewc


def random_fisher(model, sigma=2.0):
    return {n: torch.exp(sigma * torch.randn(p.shape)) for n, p in model.named_parameters()}


def decoded_lists(model, ewc):
    names = list(ewc.fisher)
    params = dict(model.named_parameters())
    return (
        [params[n] for n in names],
        [ewc.fisher[n].to(params[n].device, ewc.anchor[n].dtype) for n in names],
        [ewc.anchor[n].to(params[n].device) for n in names],
    )


@pytest.fixture(params=[1 << 21, 256], ids=["one_piece", "pieces_of_a_block"])
def pieces(request, monkeypatch):
    monkeypatch.setattr(_piecewise, "PIECE", request.param)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.usefixtures("pieces", "device")
def test_every_way_to_apply_it_equals_the_decoded_reference(storage, dtype, impl):
    model, ewc = trained(storage, lambda: wide(100).to(dtype), impl=impl)
    lists = decoded_lists(model, ewc)
    exact = reference.penalty(*[[t.double() for t in ts] for ts in lists], ewc_lambda=30.0)
    pulls = [
        30.0 * f.double() * (p.detach().double() - a.double())
        for p, f, a in zip(*lists, strict=True)
    ]
    value = ewc.penalty()
    total = exact.item() + ewc.constant_penalty
    # the sum is exact to the lanes' rounding; its dtype rounds it once more
    assert abs(value.item() - total) <= value_budget(total, dtype) + 2.0**-24 * total
    value.backward()
    for param, pull in zip(lists[0], pulls, strict=True):
        budget = 2 * gradient_budget(torch.zeros_like(pull), pull, dtype)
        assert_within(param.grad, pull, budget, "backward")
    before = [torch.randn_like(p) for p in lists[0]]
    for param, grad in zip(lists[0], before, strict=True):
        param.grad = grad.clone()
    assert abs(ewc.add_penalty_grad_().item() - total) <= value_budget(total, dtype)
    for param, grad, pull in zip(lists[0], before, pulls, strict=True):
        exact_sum = grad.double() + pull
        assert_within(param.grad, exact_sum, gradient_budget(grad.double(), pull, dtype), "added")


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("storage", LESS)
@pytest.mark.usefixtures("pieces", "device")
def test_the_optimizer_takes_the_steps_of_a_float32_state_of_the_same_values(storage, mode):
    model, ewc = trained(storage)
    plain = copy.deepcopy(model)
    twin = EWC(plain, ewc_lambda=30.0)
    twin.load_state_dict(ewc.state_dict())
    assert all(
        torch.equal(twin.fisher[name], values.float()) for name, values in ewc.fisher.items()
    )
    data = [batch(model) for _ in range(5)]
    for one, its in ((model, ewc), (plain, twin)):
        optimizer = EWCOptimizer(torch.optim.SGD(one.parameters(), lr=1e-4), its, mode=mode)
        for example in data:
            optimizer.zero_grad()
            loss(one, example).backward()
            optimizer.step()
    assert same([*model.parameters()], [*plain.parameters()])


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.usefixtures("device")
def test_a_fisher_is_within_its_formats_error_after_one_task(storage):
    model = wide()
    ewc = EWC(model, ewc_lambda=1.0, storage=storage)
    fisher = random_fisher(model)
    ewc.consolidate_from(fisher)
    # bfloat16 rounds every write by chance, 8 bits only sums
    error = BY_CHANCE["bfloat16"] if "bfloat16" in storage else NEAREST[kept_as(storage)]
    for name, exact in fisher.items():
        kept, at = ewc.fisher[name].to(exact.device), dict(model.named_parameters())[name]
        assert_within(kept, exact, error * exact.double() * (1 + 1e-6), name)
        assert torch.equal(ewc.anchor[name].to(at.device), at.detach())


@pytest.mark.parametrize("rule", ["merged", "latest"])
@pytest.mark.parametrize("storage", ["bfloat16", "e5m3", "e5m3@cpu"])
def test_a_hundred_tasks_do_not_drift(storage, rule):
    # Every write is right on average, with a variance of addend x spacing at most: the relative
    # standard deviation of a sum stays below (spacing / 2)^(1/2). A mean over n entries is within
    # 5 of its own; rounding to nearest would stop at 16 to 32 addends, or 256 to 512.
    model = nn.Linear(50, 200, bias=False)
    ewc = EWC(model, ewc_lambda=1.0, storage=storage, anchor=rule)
    fisher = {"weight": torch.exp(torch.randn(200, 50))}
    for _ in range(100):
        ewc.consolidate_from(fisher)
    ratio = ewc.fisher["weight"].double() / (100 * fisher["weight"].double())
    deviation = math.sqrt(BY_CHANCE[kept_as(storage)] / 2)
    assert abs(ratio.mean().item() - 1) < 5 * deviation / math.sqrt(ratio.numel())
    assert ratio.std().item() < deviation
    assert torch.equal(ewc.anchor["weight"], model.weight.detach())


@pytest.mark.parametrize("storage", LESS)
def test_a_merge_repeats_from_the_random_seed(storage):
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        states.append(trained(storage)[1].state_dict())
    assert same(*states)


BYTES = {"float32": 10, "bfloat16": 8, "e5m3": 7 + 4 / 256}


@pytest.mark.parametrize("storage", STORAGES)
def test_the_bytes_of_a_parameter_are_those_documented(storage):
    model = nn.Linear(256, 256, bias=False)
    ewc = EWC(model, ewc_lambda=1.0, storage=storage)
    assert ewc.bytes_per_parameter == 0
    ewc.consolidate_from(random_fisher(model))
    assert ewc.bytes_per_parameter == BYTES[kept_as(storage)]
    assert ewc.storage == storage
    assert (f"storage={storage!r}" in repr(ewc)) == (storage != "float32")


def test_float64_parameters_keep_their_fisher_in_float64():
    for storage in LESS:
        _, ewc = trained(storage, lambda: wide().double())
        assert {f.dtype for f in ewc.fisher.values()} == {torch.float64}


@pytest.mark.parametrize("storage", STORAGES)
def test_a_state_round_trips_bit_for_bit_in_its_own_format(storage, tmp_path):
    model, ewc = trained(storage)
    torch.save(ewc.state_dict(), tmp_path / "ewc.pt")
    state = torch.load(tmp_path / "ewc.pt", weights_only=True)
    other = EWC(model, ewc_lambda=1.0, storage=storage)
    other.load_state_dict(state)
    assert same(other.state_dict(), ewc.state_dict())
    assert repr(other) == repr(ewc)
    assert state["format"] == (2 if "e5m3" in storage else 1)


@pytest.mark.parametrize("to", STORAGES)
@pytest.mark.parametrize("of", STORAGES)
def test_a_state_is_converted_to_the_format_of_who_loads_it(of, to):
    model, ewc = trained(of)
    other = EWC(model, ewc_lambda=1.0, storage=to)
    other.load_state_dict(ewc.state_dict())
    assert other.storage == to
    for name, values in ewc.fisher.items():
        budget = NEAREST[kept_as(to)] * values.double() * (1 + 1e-6)
        assert_within(other.fisher[name], values, budget, name)
        assert torch.equal(other.anchor[name], ewc.anchor[name])
    if kept_as(of) == kept_as(to):
        assert same(other.state_dict()["fisher"], ewc.state_dict()["fisher"])


@pytest.mark.parametrize("storage", LESS)
def test_training_resumes_bit_for_bit(storage):
    model, ewc = trained(storage)
    resumed = copy.deepcopy(model)
    twin = EWC(resumed, ewc_lambda=1.0, storage=storage)
    twin.load_state_dict(copy.deepcopy(ewc.state_dict()))
    fisher = random_fisher(model)
    for one in (ewc, twin):
        torch.manual_seed(7)
        one.consolidate_from(fisher)
        one.add_penalty_grad_()
    assert same(twin.state_dict(), ewc.state_dict())
    assert same(gradients(resumed), gradients(model))


@pytest.mark.parametrize("storage", LESS)
def test_added_rows_are_free_and_old_ones_keep_their_values(storage):
    model, ewc = trained(storage)
    before = {name: values.clone() for name, values in ewc.fisher.items()}
    grown = nn.Linear(40, CLASSES + 5, bias=False)
    with torch.no_grad():
        grown.weight[:CLASSES] = model[2].weight
    model[2] = grown
    ewc.track()
    assert torch.equal(ewc.fisher["2.weight"][:CLASSES], before["2.weight"])
    assert ewc.fisher["2.weight"][CLASSES:].count_nonzero() == 0
    ewc.add_penalty_grad_()
    assert model[2].weight.grad[CLASSES:].count_nonzero() == 0
    ewc.consolidate([batch(model)])
    assert ewc.fisher["2.weight"][CLASSES:].count_nonzero() > 0


@pytest.mark.parametrize("storage", LESS)
def test_frozen_parameters_and_missing_gradients_are_as_ever(storage):
    model, ewc = trained(storage)
    model[0].bias.requires_grad_(False)
    ewc.add_penalty_grad_()
    assert model[0].bias.grad is None
    assert model[0].weight.grad.count_nonzero() > 0
    ewc.penalty().backward()


@pytest.mark.parametrize("storage", LESS)
@pytest.mark.usefixtures("pieces")
def test_parameters_in_another_order_of_memory_than_their_state(storage):
    model, ewc = trained(storage, lambda: wide(100))
    expected = ewc.penalty().item()
    ewc.add_penalty_grad_()
    pulls = gradients(model)
    model.zero_grad()
    model[0].weight.data = model[0].weight.data.t().contiguous().t()
    assert ewc.penalty().item() == pytest.approx(expected, rel=1e-5)
    ewc.add_penalty_grad_()
    for name, grad in gradients(model).items():
        assert_within(grad, pulls[name], 1e-6 * pulls[name].double().abs(), name)


@pytest.mark.parametrize("storage", LESS)
def test_the_gradient_of_a_parameter_changed_since_is_refused(storage):
    model, ewc = trained(storage)
    value = ewc.penalty()
    shift(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("storage", LESS)
def test_copies_are_apart_from_the_original(storage):
    model, ewc = trained(storage)
    ewc.add_penalty_grad_()
    twin = copy.deepcopy(ewc)
    assert same(twin.state_dict(), ewc.state_dict())
    before = copy.deepcopy(ewc.state_dict())
    twin.consolidate_from(random_fisher(model))
    assert same(ewc.state_dict(), before)
    assert ewc.to("cpu") is ewc
    assert same(ewc.state_dict(), before)


def test_the_state_of_an_optimizer_keeps_the_format():
    model, ewc = trained("e5m3")
    optimizer = EWCOptimizer(torch.optim.Adam(model.parameters()), ewc)
    state = copy.deepcopy(optimizer.state_dict())
    assert {f.dtype for f in state["ewc"]["fisher"].values()} == {torch.uint8}
    ewc.consolidate_from(random_fisher(model))
    optimizer.load_state_dict(state)
    assert same(optimizer.state_dict()["ewc"], state["ewc"])


SPOILED = {
    "storage": (lambda s: s.update(storage="int3"), r"state\['storage'\]: expected one of"),
    "scales": (lambda s: s["scales"].pop("0.bias"), r"\['0.bias'\]: expected codes.*uint8 without"),
    "codes": (
        lambda s: s["fisher"].update({"0.bias": torch.ones(40)}),
        r"state\['fisher'\]\['0.bias'\]: expected codes.*float32 with",
    ),
    "blocks": (
        lambda s: s["scales"].update({"0.bias": torch.ones(2)}),
        r"state\['scales'\]\['0.bias'\]: expected shape \(1,\).*got \(2,\)",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED.keys())
def test_codes_and_scales_that_do_not_belong_together_are_refused(spoil, message):
    _, ewc = trained("e5m3")
    before = copy.deepcopy(ewc.state_dict())
    state = copy.deepcopy(before)
    spoil(state)
    with pytest.raises(ValueError, match=message):
        ewc.load_state_dict(state)
    assert same(ewc.state_dict(), before)


def test_an_unknown_storage_is_refused():
    with pytest.raises(ValueError, match=r"storage: expected one of 'float32'.*got 'int8'"):
        EWC(mlp(), ewc_lambda=1.0, storage="int8")


def test_a_fisher_that_is_no_mean_of_squares_leaves_the_state_as_it_was():
    model, ewc = trained("e5m3")
    before = copy.deepcopy(ewc.state_dict())
    bad = random_fisher(model)
    bad["2.weight"][0, 0] = math.nan
    with pytest.raises(ValueError, match="expected finite entries"):
        ewc.consolidate_from(bad)
    assert same(ewc.state_dict(), before)


def test_the_fisher_of_a_model_is_measured_as_ever():
    model = mlp()
    data = [batch(model)]
    plain, small = EWC(model, ewc_lambda=1.0), EWC(model, ewc_lambda=1.0, storage="e5m3")
    plain.consolidate(data)
    small.consolidate(data)
    for name, values in plain.fisher.items():
        smallest = 1.125 * 2.0**-31 * values.max().double()
        assert_within(
            small.fisher[name],
            values,
            values.double() * NEAREST["e5m3"] * (1 + 1e-6) + smallest,
            name,
        )


def test_what_can_be_read_are_the_values_of_the_codes():
    _, ewc = trained("e5m3")
    state = ewc.state_dict()
    for name, codes in state["fisher"].items():
        assert torch.equal(ewc.fisher[name], decode_e5m3(codes, state["scales"][name]))


@pytest.mark.parametrize("storage", ["e5m3", "float32@cpu"])
def test_state_that_must_be_decoded_or_copied_is_not_read_in_place(storage):
    model, ewc = trained(storage)
    with pytest.raises(ValueError, match=r"storage='float32' or 'bfloat16'; for others wrap"):
        _ = ewc.springs_of(model.parameters()).operands

"""Flattened parameters are the same parameters: only their memory moved."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ewc_fast
from ewc_fast import EWC, EWCOptimizer, flatten_parameters_, functional
from ewc_fast.flat import ALIGNMENT


class Tied(nn.Module):
    """Tied weights, a channels_last and a transposed one, a scalar, a buffer, a frozen part."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 4)
        self.second.weight = nn.Parameter(torch.randn(6, 4).t())
        self.again = nn.Linear(4, 6)
        self.again.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.norm(self.conv(x)).mean((2, 3))
        x = self.second(self.first(x).tanh()).tanh()
        return self.head(self.frozen(self.again(x) * self.scale))


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 2, 5, 5, generator=generator), torch.arange(8) % 3


def loss(model, seed):
    x, y = batch(seed)
    return F.cross_entropy(model(x), y)


def pair():
    """Return a model, its flattened copy, and the copy's buffers."""
    model = Tied()
    other = copy.deepcopy(model)
    return model, other, flatten_parameters_(other)


def assert_same(model, other):
    for (name, one), (other_name, two) in zip(
        model.state_dict().items(), other.state_dict().items(), strict=True
    ):
        assert name == other_name
        assert torch.equal(one, two), name


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_values_names_strides_and_ties_stay():
    model = Tied()
    before = copy.deepcopy(model.state_dict())
    objects = dict(model.named_parameters())
    strides = {name: p.stride() for name, p in objects.items()}
    flat = flatten_parameters_(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert dict(model.named_parameters()).keys() == objects.keys()
    assert all(p is objects[name] for name, p in model.named_parameters())
    assert {name: p.stride() for name, p in model.named_parameters()} == strides
    assert model.again.weight is model.first.weight
    assert flat.names == tuple(trainable(model))
    assert repr(flat) == "FlatParameters(12 parameters of 170 values in 1 buffer)"


def test_parameters_are_views_of_one_aligned_buffer_with_zeros_between():
    model = Tied()
    (buffer,) = flatten_parameters_(model).params
    ends = []
    for param in trainable(model).values():
        assert param.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        assert param.storage_offset() % ALIGNMENT == 0
        assert param.is_leaf
        ends.append(param.storage_offset() + param.numel())
        until = -(-ends[-1] // ALIGNMENT) * ALIGNMENT
        assert not buffer[ends[-1] : until].any()
    assert buffer.numel() == until
    assert model.frozen.weight.untyped_storage().data_ptr() != buffer.data_ptr()


def test_each_dtype_has_its_buffer():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5).bfloat16(), nn.Linear(5, 2))
    flat = flatten_parameters_(model)
    assert [p.dtype for p in flat.params] == [torch.float32, torch.bfloat16]
    assert [g.dtype for g in flat.grads] == [torch.float32, torch.bfloat16]
    assert [p.numel() for p in flat.params] == [4 * ALIGNMENT, 2 * ALIGNMENT]


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("flatten_first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), id="SGD"),
        pytest.param(lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True), id="AdamW"),
    ],
)
def test_training_with_ewc_gives_the_same_bits_as_unflattened(make, flatten_first, set_to_none):
    model = Tied()
    flattened = copy.deepcopy(model)
    optimizers = []
    for one in (model, flattened):
        if one is flattened and flatten_first:
            flatten_parameters_(one)
        ewc = EWC(one, ewc_lambda=10.0)
        optimizers.append(EWCOptimizer(make(one.parameters()), ewc))
        if one is flattened and not flatten_first:
            flatten_parameters_(one)
        ewc.consolidate([batch(0)])
    for step in range(4):
        for one, optimizer in zip((model, flattened), optimizers, strict=True):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss(one, step).backward()
            optimizer.step()
        assert optimizers[0].last_penalty == optimizers[1].last_penalty
    assert_same(model, flattened)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_operations_over_the_buffers_equal_those_over_the_list(set_to_none):
    model, other, flat = pair()
    ewc = EWC(model, ewc_lambda=10.0)
    ewc.consolidate([batch(0)])
    fisher = flat.flatten([ewc.fisher[name] for name in flat.names])
    anchor = flat.flatten([ewc.anchor[name] for name in flat.names])
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other)]
    for step in range(4):
        for one, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss(one, step).backward()
        value = ewc.add_penalty_grad_()
        flat_value = functional.add_penalty_grad_(
            flat.grads, flat.params, fisher, anchor, ewc_lambda=10.0
        )
        torch.testing.assert_close(flat_value, value, rtol=1e-6, atol=0)
        for optimizer in optimizers:
            optimizer.step()
    assert value > 0
    assert_same(model, other)


def test_what_every_operation_leaves_between_parameters_is_zero():
    _, other, flat = pair()
    params, grads = flat.params, flat.grads
    ones = [torch.ones_like(p) for p in trainable(other).values()]
    fisher, anchor = flat.flatten(ones), flat.flatten(ones)
    residual = flat.flatten([t.bfloat16() * 0 for t in ones])
    functional.add_penalty_grad_(grads, params, fisher, anchor, ewc_lambda=3.0)
    functional.proximal_step_(params, fisher, anchor, ewc_lambda=3.0, lr=0.1)
    functional.accumulate_square_(fisher, grads)
    functional.merge_(fisher, anchor, residual, flat.flatten(ones), params, gamma=0.5)
    narrow = flat.flatten([t.bfloat16() for t in ones])
    functional.merge_online_(narrow, anchor, flat.flatten(ones), params)
    functional.accumulate_square_(narrow, grads)
    inside = flat.flatten(ones)
    for buffers in (params, grads, fisher, anchor, residual, narrow):
        for buffer, mask in zip(buffers, inside, strict=True):
            assert not buffer[mask == 0].any()


# Gradients


def test_gradients_that_are_there_move_along():
    model = Tied()
    loss(model, 0).backward()
    before = {name: p.grad.clone() for name, p in trainable(model).items()}
    flat = flatten_parameters_(model)
    for name, view in zip(flat.names, flat.unflatten(flat.grads), strict=True):
        assert torch.equal(view, before[name])
        assert model.get_parameter(name).grad.data_ptr() == view.data_ptr()


def test_gradients_come_home_after_they_were_set_to_none():
    model, other, flat = pair()
    for step in range(3):
        for one in (model, other):
            one.zero_grad(set_to_none=True)
            loss(one, step).backward()
        grads = flat.unflatten(flat.grads)
        for (name, param), view in zip(trainable(model).items(), grads, strict=True):
            assert torch.equal(view, param.grad), name
            assert other.get_parameter(name).grad.data_ptr() == view.data_ptr()


def test_gradients_accumulate_over_backward_passes_in_the_buffers():
    model, other, flat = pair()
    home = [view.data_ptr() for view in flat.unflatten(flat.grads)]
    for step in range(3):
        loss(model, step).backward()
        loss(other, step).backward()
        assert [p.grad.data_ptr() for p in trainable(other).values()] == home
    for param, view in zip(trainable(model).values(), flat.unflatten(flat.grads), strict=True):
        assert torch.equal(view, param.grad)


def test_a_parameter_without_a_gradient_gets_zeros_and_none_of_an_old_one():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    flat = flatten_parameters_(model)
    (model[0](torch.ones(2)) + model[1](torch.ones(2))).sum().backward()
    assert flat.grads[0].any()
    model.zero_grad(set_to_none=True)
    model[0](torch.ones(2)).sum().backward()
    grads = dict(zip(flat.names, flat.unflatten(flat.grads), strict=True))
    assert grads["0.weight"].all()
    assert not grads["1.weight"].any()
    assert model[1].weight.grad.data_ptr() == grads["1.weight"].data_ptr()


def test_flattening_leaves_missing_gradients_missing():
    model = Tied()
    flatten_parameters_(model)
    assert all(p.grad is None for p in model.parameters())


# What a model goes through


def test_state_dicts_are_loaded_into_the_buffers():
    model, other, flat = pair()
    with torch.no_grad():
        for param in model.parameters():
            param.normal_()
    other.load_state_dict(model.state_dict())
    assert_same(model, other)
    for view, param in zip(flat.unflatten(flat.params), trainable(model).values(), strict=True):
        assert torch.equal(view, param)


def test_a_saved_model_loads_into_an_unflattened_one():
    _, other, _ = pair()
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    model = Tied()
    model.load_state_dict(torch.load(file, weights_only=True))
    assert_same(model, other)


def test_a_deep_copy_works_apart_and_can_be_flattened_itself():
    _, model, flat = pair()
    other = copy.deepcopy(model)
    assert_same(model, other)
    with torch.no_grad():
        flat.params[0].zero_()
    assert other.conv.weight.any()
    again = flatten_parameters_(other)
    assert again.params[0].data_ptr() != flat.params[0].data_ptr()
    loss(other, 0).backward()
    assert again.grads[0].any()


def test_a_flattened_model_can_be_flattened_again():
    model, other, flat = pair()
    loss(model, 0).backward()
    loss(other, 0).backward()
    again = flatten_parameters_(other)
    assert_same(model, other)
    for param, view in zip(trainable(model).values(), again.unflatten(again.grads), strict=True):
        assert torch.equal(view, param.grad)
    with pytest.raises(RuntimeError, match="call flatten_parameters_ again"):
        flat.params  # noqa: B018


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda model: model.double(), id="dtype"),
        pytest.param(lambda model: model.head.half(), id="dtype_of_a_part"),
        pytest.param(
            lambda model: setattr(model.scale, "data", model.scale.data.clone()), id="data"
        ),
    ],
)
@pytest.mark.parametrize("what", ["params", "grads"])
def test_other_memory_is_noticed_on_use(change, what):
    model = Tied()
    flat = flatten_parameters_(model)
    change(model)
    with pytest.raises(RuntimeError, match=r"parameter '.*' has other memory .*model.to"):
        getattr(flat, what)


def test_gaps_are_closed():
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(4, 6)[:, ::2])
    before = model.weight.detach().clone()
    flat = flatten_parameters_(model)
    assert model.weight.is_contiguous()
    assert torch.equal(model.weight, before)
    assert flat.params[0].numel() == ALIGNMENT


def test_parameters_that_are_parts_of_one_tensor_are_moved_apart():
    model, whole = nn.Module(), torch.randn(30)
    model.a, model.b = nn.Parameter(whole[:10]), nn.Parameter(whole[10:])
    flatten_parameters_(model)
    assert torch.equal(torch.cat([model.a, model.b]), whole)
    assert model.b.storage_offset() == ALIGNMENT


def test_empty_parameters_take_no_room():
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.ones(5))
    flat = flatten_parameters_(model)
    assert flat.params[0].numel() == ALIGNMENT
    assert model.a.shape == (0, 3)


def test_frozen_parameters_stay_where_they_are():
    model = Tied()
    before = model.frozen.weight.data_ptr()
    flat = flatten_parameters_(model)
    assert model.frozen.weight.data_ptr() == before
    model.frozen.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"'frozen.weight' was frozen when .* again"):
        flat.params  # noqa: B018
    model.frozen.requires_grad_(False)
    model.head.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"'head.weight' was frozen after .* again"):
        flat.grads  # noqa: B018


def test_a_compiled_model_trains_on():
    model, other, flat = pair()
    step = torch.compile(lambda seed: loss(other, seed), backend="aot_eager")
    for seed in range(2):
        loss(model, seed).backward()
        step(seed).backward()
    for param, view in zip(trainable(model).values(), flat.unflatten(flat.grads), strict=True):
        torch.testing.assert_close(view, param.grad)


# Laying out


def test_tensors_of_any_strides_and_dtype_are_laid_out_like_the_parameters():
    model, _, flat = pair()
    values = [torch.randn(p.shape).bfloat16() for p in trainable(model).values()]
    (buffer,) = flat.flatten(values)
    assert buffer.dtype == torch.bfloat16
    for view, value, param in zip(
        flat.unflatten([buffer]), values, trainable(model).values(), strict=True
    ):
        assert torch.equal(view, value)
        assert view.stride() == param.stride()


def test_tensors_that_do_not_fit_are_refused():
    _, model, flat = pair()
    values = [torch.zeros_like(p) for p in trainable(model).values()]
    with pytest.raises(ValueError, match="tensors: expected 12, one for each of names, got 11"):
        flat.flatten(values[:-1])
    with pytest.raises(ValueError, match=r"tensors\[0\]: expected shape \(\) of parameter 'scale'"):
        flat.flatten(values[::-1])
    with pytest.raises(TypeError, match=r"tensors\[0\]: expected a torch.Tensor, got NoneType"):
        flat.flatten([None, *values[1:]])
    with pytest.raises(TypeError, match=r"one dtype.*torch.float32, torch.float64"):
        flat.flatten([values[0].double(), *values[1:]])
    with pytest.raises(ValueError, match=r"buffers: expected tensors of shapes"):
        flat.unflatten([torch.zeros(3)])


def test_it_is_public():
    assert {"flatten_parameters_", "FlatParameters"} <= set(ewc_fast.__all__)

"""Accelerate wraps the wrapped optimizer, and saves it with its EWC."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn, optim
from training import batch, consolidated, loss, same

from ewc_fast import EWC, EWCOptimizer

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def wrapped(model: nn.Module, ewc: EWC, mode: str = "gradient") -> EWCOptimizer:
    return EWCOptimizer(optim.Adam(model.parameters(), lr=0.01), ewc, mode=mode)


def train(model, optimizer, data, backward=lambda value: value.backward()):
    for one in data:
        optimizer.zero_grad()
        backward(loss(model, one))
        optimizer.step()


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_a_prepared_optimizer_trains_as_it_would_alone(accelerator, mode):
    model, ewc = consolidated()
    alone, its_ewc = copy.deepcopy((model, ewc))
    data = [batch(model) for _ in range(4)]
    train(alone, wrapped(alone, its_ewc, mode), data)
    prepared = accelerator.prepare(wrapped(model, ewc, mode))
    train(model, prepared, data, accelerator.backward)
    assert same(model.state_dict(), alone.state_dict())


def test_accumulated_batches_get_one_penalty():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, ewc = consolidated()
    alone, its_ewc = copy.deepcopy((model, ewc))
    data = [batch(model) for _ in range(4)]
    prepared_model, optimizer = accelerator.prepare(model, wrapped(model, ewc))
    for one in data:
        with accelerator.accumulate(prepared_model):
            accelerator.backward(loss(prepared_model, one))
            optimizer.step()
            optimizer.zero_grad()
    AcceleratorState._reset_state(reset_partial_state=True)

    reference = wrapped(alone, its_ewc)
    for first, second in zip(data[::2], data[1::2], strict=True):
        reference.zero_grad()
        (loss(alone, first) / 2).backward()
        (loss(alone, second) / 2).backward()
        reference.step()
    assert same(model.state_dict(), alone.state_dict())


def test_a_step_that_the_scaler_skips_changes_nothing(accelerator):
    model, ewc = consolidated()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = AcceleratedOptimizer(wrapped(model, ewc), scaler=scaler)
    for value in (1.0, float("inf"), 1.0):
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        optimizer.zero_grad()
        scaler.scale(loss(model, batch(model)) * value).backward()
        optimizer.step()
        assert optimizer.step_was_skipped == (value != 1.0)
        assert same((model.state_dict(), optimizer.state_dict()), before) == (value != 1.0)


def test_save_state_brings_back_model_optimizer_and_ewc(accelerator, tmp_path):
    model, ewc = consolidated()
    prepared_model, optimizer = accelerator.prepare(model, wrapped(model, ewc))
    accelerator.save_state(str(tmp_path))
    saved = copy.deepcopy((model.state_dict(), ewc.state_dict()))
    data = [batch(model) for _ in range(2)]
    train(prepared_model, optimizer, data, accelerator.backward)
    trained = copy.deepcopy(model.state_dict())
    ewc.consolidate(data)
    accelerator.load_state(str(tmp_path))
    assert same((model.state_dict(), ewc.state_dict()), saved)
    train(prepared_model, optimizer, data, accelerator.backward)
    assert same(model.state_dict(), trained)


def test_an_ewc_without_the_wrapper_is_registered_for_checkpointing(accelerator, tmp_path):
    model, ewc = consolidated()
    accelerator.register_for_checkpointing(ewc)
    accelerator.save_state(str(tmp_path))
    saved = copy.deepcopy(ewc.state_dict())
    ewc.consolidate([batch(model)])
    accelerator.load_state(str(tmp_path))
    assert same(ewc.state_dict(), saved)


def test_an_ewc_of_another_model_is_not_loaded(accelerator, tmp_path):
    _, ewc = consolidated()
    accelerator.register_for_checkpointing(ewc)
    accelerator.save_state(str(tmp_path))
    ewc.track(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"0\.weight"):
        accelerator.load_state(str(tmp_path))

"""Bad saved states: each its own clear error, and nothing changed."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from models import CLASSES, FEATURES
from torch import nn

from ewc_fast import EWC


def without(*path):
    def spoil(state):
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return spoil


def of_another_model(state):
    other = EWC(nn.Linear(FEATURES, CLASSES), ewc_lambda=1.0)
    other.consolidate_from({"weight": torch.ones(CLASSES, FEATURES), "bias": torch.ones(CLASSES)})
    state.update(other.state_dict())


def of_a_wider_model(state):
    for field in ("fisher", "anchor", "residual"):
        state[field]["2.weight"] = torch.ones(6, 9)


STATES = {
    "newer_format": (
        lambda s: s.update(format=99),
        "state: format 99 is newer than 2.*upgrade ewc_fast",
    ),
    "format_of_another_kind": (lambda s: s.update(format="2.0"), "state: format '2.0'"),
    "something_else": (lambda s: s.clear(), r"state: expected what EWC.state_dict\(\) returned"),
    "another_model": (of_another_model, "state: of another model.*'bias', 'weight'.*strict=False"),
    "a_wider_model": (
        of_a_wider_model,
        r"state\['fisher'\]\['2.weight'\]: expected shape \(6, 7\).*got \(6, 9\); is it of another",
    ),
    "without_anchor": (without("anchor"), "state: truncated, it lacks 'anchor'"),
    "without_settings": (without("gamma"), "state: truncated, it lacks 'gamma'"),
    "without_one_anchor": (
        without("anchor", "2.bias"),
        "state: truncated, fisher and anchor differ in '2.bias'",
    ),
    "without_one_residual": (
        without("residual", "2.bias"),
        "state: truncated, fisher and residual differ in '2.bias'",
    ),
    "without_one_fisher": (
        without("fisher", "2.bias"),
        "state: truncated, fisher and anchor differ in '2.bias'",
    ),
    "negative_strength": (lambda s: s.update(ewc_lambda=-1.0), r"state\['ewc_lambda'\]: expected"),
    "bad_decay": (lambda s: s.update(gamma=0.0), "gamma: expected a number in"),
    "unknown_rule": (lambda s: s.update(rule="x"), r"state\['rule'\]: expected one of 'merged'"),
    "no_constant": (lambda s: s.update(constant=None), r"state\['constant'\]: expected a number"),
    "nan_constant": (lambda s: s.update(constant=math.nan), r"state\['constant'\]: expected a num"),
    "no_count_of_tasks": (lambda s: s.update(tasks="?"), r"state\['tasks'\]: expected a number"),
    "no_tensor": (
        lambda s: s["fisher"].update({"2.bias": 1.0}),
        r"state\['fisher'\]\['2.bias'\]: expected a torch.Tensor, got float",
    ),
}


LOADS = {
    "ewc": lambda ewc, optimizer, state: ewc.load_state_dict(state["ewc"]),
    "optimizer": lambda ewc, optimizer, state: optimizer.load_state_dict(state),
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
@pytest.mark.parametrize(("spoil", "message"), STATES.values(), ids=STATES.keys())
def test_bad_states(scene, spoil, message, load):
    _, ewc, optimizer = scene
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["exp_avg"].fill_(7.0)
    spoil(state["ewc"])
    with pytest.raises((TypeError, ValueError), match=message):
        load(ewc, optimizer, state)


def test_a_bad_state_of_the_inner_optimizer_leaves_the_ewc_as_it_was(scene):
    state = copy.deepcopy(scene[2].state_dict())
    state["ewc"]["ewc_lambda"] = 5.0
    state["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="parameter group"):
        scene[2].load_state_dict(state)

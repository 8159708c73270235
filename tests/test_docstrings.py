"""The examples in the docstrings run as they stand."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import ewc_fast.fisher

MODULES = [
    "ewc_fast.drift",
    "ewc_fast.fisher",
    "ewc_fast.flat",
    "ewc_fast.importance.l2",
    "ewc_fast.importance.mas",
    "ewc_fast.lora",
    "ewc_fast.functional",
] + [module.name for module in pkgutil.walk_packages(ewc_fast.fisher.__path__, "ewc_fast.fisher.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.failed == 0


def test_everything_public_is_described():
    for name in set(ewc_fast.fisher.__all__) - {"Estimator"}:
        assert getattr(ewc_fast.fisher, name).__doc__, name

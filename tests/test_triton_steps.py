"""Triton's steps of optimizers: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import DTYPES
from numerics import assert_within, smallest, u, value_budget
from steps import STEPS, Lists, Step, copied

from ewc_fast import _steps, reference_steps
from ewc_fast._plan import Plan

pytest.importorskip("triton")

from ewc_fast._triton import table

pytestmark = pytest.mark.filterwarnings(  # of the interpreter: its loops' bounds are arrays
    "ignore:Conversion of an array:DeprecationWarning",
    "ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning",
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
every_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


@pytest.fixture(autouse=True)
def roots_rounded_to_nearest(monkeypatch):
    """As NumPy has them; PyTorch's may be one unit off."""
    exact = lambda values: torch.from_numpy(np.sqrt(values.numpy()))  # noqa: E731
    monkeypatch.setattr(reference_steps, "_square_root", exact)


def on(device: str, lists: Lists) -> Lists:
    return {name: [t.to(device) for t in tensors] for name, tensors in lists.items()}


def take(step: Step, lists: Lists, plan: Plan | None = None, lr=None) -> torch.Tensor:
    run = _steps.adam_step if step.adam else _steps.sgd_step
    return run(lists, step.options, "triton", plan, lr)()


def check(step: Step, lists: Lists, plan: Plan | None = None) -> None:
    """The specification's bits, but where the interpreter drops what a GPU rounds to nearest.

    Beside float64 also but for beta^t, which is a product of powers here.
    """
    expected = copied(lists)
    penalty = step.reference(expected)
    there = on(DEVICE, copied(lists))
    value = take(step, there, plan).item()
    dtype = lists["params"][0].dtype if lists["params"] else torch.float32
    assert abs(value - penalty) <= value_budget(penalty, dtype)
    for name, tensors in expected.items():
        for i, (found, right) in enumerate(zip(on("cpu", there)[name], tensors, strict=True)):
            narrow = found.dtype == torch.bfloat16 and DEVICE == "cpu"
            if step.adam and name in ("params", "path") and found.dtype == torch.float64:
                params = lists["params"][i], expected["params"][i]
                budget = power_budget(step, expected["steps"][i].item(), *params)
                if name == "path":
                    budget = budget * lists["grads"][i].abs() + 2 * u(torch.float64) * right.abs()
                assert_within(found, right, budget, f"{name}[{i}]")
            elif narrow and not (name == "params" and step.options.rounding_seed is not None):
                unit = 2 * u(torch.bfloat16) * right.double().abs() + smallest(torch.bfloat16)
                assert_within(found, right, unit, f"{name}[{i}]")
            elif name == "path" and params_truncated(step, lists["params"][i]):
                theta = expected["params"][i].double()
                unit = 2 * u(torch.bfloat16) * theta.abs() + smallest(torch.bfloat16)
                assert_within(found, right, unit * lists["grads"][i].double().abs(), f"path[{i}]")
            else:
                assert torch.equal(found, right), f"{name}[{i}]"


def params_truncated(step: Step, param: torch.Tensor) -> bool:
    """Whether the interpreter drops what a GPU rounds: the path then follows other parameters."""
    return param.dtype == torch.bfloat16 and DEVICE == "cpu" and step.options.rounding_seed is None


def power_budget(step: Step, count: float, before: torch.Tensor, after: torch.Tensor):
    """What two ways to beta^t may differ by: 2 log2(t) products each, magnified by 1 - beta^t.

    And a unit of the parameter, where that moves what is rounded to the other side.
    """
    unit, products = u(torch.float64), 2 * math.log2(count) + 2
    first, second = (products * unit / (1 - b**count) for b in step.options[6:8])
    return 2 * (first + second / 2 + 4 * unit) * (after - before).abs() + 2 * unit * after.abs()


@every_dtype
@every_step
def test_a_step_is_the_specifications(step, dtype):
    if not step.fits(dtype):
        pytest.skip("no such operands beside this dtype")
    check(step, step.make([torch.randn(n).to(dtype) for n in (1, 5, 0, 1030)]))
    check(step, step.make([torch.randn(1030).to(dtype)]))  # whose addresses are arguments


@pytest.mark.parametrize("name", ["adamw", "adam_plain", "sgd_master", "sgd_nesterov"])
def test_misaligned_operands_are_walked_too(name):
    step = STEPS[name]
    dtype = torch.float16 if step.master else torch.float32
    wide = step.make([torch.randn(n + 1).to(dtype) for n in (1040, 5)])
    for misaligned in set(wide) - {"steps"}:
        check(
            step,
            {
                n: ts if n == "steps" else [t[1:] if n == misaligned else t[:-1] for t in ts]
                for n, ts in copied(wide).items()
            },
        )


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_rows_of_all_dtypes_share_a_call(name):
    step = STEPS[name]
    lists = step.make([torch.randn(77).to(dtype) for dtype in (torch.float32, torch.float16)])
    check(step, lists)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_a_plan_follows_steps_and_addresses(name):
    step, plan = STEPS[name], Plan()
    lists = step.make([torch.randn(5), torch.randn(600)])
    for _ in range(3):
        check(step, lists, plan)
        lists = copied(lists)


@pytest.mark.parametrize("name", ["adamw", "adamw_proximal", "sgd", "sgd_dampened_proximal"])
@pytest.mark.parametrize("sizes", [[70], [70, 3]], ids=["one", "two"])
def test_a_learning_rate_on_the_device_is_the_one_that_counts(name, sizes):
    step, lr = STEPS[name], torch.tensor(0.037)
    lists = step.make([torch.randn(n) for n in sizes])
    expected = copied(lists)
    step.with_options(lr=lr.item()).reference(expected)
    there = on(DEVICE, lists)
    take(step.with_options(lr=0.0), there, lr=lr.to(DEVICE))
    for key, tensors in expected.items():
        assert all(map(torch.equal, on("cpu", there)[key], tensors)), key


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_nothing_is_copied_during_a_capture(name, monkeypatch):
    step = STEPS[name]
    lists = step.make([torch.randn(5), torch.randn(600)])
    with monkeypatch.context() as capture:
        capture.setattr(table, "_capturing", lambda device: True)
        capture.setattr(table, "_upload", None)
        check(step, lists)

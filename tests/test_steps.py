"""The steps of Adam and SGD: every implementation gives the reference's bits."""

from __future__ import annotations

import itertools

import pytest
import torch

from ewc_fast import functional
from ewc_fast._native import core, reader
from ewc_fast._steps import operation

SIZES = [(1037,), (3, 5), (), (0,), (20001,)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [  # dtypes of parameters, moments and Fisher; whether there is a master copy
    (torch.float32, torch.float32, torch.float32, False),
    (torch.float32, torch.float32, torch.bfloat16, False),
    *itertools.product(
        [torch.bfloat16, torch.float16], FLOATS[:1], [torch.float32, torch.bfloat16], [True, False]
    ),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16, False),
    (torch.float16, torch.float16, torch.float32, False),
]
LAYOUT_NAMES = ["-".join(str(x).removeprefix("torch.") for x in layout) for layout in LAYOUTS]
OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param({"ewc_lambda": 3.0}, id="gradient"),
    pytest.param({"ewc_lambda": 3.0, "mode": "proximal", "maximize": True}, id="proximal"),
    pytest.param({"ewc_lambda": 1e30, "mode": "proximal"}, id="stiff"),
    pytest.param({"ewc_lambda": 0.5, "weight_decay": 0.1, "maximize": True}, id="decay"),
    pytest.param({"ewc_lambda": 0.5, "rounding_seed": 7}, id="by-chance"),
]
WITH_PATH = [
    pytest.param({"ewc_lambda": 3.0, "maximize": True}, id="gradient"),
    pytest.param({"ewc_lambda": 3.0, "mode": "proximal", "weight_decay": 0.1}, id="proximal"),
    pytest.param({"ewc_lambda": 0.5, "rounding_seed": 7}, id="by-chance"),
]


def operands(kind, layout, springs, amsgrad=False):
    dtype, moments, fisher, has_master = layout
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(0)

    def draw(to, positive=False):
        made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SIZES]
        return [(m.abs() if positive else m).to(to) for m in made]

    lists = {"params": draw(dtype), "grads": draw(dtype)}
    if kind == "adam":
        lists |= {"exp_avgs": draw(moments), "exp_avg_sqs": draw(moments, positive=True)}
        lists["steps"] = [torch.tensor(float(i)) for i in range(len(SIZES))]
        if amsgrad:
            lists["max_exp_avg_sqs"] = draw(moments, positive=True)
    else:
        lists["momentum_buffers"] = draw(moments)
    if springs:
        lists |= {"fisher": draw(fisher, positive=True), "anchor": draw(wide)}
    if has_master:
        lists["master"] = draw(torch.float32)
    return lists


def run(kind, lists, **options):
    if kind == "adam":
        return functional.adam_step_(**lists, lr=0.01, **options)
    return functional.sgd_step_(**lists, lr=0.01, momentum=0.9, **options)


def assert_same(lists, others):
    for name, tensors in lists.items():
        for i, (one, other) in enumerate(zip(tensors, others[name], strict=True)):
            assert torch.equal(one, other), f"{name}[{i}]"


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_NAMES)
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_the_compiled_step_has_the_references_bits(kind, layout, options):
    if layout[3] and "rounding_seed" in options:
        options = {name: value for name, value in options.items() if name != "rounding_seed"}
    extra = {"sgd": {"nesterov": "weight_decay" in options}}.get(kind, {})
    found, wanted = (
        operands(kind, layout, bool(options), amsgrad="weight_decay" in options) for _ in range(2)
    )
    value = run(kind, found, **options, **extra)
    exact = run(kind, wanted, **options, **extra, impl="reference")
    assert_same(found, wanted)
    torch.testing.assert_close(value, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", WITH_PATH)
@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_NAMES)
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_a_path_has_the_references_bits_and_changes_nothing_else(kind, layout, options):
    if layout[3] and "rounding_seed" in options:
        options = {name: value for name, value in options.items() if name != "rounding_seed"}
    found, wanted, plain = (operands(kind, layout, True) for _ in range(3))
    for lists in (found, wanted):
        lists["path"] = [torch.full(size, 0.25) for size in SIZES]
    run(kind, found, **options)
    run(kind, wanted, **options, impl="reference")
    run(kind, plain, **options)
    assert_same(found, wanted)
    assert_same(plain, found)


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_float64_is_the_reference_to_the_last_places(kind, mode):
    layout = (torch.float64, torch.float64, torch.float64, False)
    found, wanted = operands(kind, layout, True), operands(kind, layout, True)
    value = run(kind, found, ewc_lambda=2.0, mode=mode)
    exact = run(kind, wanted, ewc_lambda=2.0, mode=mode, impl="reference")
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(value, exact, rtol=1e-13, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=LAYOUT_NAMES)
def test_every_vector_level_gives_the_same_bits(layout):
    results = []
    for level in range(len(core.vector_levels)):
        lists = operands("adam", layout, True, amsgrad=True)
        called = operation("adam_step_", tuple(lists))
        specs = [(o.name, o.role, o.written, o.stacked, False) for o in called.operands]
        plan = core.Plan(reader, specs, [o.slot for o in called.operands])
        plan.adopt(*(lists[o.name] for o in called.operands))
        options = core.AdamOptions(0.01, 0.1, 2.0, False, True, None, 0.9, 0.99, 1e-8, True)
        value = core.adam_step(plan, options, 1, level)
        results.append((value, lists))
    for value, lists in results[1:]:
        assert value == results[0][0]
        assert_same(lists, results[0][1])


def test_flat_tensors_and_a_plan_serve_too():
    lists = operands("adam", LAYOUTS[0], True)
    flat = {name: torch.cat([t.reshape(-1) for t in tensors]) for name, tensors in lists.items()}
    flat["steps"] = torch.zeros(())
    for tensor in lists["steps"]:
        tensor.zero_()
    plan = functional.Plan(pinned=("fisher", "anchor"))
    for _ in range(3):
        value = run("adam", lists, ewc_lambda=2.0, plan=plan)
        other = run("adam", flat, ewc_lambda=2.0)
    torch.testing.assert_close(value, other, rtol=1e-6, atol=0)
    assert torch.equal(torch.cat([t.reshape(-1) for t in lists["params"]]), flat["params"])
    assert flat["steps"] == 3


def test_odd_rows_take_the_reference_and_the_others_do_not():
    """Rounded by chance from their places in the call's lists, whatever is beside them."""
    whole = operands("sgd", (torch.bfloat16, torch.float32, torch.float32, False), True)
    odd = {name: [t.clone() for t in tensors] for name, tensors in whole.items()}
    gappy = torch.zeros(3, 10, dtype=torch.bfloat16)[:, ::2]
    odd["params"][1] = gappy.copy_(odd["params"][1])
    for lists in (whole, odd):
        run("sgd", lists, ewc_lambda=1.0, rounding_seed=3)
    assert_same(odd, whole)


def test_a_zero_decay_and_strength_leave_what_is_not_finite_where_it_is():
    params, grads = torch.tensor([float("inf"), 1.0]), torch.ones(2)
    moments = [torch.zeros(2), torch.zeros(2)]
    functional.adam_step_(params, grads, *moments, torch.tensor(0.0), lr=0.1)
    assert torch.isfinite(torch.stack(moments)).all()


GOOD = {"lr": 0.1}
WRONG = [
    ({"lr": -1.0}, {}, ValueError, "lr"),
    ({"lr": float("nan")}, {}, ValueError, "lr"),
    ({"betas": (1.0, 0.9)}, {}, ValueError, r"betas\[0\]"),
    ({"betas": (0.9, -0.1)}, {}, ValueError, r"betas\[1\]"),
    ({"eps": -1e-8}, {}, ValueError, "eps"),
    ({"weight_decay": -0.1}, {}, ValueError, "weight_decay"),
    ({"ewc_lambda": float("inf")}, {}, ValueError, "ewc_lambda"),
    ({"lr": 1e20, "ewc_lambda": 1e30}, {}, ValueError, r"ewc_lambda \* lr"),
    ({"mode": "sideways"}, {}, ValueError, "mode"),
    ({"rounding_seed": -1}, {}, ValueError, "rounding_seed"),
    ({"rounding_seed": 0.5}, {}, TypeError, "rounding_seed"),
    ({"impl": "gpu"}, {}, ValueError, "impl"),
    ({}, {"anchor": None}, ValueError, "anchor"),
    ({}, {"fisher": None}, ValueError, "fisher"),
    ({}, {"grads": [torch.zeros(3)]}, ValueError, r"grads\[0\].*shape"),
    ({}, {"grads": [torch.zeros(2), torch.zeros(2)]}, ValueError, "grads"),
    ({}, {"grads": [None]}, TypeError, r"grads\[0\]"),
    ({}, {"exp_avgs": [torch.zeros(2).double()]}, TypeError, r"exp_avgs\[0\]"),
    ({}, {"steps": [torch.zeros(1)]}, ValueError, r"steps\[0\].*scalar"),
    ({}, {"steps": [torch.zeros((), dtype=torch.int64)]}, TypeError, r"steps\[0\]"),
    ({}, {"anchor": [torch.zeros(2, dtype=torch.bfloat16)]}, TypeError, r"anchor\[0\]"),
    ({}, {"path": [torch.zeros(2, dtype=torch.bfloat16)]}, TypeError, r"path\[0\]"),
    ({}, {"path": []}, ValueError, "path"),
    ({"rounding_seed": 1}, {"master": [torch.zeros(2)]}, ValueError, "rounding_seed"),
]


@pytest.mark.parametrize(("options", "changed", "error", "message"), WRONG)
def test_a_refused_step_has_written_nothing(options, changed, error, message):
    lists = {
        name: [torch.ones(2)]
        for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "fisher", "anchor")
    }
    lists["steps"] = [torch.zeros(())]
    lists |= changed
    before = {
        name: [t.clone() for t in tensors if t is not None]
        for name, tensors in lists.items()
        if tensors is not None
    }
    with pytest.raises(error, match=message):
        functional.adam_step_(**lists, **(GOOD | options))
    for name, tensors in before.items():
        for one, other in zip(tensors, lists[name], strict=False):
            assert other is None or torch.equal(one, other)


def test_moments_of_different_dtypes_and_shared_memory_are_refused():
    half = torch.ones(2, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"exp_avg_sqs\[0\].*like exp_avgs"):
        functional.adam_step_(
            half, half.clone(), torch.zeros(2), half.clone(), torch.tensor(0.0), lr=1
        )
    theta, moment = torch.ones(2), torch.zeros(2)
    with pytest.raises(ValueError, match="memory of its own"):
        functional.adam_step_(theta, torch.ones(2), moment, moment, torch.tensor(0.0), lr=1)
    assert torch.equal(theta, torch.ones(2))


@pytest.mark.parametrize(
    ("buffers", "options", "message"),
    [
        (None, {"momentum": 0.9}, "momentum_buffers"),
        (torch.zeros(2), {}, "momentum_buffers"),
        (torch.zeros(2), {"momentum": 0.9, "dampening": 0.1, "nesterov": True}, "nesterov"),
        (torch.zeros(2), {"momentum": -0.9}, "momentum"),
    ],
)
def test_sgd_demands_options_that_fit(buffers, options, message):
    theta = torch.ones(2)
    with pytest.raises(ValueError, match=message):
        functional.sgd_step_(theta, torch.ones(2), buffers, lr=0.1, **options)
    assert torch.equal(theta, torch.ones(2))

"""Bad operands: each has its own clear error, and nothing is written."""

from __future__ import annotations

import math

import pytest
import torch

from ewc_fast import functional


def good():
    params = [torch.randn(3), torch.randn(2, 2)]
    return {
        "grads": [torch.randn_like(p) for p in params],
        "params": params,
        "fisher": [torch.rand_like(p) for p in params],
        "anchor": [torch.randn_like(p) for p in params],
    }


def call(arguments, **options):
    return functional.add_penalty_grad_(**arguments, **({"ewc_lambda": 1.0} | options))


def replace(name, index, tensor):
    def change(arguments):
        arguments[name][index] = tensor

    return change


BAD = {
    "grad_missing": (replace("grads", 1, None), TypeError, r"grads\[1\].*NoneType.*backward"),
    "grad_sparse": (
        replace("grads", 0, torch.randn(3).to_sparse()),
        TypeError,
        r"grads\[0\].*sparse.*sparse=False",
    ),
    "grad_on_another_device": (
        replace("grads", 1, torch.empty(2, 2, device="meta")),
        ValueError,
        r"grads\[1\].*device cpu like params\[1\], got meta.*\.to\('cpu'\)",
    ),
    "grad_of_another_dtype": (
        replace("grads", 0, torch.randn(3).half()),
        TypeError,
        r"grads\[0\].*float32 beside params\[0\] of float32, got float16.*\.to\(torch.float32\)",
    ),
    "integer_param": (
        replace("params", 0, torch.arange(3)),
        TypeError,
        r"params\[0\].*floating.*int64",
    ),
    "complex_param": (
        replace("params", 0, torch.randn(3, dtype=torch.complex64)),
        TypeError,
        r"params\[0\].*floating.*complex64",
    ),
    "fisher_of_another_shape": (
        replace("fisher", 1, torch.rand(4)),
        ValueError,
        r"fisher\[1\].*\(2, 2\) like params\[1\], got \(4,\)",
    ),
    "fisher_that_would_broadcast": (
        replace("fisher", 1, torch.rand(2, 1)),
        ValueError,
        r"fisher\[1\].*\(2, 2\).*got \(2, 1\)",
    ),
    "float16_fisher": (
        replace("fisher", 0, torch.rand(3).half()),
        TypeError,
        r"fisher\[0\]: expected float32 or bfloat16 beside params\[0\] of float32, got float16",
    ),
    "float64_fisher": (
        replace("fisher", 0, torch.rand(3).double()),
        TypeError,
        r"fisher\[0\]: expected float32 or bfloat16.*got float64.*\.to\(torch.float32\)",
    ),
    "bfloat16_anchor": (
        replace("anchor", 0, torch.randn(3).bfloat16()),
        TypeError,
        r"anchor\[0\].*float32.*got bfloat16",
    ),
    "no_tensor": (replace("anchor", 0, [1.0, 2.0, 3.0]), TypeError, r"anchor\[0\].*got list"),
    "list_too_short": (
        lambda arguments: arguments["fisher"].pop(),
        ValueError,
        r"fisher: expected 2 tensors like grads, got 1",
    ),
    "not_a_list": (
        lambda arguments: arguments.update(fisher=7),
        TypeError,
        r"fisher: expected a tensor or a list of tensors, got int",
    ),
    "a_dict": (
        lambda arguments: arguments.update(fisher={"a": torch.rand(3)}),
        TypeError,
        r"fisher: .*got dict",
    ),
    "grad_given_twice": (
        lambda arguments: [arguments[n].append(arguments[n][0]) for n in arguments],
        ValueError,
        r"grads\[.\].*shares memory with grads\[.\]",
    ),
    "grad_is_the_param": (
        lambda arguments: arguments["grads"].__setitem__(0, arguments["params"][0]),
        ValueError,
        r"grads\[0\].*shares memory with params\[0\]",
    ),
}


# PyTorch runs rows one after the other, so the reference does not mind shared memory.
PAIRS = [
    pytest.param(impl, *bad, id=f"{name}-{impl}")
    for name, bad in BAD.items()
    for impl in ("auto", "cpu", "reference")
    if not (impl == "reference" and "shares memory" in bad[2])
]


@pytest.mark.parametrize(("impl", "change", "error", "message"), PAIRS)
def test_bad_operands_raise_their_own_error_and_write_nothing(impl, change, error, message):
    arguments = good()
    change(arguments)
    tensors = [
        t
        for value in arguments.values()
        if isinstance(value, list)
        for t in value
        if isinstance(t, torch.Tensor) and t.device.type == "cpu" and not t.is_sparse
    ]
    before = [t.clone() for t in tensors]
    with pytest.raises(error, match=message):
        call(arguments, impl=impl)
    assert all(torch.equal(t, old) for t, old in zip(tensors, before, strict=True))


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, 1e39, -math.inf])
def test_lambda_must_be_a_finite_number_from_zero(value):
    arguments = good()
    before = [g.clone() for g in arguments["grads"]]
    with pytest.raises(ValueError, match=r"ewc_lambda: expected a number >= 0"):
        call(arguments, ewc_lambda=value)
    assert all(torch.equal(g, old) for g, old in zip(arguments["grads"], before, strict=True))


def test_lambda_must_be_a_number():
    with pytest.raises(TypeError, match="ewc_lambda: expected a number, got str"):
        call(good(), ewc_lambda="strong")


@pytest.mark.parametrize("value", [0.0, -0.5, 1.01, math.nan])
def test_gamma_must_be_in_its_interval(value):
    state = [torch.rand(3)], [torch.rand(3)]
    with pytest.raises(ValueError, match=r"gamma: expected a number in \(0, 1\]"):
        functional.merge_online_(*state, [torch.rand(3)], [torch.rand(3)], gamma=value)


def test_weight_and_learning_rate_must_not_be_negative():
    with pytest.raises(ValueError, match="weight: expected a number >= 0"):
        functional.accumulate_square_(torch.zeros(3), torch.zeros(3), weight=-1.0)
    one = torch.ones(3)
    with pytest.raises(ValueError, match="lr: expected a number >= 0"):
        functional.proximal_step_(one.clone(), one, one, ewc_lambda=1.0, lr=-0.1)
    with pytest.raises(ValueError, match=r"ewc_lambda \* lr"):
        functional.proximal_step_(one.clone(), one, one, ewc_lambda=1e30, lr=1e30)


def test_an_unknown_implementation_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"impl: expected one of 'auto', 'cpu', .*got 'gpu'"):
        call(good(), impl="gpu")


@pytest.mark.parametrize("impl", ["auto", "cpu", "reference"])
def test_a_bfloat16_fisher_is_for_narrower_parameters_than_float64(impl):
    row = [torch.rand(3).double() for _ in range(4)]
    row[2] = row[2].bfloat16()
    with pytest.raises(TypeError, match=r"fisher\[0\]: expected float64 beside .*got bfloat16"):
        functional.add_penalty_grad_(*row, ewc_lambda=1.0, impl=impl)


@pytest.mark.parametrize("impl", ["auto", "cpu", "reference"])
def test_a_new_fisher_must_have_the_states_dtype(impl):
    row = torch.rand(3), torch.rand(3), torch.rand(3).bfloat16(), torch.rand(3)
    with pytest.raises(TypeError, match=r"new_fisher\[0\]: expected float32.*got bfloat16"):
        functional.merge_online_(*row, impl=impl)


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (-1, ValueError, r"seed: expected an integer from 0 to 2\*\*32 - 1, got -1"),
        (2**32, ValueError, "seed: expected an integer from 0"),
        (1.0, TypeError, "seed: expected an integer or None, got float"),
        (True, TypeError, "seed: expected an integer or None, got bool"),
    ],
)
def test_a_seed_is_an_integer_of_32_bits(seed, error, message):
    fisher = torch.zeros(3)
    with pytest.raises(error, match=message):
        functional.accumulate_square_(fisher, torch.ones(3), seed=seed)
    with pytest.raises(error, match=message):
        functional.merge_online_(fisher, fisher.clone(), fisher, fisher, seed=seed)
    assert torch.equal(fisher, torch.zeros(3))


def test_the_residual_must_be_bfloat16():
    row = [torch.rand(3)], [torch.rand(3)], [torch.zeros(3)], [torch.rand(3)], [torch.rand(3)]
    with pytest.raises(TypeError, match=r"residual\[0\]: expected bfloat16"):
        functional.merge_(*row)


def test_stacked_gradients_must_match_behind_the_sample_dimension():
    with pytest.raises(ValueError, match=r"grads\[0\].*\(3,\) or \('samples', 3\).*got \(5, 4\)"):
        functional.accumulate_square_(torch.zeros(3), torch.zeros(5, 4))


def test_a_written_tensor_that_overlaps_itself_is_refused():
    grads = torch.zeros(1).expand(3)
    with pytest.raises((ValueError, RuntimeError), match="memory"):
        functional.add_penalty_grad_(
            grads, torch.ones(3), torch.ones(3), torch.zeros(3), ewc_lambda=1.0
        )

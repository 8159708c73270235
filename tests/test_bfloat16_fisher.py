"""A Fisher in bfloat16: read exactly, written by chance, right on average, the same everywhere."""

from __future__ import annotations

import math

import pytest
import torch
from cases import copies, state_like
from numerics import u

from ewc_fast import _plan, functional, reference
from ewc_fast._native import core, reader

BF16 = torch.bfloat16
ULP = 2.0**-7  # of bfloat16 in [1, 2)
PARAM_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = (1, 15, 17, 4097, 40_001)  # 40,001: three chunks

every_param_dtype = pytest.mark.parametrize("dtype", PARAM_DTYPES, ids=str)
every_level = pytest.mark.parametrize(
    "level", range(len(core.vector_levels)), ids=core.vector_levels
)


def on_level(operation, kernel, lists, coefficient, level, **seed):
    """Run a CPU kernel at one vector level."""
    specs = [(o.name, o.role, o.written, o.stacked, False) for o in operation.operands]
    plan = core.Plan(reader, specs)
    plan.adopt(*lists)
    return kernel(plan, coefficient, 1, level, **seed)


def operands(dtype, sizes=SIZES):
    """Return parameters, a Fisher in bfloat16, anchor, residual and a new Fisher."""
    params = [torch.randn(n).to(dtype) for n in sizes]
    fisher = [f.to(BF16) for f in state_like(params, True)]
    residual = [torch.zeros_like(p, dtype=BF16) for p in params]
    return params, fisher, state_like(params), residual, state_like(params, True)


def bits(tensors):
    return [t.view(torch.int16) for t in tensors]


def assert_same_bits(found, expected):
    for one, other in zip(bits(found), bits(expected), strict=True):
        assert torch.equal(one, other)


# Writing: every vector level rounds as the specification does


@every_param_dtype
@every_level
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_accumulating_equals_the_reference_bit_for_bit(dtype, level, weight):
    grads, fisher, *_ = operands(dtype)
    expected = copies(fisher)
    reference.accumulate_square_(expected, grads, weight=weight, seed=7)
    on_level(
        _plan.ACCUMULATE_SQUARE, core.accumulate_square, (fisher, grads), weight, level, seed=7
    )
    assert_same_bits(fisher, expected)


@every_param_dtype
@every_level
def test_samples_are_added_up_before_the_sum_is_rounded(dtype, level):
    _, fisher, *_ = operands(dtype)
    grads = [torch.randint(-9, 10, (6, *f.shape)).to(dtype) for f in fisher]  # squares add exactly
    expected = copies(fisher)
    reference.accumulate_square_(expected, grads, weight=0.25, seed=8)
    on_level(_plan.ACCUMULATE_SQUARE, core.accumulate_square, (fisher, grads), 0.25, level, seed=8)
    assert_same_bits(fisher, expected)


@every_param_dtype
@every_level
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_merging_equals_the_reference_bit_for_bit(dtype, level, gamma):
    params, fisher, anchor, residual, new = operands(dtype)
    expected, online = copies(fisher), copies(fisher)
    reference.merge_(
        expected, copies(anchor), copies(residual), new, params, gamma=gamma, seed=2**32 - 1
    )
    lists = online, copies(anchor), new, params
    on_level(_plan.MERGE_ONLINE, core.merge_online, lists, gamma, level, seed=2**32 - 1)
    lists = fisher, anchor, residual, new, params
    on_level(_plan.MERGE, core.merge, lists, gamma, level, seed=2**32 - 1)
    assert_same_bits(fisher, expected)
    assert_same_bits(online, expected)  # the Fisher is the same either way


@every_level
def test_infinity_and_nan_stay_what_they_are(level):
    special = torch.tensor([math.inf, math.nan, -math.nan, 0.0, 3.3e38] * 20)
    fisher, expected = torch.zeros(100, dtype=BF16), torch.zeros(100, dtype=BF16)
    lists = [fisher], [torch.zeros(100)], [special], [torch.zeros(100)]
    on_level(_plan.MERGE_ONLINE, core.merge_online, lists, 1.0, level, seed=1)
    reference.merge_online_([expected], [torch.zeros(100)], *lists[2:], gamma=1.0, seed=1)
    assert_same_bits([fisher], [expected])
    assert torch.equal(fisher.isnan(), special.isnan())
    assert torch.equal(fisher.isinf()[special.isinf()], torch.ones(20, dtype=torch.bool))
    assert torch.equal(fisher[3::5], torch.zeros(20, dtype=BF16))


LAYOUTS = {
    "transposed": lambda: torch.rand(33, 20, dtype=BF16).t(),
    "channels_last": lambda: torch.rand(4, 3, 5, 5, dtype=BF16).contiguous(
        memory_format=torch.channels_last
    ),
    "rows_with_gaps": lambda: torch.rand(6, 10, dtype=BF16)[:, ::2],
    "misaligned": lambda: torch.rand(1004, dtype=BF16)[3:],
    "scalar": lambda: torch.rand((), dtype=BF16),
    "empty": lambda: torch.rand(3, 0, 2, dtype=BF16),
}


def like(fisher):
    return torch.empty_strided(fisher.shape, fisher.stride()).normal_()


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_row_is_rounded_by_its_place_in_the_call_whatever_runs_it(impl):
    fisher = [make() for make in LAYOUTS.values()]
    grads = [like(f) for f in fisher]
    alone = copies(fisher)
    functional.accumulate_square_(fisher, grads, seed=3, impl=impl)
    for ordinal, row in enumerate(zip(alone, grads, strict=True)):
        reference.accumulate_square_(*([t] for t in row), weight=1.0, seed=3, ordinals=[ordinal])
    assert_same_bits(fisher, alone)


def test_elements_are_counted_in_the_order_of_memory():
    grads = torch.randn(20, 33)
    plain, transposed, gaps = (torch.zeros(20, n * 33, dtype=BF16) for n in (1, 1, 2))
    functional.accumulate_square_(plain, grads, seed=4)
    functional.accumulate_square_(transposed.t(), grads.t(), seed=4)
    functional.accumulate_square_(gaps[:, ::2], grads, seed=4)
    assert torch.equal(transposed, plain)
    assert torch.equal(gaps[:, ::2], plain)


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_the_number_of_threads_changes_nothing(threads):
    grads, fisher, *_ = operands(torch.float32, (70_001, 3, 120_000))
    again = copies(fisher)
    torch.set_num_threads(threads)
    functional.accumulate_square_(fisher, grads, seed=5)
    torch.set_num_threads(1)
    functional.accumulate_square_(again, grads, seed=5)
    assert_same_bits(fisher, again)


# Writing: right on average


@pytest.mark.parametrize("part", [2**-16, 0.1, 0.5, 0.9, 1 - 2**-16])
def test_the_mean_over_seeds_is_the_exact_value(part):
    elements, seeds = 4096, 100
    exact = 1 + part * ULP
    outcomes = []
    for seed in range(seeds):
        fisher = [torch.zeros(elements, dtype=BF16)]
        new = [torch.full((elements,), exact)]
        functional.merge_online_(fisher, [torch.zeros(elements)], new, new, seed=seed)
        outcomes.append(fisher[0].double())
    up = (torch.stack(outcomes) - 1) / ULP
    assert set(up.unique().tolist()) <= {0.0, 1.0}  # one of the two neighbours
    # of independent draws with probability `part`: the mean's standard error, and the variance of
    # each seed's mean over elements and each element's mean over seeds
    variance = part * (1 - part)
    assert abs(up.mean().item() - part) <= 4 * math.sqrt(variance / (elements * seeds))
    if min(part, 1 - part) >= 0.1:
        of_elements = up.mean(0).var().item() / (variance / seeds)
        of_seeds = up.mean(1).var().item() / (variance / elements)
        assert abs(of_elements - 1) <= 4 * math.sqrt(2 / elements)
        assert abs(of_seeds - 1) <= 4 * math.sqrt(2 / seeds)


def test_rows_of_a_call_are_rounded_independently():
    fisher = [torch.zeros(4096, dtype=BF16) for _ in range(2)]
    new = [torch.full((4096,), 1 + ULP / 2) for _ in range(2)]
    functional.merge_online_(fisher, [torch.zeros(4096) for _ in range(2)], new, new, seed=0)
    same = (fisher[0] == fisher[1]).double().mean().item()
    assert abs(same - 0.5) <= 4 * math.sqrt(0.25 / 4096)


def test_a_hundred_thousand_tiny_addends_are_not_lost():
    elements, steps, tiny = 256, 100_000, 2.0**-17
    fisher, grads = torch.ones(elements, dtype=BF16), torch.full((elements,), 2.0**-8)
    assert torch.equal((fisher.float() + tiny).to(BF16), fisher)  # to nearest it would stand still
    plan = functional.Plan()
    for step in range(steps):
        functional.accumulate_square_(fisher, grads, weight=0.5, seed=step, plan=plan)
    added = steps * tiny  # 0.76
    # Each step goes up by an ulp with probability tiny / ulp: variance tiny ulp, in all added ulp.
    # (Relative to the sum: sqrt(ulp added) / sum <= 2^-3.5 sqrt(added / sum).)
    deviation = math.sqrt(ULP * added)
    error = fisher.double() - (1 + added)
    assert abs(error.mean().item()) <= 4 * deviation / math.sqrt(elements)
    assert error.abs().max().item() <= 5 * deviation


# Reading: exactly what the same numbers in float32 give


@every_param_dtype
@every_level
def test_operations_that_read_it_give_the_bits_of_the_same_numbers_in_float32(dtype, level):
    params, fisher, anchor, *_ = operands(dtype)
    wide = [f.float() for f in fisher]
    results = []
    for kept in (fisher, wide):
        grads, out, moved = ([p.clone() for p in params] for _ in range(3))
        lists = params, kept, anchor
        values = [
            on_level(_plan.ADD_PENALTY_GRAD, core.add_penalty_grad, (grads, *lists), 1.7, level),
            on_level(_plan.PENALTY, core.penalty, lists, 1.7, level),
        ]
        on_level(_plan.PENALTY_GRAD, core.penalty_grad, (out, *lists), 1.7, level)
        on_level(_plan.PROXIMAL_STEP, core.proximal_step, (moved, kept, anchor), 0.3, level)
        results.append([torch.tensor(values), *grads, *out, *moved])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@every_param_dtype
def test_the_reference_reads_it_exactly_too(dtype):
    params, fisher, anchor, *_ = operands(dtype)
    wide = [f.float() for f in fisher]
    results = []
    for kept in (fisher, wide):
        grads, moved = ([p.clone() for p in params] for _ in range(2))
        value = reference.add_penalty_grad_(grads, params, kept, anchor, ewc_lambda=1.7)
        reference.proximal_step_(moved, kept, anchor, ewc_lambda=1.7, lr=0.1)
        results.append([value, *grads, *moved])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_rounding_a_fisher_to_nearest_moves_its_pull_by_half_an_ulp_at_most():
    params, _, anchor, _, fisher = operands(torch.float32, (10_000,))
    pulls = []
    for kept in (fisher[0], fisher[0].to(BF16)):
        grad = torch.zeros(10_000)
        functional.add_penalty_grad_(grad, params, kept, anchor, ewc_lambda=1.0)
        pulls.append(grad.double())
    # the Fisher's rounding, and three float32 operations on either side
    budget = u(BF16) + 6 * u(torch.float32)
    assert ((pulls[1] - pulls[0]).abs() <= budget * pulls[0].abs()).all()


def test_the_penalty_is_differentiable():
    theta, anchor = torch.randn(50, requires_grad=True), torch.randn(50)
    fisher = torch.rand(50).to(BF16)
    value = functional.penalty(theta, fisher, anchor, ewc_lambda=3.0)
    (grad,) = torch.autograd.grad(value, theta, create_graph=True)
    torch.testing.assert_close(grad, 3 * fisher.float() * (theta - anchor))
    (second,) = torch.autograd.grad(grad.sum(), theta)
    torch.testing.assert_close(second, 3 * fisher.float())


def test_one_plan_notices_that_a_fisher_became_bfloat16():
    plan, (grads, _, _, _, fisher) = functional.Plan(), operands(torch.float32, (100,))
    functional.accumulate_square_(fisher, grads, plan=plan)
    narrow = [fisher[0].to(BF16)]
    expected = copies(narrow)
    functional.accumulate_square_(narrow, grads, seed=6, plan=plan)
    reference.accumulate_square_(expected, grads, weight=1.0, seed=6)
    assert_same_bits(narrow, expected)


# Seeds


def calls(fisher, seed):
    one = [torch.ones(1000)]
    residual = [torch.zeros(1000, dtype=BF16)]
    functional.accumulate_square_(fisher, one, weight=0.1, **seed)
    functional.merge_(fisher, [torch.zeros(1000)], residual, one, one, gamma=0.7, **seed)
    functional.merge_online_(fisher, [torch.zeros(1000)], one, one, gamma=0.7, **seed)


@pytest.mark.parametrize(
    ("dtype", "seed", "draws"),
    [
        pytest.param(torch.float32, {}, False, id="float32"),
        pytest.param(BF16, {"seed": 9}, False, id="seed_given"),
        pytest.param(BF16, {}, True, id="seed_drawn"),
    ],
)
def test_a_seed_is_drawn_only_where_it_is_used(dtype, seed, draws):
    before = torch.get_rng_state()
    calls([torch.ones(1000, dtype=dtype)], seed)
    assert torch.equal(torch.get_rng_state(), before) != draws


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_call_that_raises_draws_nothing(impl):
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="shape"):
        functional.accumulate_square_(torch.ones(3, dtype=BF16), torch.ones(4), impl=impl)
    assert torch.equal(torch.get_rng_state(), before)


def test_manual_seed_makes_runs_repeat_and_seeds_differ():
    def run(seed):
        torch.manual_seed(seed)
        fisher = [torch.ones(1000, dtype=BF16)]
        calls(fisher, {})
        return fisher[0]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize("seed", [None, 11])
def test_a_compiled_call_rounds_as_an_eager_one(seed):
    def run(fisher, grads):
        functional.accumulate_square_(fisher, grads, weight=0.3, seed=seed)

    grads, fisher, *_ = operands(torch.float32, (1000, 77))
    eager = copies(fisher)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the second run of the graph draws anew
        torch.manual_seed(3)
        compiled(fisher, grads)
        compiled(fisher, grads)
        torch.manual_seed(3)
        run(eager, grads)
        run(eager, grads)
        assert_same_bits(fisher, eager)

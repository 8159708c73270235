"""Triton's list operations: on a GPU where there is one, else in Triton's interpreter.

The interpreter drops bits where a GPU rounds to nearest, when bfloat16 is stored: an error below
one unit in the last place instead of half of one. The budgets of ``numerics`` are twice the first
order in any case; where one is not, ``STORE`` stands in it.
"""

from __future__ import annotations

import random

import pytest
import torch
from cases import DTYPES, LAYOUTS, copies, every_dtype, state_like
from numerics import assert_within, compute_dtype, gradient_budget, smallest, u, value_budget

from ewc_fast import _engine, functional, reference
from ewc_fast._plan import ACCUMULATE_SQUARE, MERGE, MERGE_ONLINE, Plan

pytest.importorskip("triton")

from ewc_fast._triton import launch, table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STORE = 1 if DEVICE == "cuda" else 2
LAMBDA = 2.7

# The interpreter takes a millisecond for each program and block.
LONG = {"thousands_of_tiny", "one_large", "threads_get_unequal_tensors"} if DEVICE == "cpu" else {}
FITTING = {
    name: make for name, make in LAYOUTS.items() if name not in {"strided_with_gaps", *LONG}
} | {"many_tiny": lambda dtype: [torch.randn(3).to(dtype) for _ in range(40)]}
every_layout = pytest.mark.parametrize(
    "make", [pytest.param(make, id=name) for name, make in FITTING.items()]
)


def there(*lists):
    """Copies on the device, with the same strides and misalignment."""
    return [[t.to(DEVICE) if DEVICE == "cpu" else moved(t) for t in copies(ts)] for ts in lists]


def moved(tensor):
    room = tensor.untyped_storage().nbytes() // tensor.itemsize
    whole = torch.as_strided(tensor, (room,), (1,), 0).to(DEVICE)
    return torch.as_strided(whole, tensor.shape, tensor.stride(), tensor.storage_offset())


def here(tensors):
    return [t.cpu() for t in tensors]


def scene(make, dtype):
    params = make(dtype)
    return params, state_like(params, True), state_like(params)


def pulls(params, fisher, anchor):
    return [
        LAMBDA * f.double() * (p.double() - a.double())
        for p, f, a in zip(params, fisher, anchor, strict=True)
    ]


@every_dtype
@every_layout
def test_add_penalty_grad_adds_the_gradient_and_returns_the_value(make, dtype):
    params, fisher, anchor = scene(make, dtype)
    before = [0.1 * g for g in make(dtype)]
    grads, *others = there(before, params, fisher, anchor)
    value = functional.add_penalty_grad_(grads, *others, ewc_lambda=LAMBDA, impl="triton")
    for found, old, pull in zip(here(grads), before, pulls(params, fisher, anchor), strict=True):
        budget = gradient_budget(old.double(), pull, dtype)
        assert_within(found, old.double() + pull, budget, "grad")
    exact = reference.penalty(params, fisher, anchor, ewc_lambda=LAMBDA).item()
    assert value.dtype == torch.float64
    assert value.device.type == DEVICE or not params
    assert abs(value.item() - exact) <= value_budget(exact, dtype)


@every_dtype
@every_layout
def test_penalty_and_its_gradient_equal_their_formulas(make, dtype, poisoned_memory):
    params, fisher, anchor = scene(make, dtype)
    lists = there(params, fisher, anchor)
    value = _engine.penalty(*lists, LAMBDA, impl="triton")
    exact = reference.penalty(params, fisher, anchor, ewc_lambda=LAMBDA).item()
    assert abs(value.item() - exact) <= value_budget(exact, dtype)
    grads = _engine.penalty_grad(*lists, LAMBDA, impl="triton")
    for found, pull in zip(here(grads), pulls(params, fisher, anchor), strict=True):
        budget = gradient_budget(torch.zeros_like(pull), pull, dtype)
        assert_within(found, pull, budget, "gradient")


@every_dtype
@every_layout
@pytest.mark.parametrize("samples", [None, 0, 3], ids=lambda s: f"samples_{s}")
def test_accumulate_square_adds_weighted_squares_of_every_sample(make, dtype, samples):
    params, before, _ = scene(make, dtype)
    grads = params if samples is None else [torch.randn(samples, *p.shape) for p in params]
    if samples is not None:  # in the layout of the parameters
        strides = [(p.numel(), *p.stride()) for p in params]
        grads = [
            torch.empty_strided(g.shape, s, dtype=dtype).copy_(g)
            for g, s in zip(grads, strides, strict=True)
        ]
    (fisher,) = there(before)
    functional.accumulate_square_(fisher, [g.to(DEVICE) for g in grads], weight=0.3, impl="triton")
    for found, old, g in zip(here(fisher), before, grads, strict=True):
        squares = g.double().square()
        total = old.double() + 0.3 * (squares if samples is None else squares.sum(0))
        # one square, `samples` additions, weight, product, sum
        budget = 2 * (5 + (samples or 1)) * u(old.dtype) * total + smallest(old.dtype)
        assert_within(found, total, budget, "fisher")


@every_dtype
@every_layout
def test_merge_adds_two_quadratics_into_one(make, dtype):
    params, before, anchor_before = scene(make, dtype)
    new = state_like(params, True)
    for f, n in zip(before, new, strict=True):
        f.flatten()[::3].zero_() if f.is_contiguous() else None
        n.flatten()[::2].zero_() if n.is_contiguous() else None
    zeros = [torch.zeros_like(p, dtype=torch.bfloat16) for p in params]
    lists = there(before, anchor_before, zeros, new, params)
    constant = functional.merge_(*lists, gamma=0.9, impl="triton")
    exact_constant = 0.0
    rows = zip(*map(here, lists), before, anchor_before, strict=True)
    for f, a, r, n, p, f_old, a_old in rows:
        kept, distance = 0.9 * f_old.double(), p.double() - a_old.double()
        total = kept + n.double()
        share = torch.where(kept > 0, n.double() / total, 1.0)
        exact = torch.where(kept > 0, a_old.double() + share * distance, p.double())
        exact_constant += (0.5 * share * kept * distance.square()).sum().item()
        state, double = u(f.dtype), u(torch.float64)
        assert_within(f, total, (state + 2 * double) * total, "fisher: rounded once")
        inner = 8 * double * (a_old.double().abs() + p.double().abs())
        assert_within(a, exact, state * exact.abs() + inner, "anchor: rounded once")
        budget = STORE * state * u(torch.bfloat16) * exact.abs() + inner + 1e-42
        assert_within(a.double() + r.double(), exact, budget, "anchor + residual")
    assert constant.item() == pytest.approx(exact_constant, rel=1e-12, abs=0)


@every_dtype
@every_layout
def test_merge_online_decays_adds_and_moves_the_anchor(make, dtype):
    params, before, anchor = scene(make, dtype)
    new = state_like(params, True)
    lists = there(before, anchor, new, params)
    functional.merge_online_(*lists, gamma=0.8, impl="triton")
    for f, a, n, p, old in zip(*map(here, lists), before, strict=True):
        total = 0.8 * old.double() + n.double()
        assert_within(f, total, (u(f.dtype) + 2 * u(torch.float64)) * total, "fisher")
        assert torch.equal(a, p.to(a.dtype))


@every_dtype
@every_layout
@pytest.mark.parametrize("strength", [0.0, 1.0, 1e30])
def test_proximal_step_lands_between_parameter_and_anchor(make, dtype, strength):
    before, fisher, anchor = scene(make, dtype)
    params, *others = there(before, fisher, anchor)
    functional.proximal_step_(params, *others, ewc_lambda=strength, lr=1.0, impl="triton")
    for p, old, f, a in zip(here(params), before, fisher, anchor, strict=True):
        s, theta, rest = strength * f.double(), old.double(), a.double()
        exact = (theta + s * rest) / (1 + s)
        # five roundings of the pull, then the difference and the store
        distance = (theta - rest).abs()
        compute = u(compute_dtype(dtype))
        budget = 6 * compute * distance + (compute + u(dtype)) * (exact.abs() + distance * compute)
        assert_within(p, exact, 2 * budget + smallest(dtype), "params")
        if strength == 0:
            assert torch.equal(p, old)


def test_mixed_dtypes_in_one_list_are_each_computed_in_their_own():
    params = [torch.randn(n).to(dtype) for n in (50, 1030) for dtype in DTYPES]
    fisher, anchor = state_like(params, True), state_like(params)
    grads, *others = there([torch.zeros_like(p) for p in params], params, fisher, anchor)
    value = functional.add_penalty_grad_(grads, *others, ewc_lambda=LAMBDA, impl="triton")
    for grad, pull in zip(here(grads), pulls(params, fisher, anchor), strict=True):
        assert_within(grad, pull, gradient_budget(pull * 0, pull, grad.dtype), str(grad.dtype))
    exact = reference.penalty(params, fisher, anchor, ewc_lambda=LAMBDA).item()
    assert abs(value.item() - exact) <= value_budget(exact, torch.float32)


def test_nothing_beside_a_tensor_is_written():
    rooms = [torch.full((n + 9,), 7.0, device=DEVICE) for n in (5, 1024, 2049)]
    grads = [room[5:-4] if i else room[4:-5] for i, room in enumerate(rooms)]
    ones = [torch.ones_like(g) for g in grads]
    functional.add_penalty_grad_(grads, ones, ones, ones, ewc_lambda=LAMBDA, impl="triton")
    functional.accumulate_square_(grads, ones, weight=2.0, impl="triton")
    for room, grad in zip(rooms, grads, strict=True):
        assert (grad == 9).all()
        assert (room == 9).sum() == grad.numel()
        assert (room == 7).sum() == 9


def test_a_flat_buffer_and_a_list_give_the_same_gradient():
    params = [torch.randn(n) for n in (5, 1000, 77)]
    lists = there([torch.zeros_like(p) for p in params], params, state_like(params), params[::-1])
    lists[3] = there(state_like(params))[0]
    flat = [torch.cat(tensors) for tensors in lists]
    functional.add_penalty_grad_(*lists, ewc_lambda=LAMBDA, impl="triton")
    functional.add_penalty_grad_(*flat, ewc_lambda=LAMBDA, impl="triton")
    assert torch.equal(flat[0], torch.cat(lists[0]))


def test_the_value_repeats_bit_for_bit():
    params, fisher, anchor = there(*scene(lambda dtype: [torch.randn(40_001)], torch.float32))
    values = {_engine.penalty(params, fisher, anchor, 1.0, impl="triton").item() for _ in range(3)}
    assert len(values) == 1


class TestBfloat16Fisher:
    """What is written is the value in float32, rounded by chance as ``csrc/math.h`` does."""

    SEED, ORDINALS = 0xDEADBEEF, [4, 0]
    SIZES = [1027, 70]  # whole blocks and tails; the second row is misaligned

    @pytest.fixture
    def rows(self):
        fisher = [torch.rand(n + 1).bfloat16()[i:][:n] for i, n in enumerate(self.SIZES)]
        fisher[0][:3] = torch.tensor([float("nan"), float("inf"), 3.3e38]).bfloat16()
        new, anchor, params = ([torch.randn(n) for n in self.SIZES] for _ in range(3))
        return fisher, [n.abs() for n in new], anchor, params

    def run(self, operation, lists, coefficient):
        rows = table.Table(operation, lists, self.ORDINALS)
        launch.run(operation.name, rows, coefficient, self.SEED)

    @classmethod
    def rounded(cls, values, ordinal):
        row_seed = random_bits(cls.SEED, ordinal)
        made = []
        for i, bits in enumerate(values.float().view(torch.int32).tolist()):
            bits, bits_of_chance = bits % 2**32, random_bits(row_seed, i)
            if bits % 2**31 > 0x7F800000:
                made.append(bits >> 16 | 0x40)
            else:
                made.append(bits + bits_of_chance % 2**16 >> 16)
        return torch.tensor(made).to(torch.int16).view(torch.bfloat16)

    def check(self, fisher, exact):
        for found, values, ordinal in zip(here(fisher), exact, self.ORDINALS, strict=True):
            expected = self.rounded(values, ordinal)
            assert torch.equal(found.view(torch.int16), expected.view(torch.int16))

    def test_accumulate_square(self, rows):
        before, grads = rows[0], rows[3]
        fisher, on_device = there(before, grads)
        self.run(ACCUMULATE_SQUARE, [fisher, on_device], 0.25)
        self.check(fisher, [f.float() + 0.25 * g * g for f, g in zip(before, grads, strict=True)])

    def test_merge(self, rows):
        zeros = [torch.zeros(n, dtype=torch.bfloat16) for n in self.SIZES]
        lists = there(rows[0], rows[2], zeros, rows[1], rows[3])
        self.run(MERGE, lists, 0.9)
        exact = [0.9 * f.double() + n.double() for f, n in zip(rows[0], rows[1], strict=True)]
        self.check(lists[0], exact)

    def test_merge_online(self, rows):
        lists = there(rows[0], rows[2], rows[1], rows[3])
        self.run(MERGE_ONLINE, lists, 0.9)
        exact = [0.9 * f.double() + n.double() for f, n in zip(rows[0], rows[1], strict=True)]
        self.check(lists[0], exact)

    def test_small_addends_arrive_on_average(self):
        n, addend, times = 4096, 2.0**-12, 16
        fisher = [torch.ones(n, dtype=torch.bfloat16, device=DEVICE)]
        grads = [torch.ones(n, device=DEVICE)]
        seeds = random.Random(0)
        for _ in range(times):
            rows = table.Table(ACCUMULATE_SQUARE, [fisher, grads], [0])
            launch.run("accumulate_square_", rows, addend, seeds.getrandbits(32))
        # each rounding moves by 2^-7 with a chance of 2^-5: a standard deviation of 2^-9.5
        deviation = 2.0**-9.5 * (times / n) ** 0.5
        assert abs(fisher[0].double().mean().item() - 1 - times * addend) < 5 * deviation


def random_bits(seed, element):
    """``csrc/math.h``'s, in whole numbers."""
    low, high = element % 2**32, element >> 32
    bits = (seed ^ low * 0x9E3779B1 ^ high * 0x7FEB352D) % 2**32
    bits = (bits ^ bits >> 16) * 0x85EBCA6B % 2**32
    bits = (bits ^ bits >> 13) * 0xC2B2AE35 % 2**32
    return bits ^ bits >> 16


class TestTable:
    """A plan's table goes to the device once, and again only when an address has changed."""

    @pytest.fixture
    def uploads(self, monkeypatch):
        made = []
        staged = table._staged
        monkeypatch.setattr(table, "_staged", lambda *a: (made.append(1), staged(*a))[1])
        return made

    @staticmethod
    def lists(sizes=(5, 2000)):
        params = [torch.randn(n) for n in sizes]
        return there([torch.zeros_like(p) for p in params], params, *[state_like(params)] * 2)

    def call(self, lists, plan):
        lists[0] = [torch.zeros_like(g).copy_(g) if g is None else g for g in lists[0]]
        before = [g.clone() for g in lists[0]]
        functional.add_penalty_grad_(*lists, ewc_lambda=LAMBDA, impl="triton", plan=plan)
        for grad, old, pull in zip(lists[0], before, pulls(*lists[1:]), strict=True):
            budget = gradient_budget(old.double(), pull, torch.float32)
            assert_within(grad, old.double() + pull, budget, "grad")

    def test_nothing_is_copied_while_addresses_stay(self, uploads):
        lists, plan = self.lists(), Plan()
        self.call(lists, plan)
        first = len(uploads)
        self.call(lists, plan)
        assert len(uploads) == first == 2  # records and chunks

    def test_a_new_address_is_taken_over_in_one_copy(self, uploads):
        lists, plan = self.lists(), Plan()
        self.call(lists, plan)
        lists[0] = [g.clone() for g in lists[0]]
        self.call(lists, plan)
        assert len(uploads) == 3

    def test_a_flat_buffer_needs_no_table(self, uploads):
        lists, plan = self.lists([3000]), Plan()
        self.call(lists, plan)
        lists[0] = [lists[0][0].clone()]
        self.call(lists, plan)
        assert not uploads

    def test_a_changed_form_makes_a_new_table(self):
        plan = Plan()
        for sizes in ([5, 2000], [7, 9, 11], [5], []):
            self.call(self.lists(sizes), plan)

    def test_what_a_graph_reads_is_kept_and_never_written_again(self, monkeypatch):
        lists, plan = self.lists(), Plan()
        self.call(lists, plan)
        with monkeypatch.context() as capture:
            capture.setattr(table, "_capturing", lambda device: True)
            self.call(lists, plan)
            lists[0] = [g.clone() for g in lists[0]]
            with pytest.raises(RuntimeError, match="run the call once before the capture"):
                self.call(lists, plan)
        read = plan._kept.table.read_by_graphs[0]
        before = read.clone()
        self.call(lists, plan)
        assert torch.equal(read, before)
        self.call(self.lists([7]), plan)
        assert any(tensor is read for tensor in plan._read_by_graphs)

    @pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
    def test_a_captured_call_repeats(self):
        lists, plan = self.lists(), Plan()
        self.call(lists, plan)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            functional.add_penalty_grad_(*lists, ewc_lambda=LAMBDA, impl="triton", plan=plan)
        self.call([[g.clone() for g in lists[0]], *lists[1:]], plan)
        lists[0][0].zero_(), lists[0][1].zero_()
        graph.replay()
        for grad, pull in zip(lists[0], pulls(*lists[1:]), strict=True):
            assert_within(grad, pull, gradient_budget(0 * pull, pull, torch.float32), "grad")

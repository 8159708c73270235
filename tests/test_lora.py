"""EWC on the weights that low-rank adapters change: formula, gradients, memory, messages."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_within, u
from torch._dynamo.utils import counters

import ewc_fast.lora
from ewc_fast import LoRAPenalty, LowRankDelta

RANK, STRENGTH = 3, 7.0
SHAPES = {"one_block": (6, 5), "many_blocks": (50, 9), "one_row": (1, 4), "empty": (0, 4)}


def delta(outputs=6, inputs=5, dtype=torch.float32, scaling=0.5):
    a = torch.randn(RANK, inputs).to(dtype).requires_grad_()
    b = torch.randn(outputs, RANK).to(dtype).requires_grad_()
    state = torch.float64 if dtype == torch.float64 else torch.float32
    return LowRankDelta(a, b, scaling, torch.rand(outputs, inputs, dtype=state))


def by_definition(change, strength=STRENGTH):
    """Return value and gradients by autograd in float64, and by how much roundings enlarge them."""
    a = change.lora_a.detach().double().requires_grad_()
    b = change.lora_b.detach().double().requires_grad_()
    fisher = change.fisher.double()
    value = strength / 2 * (fisher * (change.scaling * b @ a).square()).sum()
    value.backward()
    # The same with all signs gone: what no sum of rounded terms can exceed.
    s, a_, b_ = abs(change.scaling), a.detach().abs(), b.detach().abs()
    pull = strength * s * fisher * (s * b_ @ a_)
    most = 0.5 * (pull / s * (s * b_ @ a_)).sum().item(), b_.T @ pull, pull @ a_.T
    return (value.item(), a.grad, b.grad), most


def assert_exact(change, value, grads, stored):
    """Every term takes at most as many roundings as its sums are long, and a few for products."""
    (exact, *exact_grads), (most, *most_grads) = by_definition(change)
    compute = torch.float64 if stored == torch.float64 else torch.float32
    outputs, inputs = change.fisher.shape
    assert abs(value.item() - exact) <= 2 * (2 * RANK + 6) * u(compute) * most
    for grad, expected, size, length in zip(
        grads, exact_grads, most_grads, (outputs, inputs), strict=True
    ):
        rounded = u(stored) * expected.abs() if stored != compute else 0.0
        assert_within(grad, expected, (RANK + length + 6) * u(compute) * size + rounded, "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_value_and_gradients_are_those_of_the_merged_weight(shape, dtype, device, monkeypatch):
    monkeypatch.setattr(ewc_fast.lora, "BLOCK", 64)  # 7 rows of 9
    change = delta(*shape, dtype)
    penalty = LoRAPenalty({"layer": change}, ewc_lambda=STRENGTH)
    value = penalty.penalty()
    grads = torch.autograd.grad(value, (change.lora_a, change.lora_b))
    assert_exact(change, value.detach(), grads, dtype)
    value = penalty.add_penalty_grad_()
    assert_exact(change, value, (change.lora_a.grad, change.lora_b.grad), dtype)


def test_gradients_match_finite_differences():
    changes = {str(n): delta(4, 5, torch.float64) for n in range(2)}

    def value(*factors):
        moved = {
            name: LowRankDelta(a, b, c.scaling, c.fisher)
            for (name, c), a, b in zip(changes.items(), factors[::2], factors[1::2], strict=True)
        }
        return LoRAPenalty(moved, ewc_lambda=STRENGTH).penalty()

    factors = [f for c in changes.values() for f in (c.lora_a, c.lora_b)]
    assert torch.autograd.gradcheck(value, factors)


def test_a_bfloat16_or_transposed_fisher_will_do():
    change = delta(6, 5)
    for fisher in (change.fisher.bfloat16(), change.fisher.T.contiguous().T):
        other = LowRankDelta(change.lora_a, change.lora_b, change.scaling, fisher)
        other.lora_a.grad = other.lora_b.grad = None
        value = LoRAPenalty({"layer": other}, ewc_lambda=STRENGTH).add_penalty_grad_()
        assert_exact(other, value, (other.lora_a.grad, other.lora_b.grad), torch.float32)


def test_in_place_gradients_are_added_to_what_is_there():
    change = delta()
    before = [torch.randn_like(f) for f in (change.lora_a, change.lora_b)]
    change.lora_a.grad, change.lora_b.grad = (grad.clone() for grad in before)
    LoRAPenalty({"layer": change}, ewc_lambda=STRENGTH).add_penalty_grad_()
    (_, *exact), (_, *most) = by_definition(change)
    for factor, old, pull, size in zip(
        (change.lora_a, change.lora_b), before, exact, most, strict=True
    ):
        budget = 20 * u(torch.float32) * size + u(torch.float32) * (old + pull).abs()
        assert_within(factor.grad, old + pull, budget, "sum")


def test_autocast_changes_nothing():
    change = delta()
    penalty = LoRAPenalty({"layer": change}, ewc_lambda=STRENGTH)
    with torch.autocast("cpu", torch.bfloat16):
        value = penalty.penalty()
    value.backward()
    assert_exact(change, value.detach(), (change.lora_a.grad, change.lora_b.grad), torch.float32)


def test_a_frozen_adapter_is_a_constant_and_a_frozen_factor_gets_no_gradient():
    change = delta()
    penalty = LoRAPenalty({"layer": change}, ewc_lambda=STRENGTH)
    whole = penalty.penalty().item()
    change.lora_a.requires_grad_(False)
    assert penalty.add_penalty_grad_().item() == whole
    assert change.lora_a.grad is None
    assert change.lora_b.grad is not None
    change.lora_b.requires_grad_(False)
    assert penalty.add_penalty_grad_().item() == penalty.penalty().item() == 0.0


def test_memory_stays_within_some_blocks(monkeypatch):
    monkeypatch.setattr(ewc_fast.lora, "BLOCK", 2**10)
    change, largest = delta(512, 256), 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out._base is None:
                largest = max(largest, out.numel())
            return out

    with Watch():
        LoRAPenalty({"layer": change}, ewc_lambda=STRENGTH).add_penalty_grad_()
    assert largest <= max(2**10, RANK * 512)


WRONG = {
    "rank": (lambda a, b, f: (a[:2], b, f), ValueError, r"lora_b: expected shape \(outputs, 2\)"),
    "shape": (lambda a, b, f: (a, b, f.T), ValueError, r"fisher: expected shape \(6, 5\)"),
    "dtype": (lambda a, b, f: (a, b.double(), f), TypeError, "lora_b: expected float32 like"),
    "integers": (lambda a, b, f: (a, b, f.long()), TypeError, "fisher: expected a floating dtype"),
    "dims": (lambda a, b, f: (a[0], b, f), ValueError, "lora_a: expected two dimensions"),
    "device": (lambda a, b, f: (a, b, f.to("meta")), ValueError, "fisher: expected device cpu"),
}


@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_does_not_fit_is_named(change, error, message):
    right = delta()
    a, b, fisher = change(right.lora_a, right.lora_b, right.fisher)
    with pytest.raises(error, match=message):
        LowRankDelta(a, b, 1.0, fisher)


def test_changes_come_by_name():
    with pytest.raises(TypeError, match="deltas: expected LowRankDelta by layer name, got list"):
        LoRAPenalty([delta()], ewc_lambda=1.0)


def test_it_compiles_into_a_loss_without_graph_breaks():
    change = delta()
    penalty = LoRAPenalty({"layer": change}, ewc_lambda=STRENGTH)
    compiled = torch.compile(penalty.penalty, fullgraph=True, backend="aot_eager")
    value = compiled()
    value.backward()
    assert_exact(change, value.detach(), (change.lora_a.grad, change.lora_b.grad), torch.float32)


@pytest.mark.parametrize("way", ["penalty", "add_penalty_grad_"])
def test_one_graph_serves_every_lambda(way):
    torch._dynamo.reset()
    counters.clear()
    change = delta()
    penalty = LoRAPenalty({"layer": change}, ewc_lambda=STRENGTH)
    compiled = torch.compile(lambda: getattr(penalty, way)(), fullgraph=True, backend="aot_eager")
    change.lora_a.grad, change.lora_b.grad = map(torch.zeros_like, (change.lora_a, change.lora_b))
    for strength in (STRENGTH, 0.0, 3.5, 1e4):
        penalty.ewc_lambda = strength
        value = getattr(penalty, way)().item()
        assert abs(compiled().item() - value) <= 8 * u(torch.float64) * value
    assert counters["stats"]["unique_graphs"] == 1

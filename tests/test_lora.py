"""EWC of low-rank adapters: on their factors as usual, and on the weights that they change."""

from __future__ import annotations

import copy

import pretrained
import pytest
import torch
from numerics import assert_within, u
from torch import nn

import ewc_fast.lora
from ewc_fast import EWC, EWCOptimizer, LoRAPenalty, LowRankDelta, fisher_diagonal, lora_deltas

RANK, STRENGTH = 3, 7.0
SHAPES = {"one_block": (6, 5), "many_blocks": (50, 9), "one_row": (1, 4), "empty": (0, 4)}
PEFT = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


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


# With peft


def base(seed=0):
    torch.manual_seed(seed)
    return pretrained.bert().eval()


def data(samples=6):
    return [(pretrained.padded(samples), torch.randint(pretrained.LABELS, (samples,)))]


def adapted(model, **options):
    peft = pytest.importorskip("peft")
    options = {"r": 2, "lora_alpha": 3, "target_modules": ["query", "value"]} | options
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **options))
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:  # 0 before training
                param.normal_(std=0.1)
    return model


def logits(model, inputs):
    return model(**inputs).logits


@PEFT
def test_the_recipe_from_the_base_models_fisher_to_the_penalty_of_the_merged_weights():
    model, old_task, loader = base(), data(), data()
    fisher = fisher_diagonal(model, old_task)
    anchor = {name: p.detach().clone() for name, p in model.named_parameters()}

    model = adapted(model)
    penalty = LoRAPenalty(lora_deltas(model, fisher), ewc_lambda=STRENGTH)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for inputs, targets in loader * 3:
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits(model, inputs), targets).backward()
        penalty.add_penalty_grad_()
        optimizer.step()

    value = penalty.penalty().item()
    merged = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    names = [f"{name}.weight" for name in penalty.deltas]
    assert len(names) == 4
    assert all(name.endswith(("query.weight", "value.weight")) for name in names)
    exact, budget = 0.0, 0.0
    for name in names:
        rounding = (
            4 * u(torch.float32) * (merged[name].double().abs() + anchor[name].double().abs())
        )
        distance = merged[name].double() - anchor[name].double()
        exact += 0.5 * STRENGTH * (fisher[name].double() * distance**2).sum().item()
        budget += STRENGTH * (fisher[name].double() * rounding * distance.abs()).sum().item()
    assert exact > 0
    assert abs(value - exact) <= budget + 50 * u(torch.float32) * exact


@PEFT
def test_the_pull_brings_the_merged_weights_back():
    distances = []
    for strength in (0.0, 1e3):
        model, batches = base(), data()
        fisher = fisher_diagonal(model, batches)
        model = adapted(model)
        penalty = LoRAPenalty(lora_deltas(model, fisher), ewc_lambda=strength)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(20):
            optimizer.zero_grad()
            penalty.add_penalty_grad_()
            optimizer.step()
        penalty.ewc_lambda = 2.0
        distances.append(penalty.penalty().item())
    assert distances[1] < 0.2 * distances[0]


@PEFT
def test_transposed_weights_and_rank_stabilised_scaling_are_understood():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = pretrained.gpt2()
    fisher = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, use_rslora=True)
    model = peft.get_peft_model(model, config)
    for name, delta in lora_deltas(model, fisher).items():
        layer = model.get_submodule(f"base_model.model.{name}")
        nn.init.normal_(layer.lora_B["default"].weight)
        change = layer.get_delta_weight("default")
        exact = (fisher[f"{name}.weight"] * change**2).sum().item()
        value = LoRAPenalty({name: delta}, ewc_lambda=2.0).penalty().item()
        assert value == pytest.approx(exact, rel=200 * u(torch.float32))


@PEFT
def test_ewc_of_the_factors_works_as_for_any_parameters():
    model, first, second = adapted(base()), data(), data()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    ewc = EWC(model, ewc_lambda=100.0)
    ewc.consolidate(first)
    optimizer = EWCOptimizer(torch.optim.SGD([p for _, p in trained], lr=0.05), ewc)
    for inputs, targets in second * 3:
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits(model, inputs), targets).backward()
        optimizer.step()
    value = sum(
        50.0 * (ewc.fisher[n].double() * (p.double() - ewc.anchor[n].double()) ** 2).sum().item()
        for n, p in trained
    )
    assert any("lora_A" in n for n, _ in trained)
    assert ewc.penalty().item() == pytest.approx(value, rel=300 * u(torch.float32))
    assert value > 0


@PEFT
def test_adapters_whose_change_is_another_are_refused():
    fisher = {n: torch.rand_like(p) for n, p in base().named_parameters()}
    with pytest.raises(
        ValueError, match="expected LoRA layers with an adapter 'default', got none"
    ):
        lora_deltas(base(), fisher)
    with pytest.raises(ValueError, match=r"fisher: missing for '.*query.weight'"):
        lora_deltas(adapted(base()), {})
    with pytest.raises(TypeError, match=r"variant such as DoRA"):
        lora_deltas(adapted(base(), use_dora=True), fisher)
    with pytest.raises(TypeError, match=r"got an embedding"):
        lora_deltas(adapted(base(), target_modules=["word_embeddings"]), fisher)
    peft = pytest.importorskip("peft")
    model = adapted(base())
    model.add_adapter("more", peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    assert len(lora_deltas(model, fisher)) == 4
    for name in lora_deltas(model, fisher):
        model.get_submodule(f"base_model.model.{name}").set_adapter(["default", "more"])
    with pytest.raises(
        ValueError, match=r"'default' to be the only active adapter, got \['more'\]"
    ):
        lora_deltas(model, fisher)

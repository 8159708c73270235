"""EWC of peft's adapters: on their factors as usual, and on the weights that they change."""

from __future__ import annotations

import copy

import pretrained
import pytest
import torch
from numerics import u
from torch import nn

from ewc_fast import EWC, EWCOptimizer, LoRAPenalty, fisher_diagonal, lora_deltas

STRENGTH = 7.0
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


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

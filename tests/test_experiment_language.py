"""The language experiment: its text, its model, and what its methods promise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ewc_fast import LoRAPenalty
from ewc_fast.experiments import language
from ewc_fast.experiments.language import report, text, training
from ewc_fast.experiments.language.model import GPT, Adapted, adapt, deltas
from ewc_fast.experiments.shared.experiment import Options

TINY = replace(
    language.QUICK,
    width=16,
    length=32,
    first_steps=4,
    second_steps=4,
    fisher_sequences=8,
    tested_sequences=4,
)
SIZE = {"width": 16, "blocks": 2, "heads": 2, "length": 12}


@pytest.fixture(scope="module")
def learned() -> training.Learned:
    return training.learn_first(training.First(TINY, seed=3))


def second(learned, method, ewc_lambda=0.0):
    return training.learn_second(
        training.Second(TINY, learned, method, ewc_lambda, "validation", points=2)
    )


def test_words_of_people_are_taken_out_of_code_and_nothing_else():
    source = '"""A."""\n\ndef f(x):\n    """Only this."""\n\nclass C:\n    # why\n    y = "kept"\n'
    assert text.without_words(source) == "def f(x):\n    pass\n\nclass C:\n    y = 'kept'"


@pytest.mark.parametrize("domain_of", [text.documentation, text.code])
def test_no_part_of_a_domain_repeats_another(domain_of):
    domain = domain_of()
    pieces = {
        part: {bytes(content[i : i + 200].tolist()) for i in range(0, len(content) - 200, 200)}
        for part, content in vars(domain).items()
    }
    learned_from = bytes(domain.train.tolist())
    for part in ("validation", "test"):
        assert len(pieces[part]) > 100
        assert not any(piece in learned_from for piece in pieces[part])


def test_sequences_are_pieces_of_the_text():
    content = torch.arange(20, dtype=torch.uint8)
    drawn = text.draw(content, 50, 6, torch.Generator().manual_seed(0))
    assert torch.equal(drawn - drawn[:, :1], torch.arange(6).expand(50, 6))
    assert {0, 14} <= set(drawn[:, 0].tolist()) <= set(range(15))
    assert text.in_order(content, 6).tolist() == torch.arange(18).view(3, 6).tolist()


def test_the_model_does_not_see_what_it_predicts():
    model, ids = GPT(**SIZE, seed=0), torch.randint(256, (2, 12))
    later = ids.clone()
    later[:, 7:] = 0
    torch.testing.assert_close(model(ids)[:, :7], model(later)[:, :7])


def test_the_perplexity_of_one_who_knows_nothing_is_the_vocabulary():
    class Ignorant(torch.nn.Module):
        def forward(self, ids):
            return torch.zeros(*ids.shape, text.BYTES)

    sequences = torch.randint(256, (70, 9))  # more than are evaluated at once
    assert training.perplexity(Ignorant(), sequences) == pytest.approx(256)


def test_adapters_begin_as_the_model_and_their_penalty_is_of_the_merged_change():
    model, ids = GPT(**SIZE, seed=0), torch.randint(256, (2, 12))
    before, weights = model(ids), dict(model.state_dict())
    fisher = {name: torch.rand_like(weight) for name, weight in weights.items()}
    adapted = adapt(model, rank=2, scaling=3.0, seed=1)
    torch.testing.assert_close(model(ids), before)
    assert len(adapted) == 4 * 2
    assert all(isinstance(layer, Adapted) for layer in adapted.values())

    expected = 0.0
    for name, layer in adapted.items():
        with torch.no_grad():
            layer.lora_b.normal_()
            change = 3.0 * layer.lora_b @ layer.lora_a
            expected += 0.5 * 7.0 * (fisher[f"{name}.weight"] * change**2).sum().item()
            x = torch.randn(5, layer.base.in_features)
            merged = F.linear(x, layer.base.weight + change, layer.base.bias)
            torch.testing.assert_close(layer(x), merged, rtol=1e-4, atol=1e-4)
    penalty = LoRAPenalty(deltas(adapted, fisher), ewc_lambda=7.0).penalty()
    assert penalty.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", training.METHODS)
def test_every_method_repeats_and_starts_from_the_first_model(learned, method):
    curve = second(learned, method, 0.01)
    assert curve == second(learned, method, 0.01)
    assert len(curve) == 3
    assert curve[0] == learned.perplexity["validation"]
    assert curve[-1] != curve[0]


@pytest.mark.parametrize(
    "method", [training.UNIFORM, training.PROXIMAL, training.GRADIENT, training.HELD_LORA]
)
def test_without_strength_a_method_is_plain_training(learned, method):
    plain = training.LORA if method == training.HELD_LORA else training.PLAIN
    for ours, theirs in zip(second(learned, method), second(learned, plain), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_infinite_strength_keeps_the_first_model(learned):
    before, *_, after = second(learned, training.PROXIMAL, 1e12)
    assert after == pytest.approx(before, rel=0.02)  # what no text touches may move


def test_the_best_lambda_has_the_least_geometric_mean():
    assert language._best({0.1: (9.0, 4.0), 1.0: (7.0, 5.0), 10.0: (6.0, 7.0)}) == 1.0


def test_the_whole_experiment_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(language, "QUICK", TINY)
    findings = language.run(Options(out=tmp_path, quick=True, seeds=2, workers=1))
    assert set(findings.results["perplexity"]) == set(training.METHODS)
    assert findings.results["text"]["code"]["train"]["bytes"] > 100_000
    assert all(method in findings.table for method in training.METHODS)
    findings.figure.savefig(tmp_path / "figure.png")


def claimed(ends: dict[str, tuple[float, float]]) -> list[bool]:
    one = training.Learned(0, {}, {}, {"test": (5.0, 9.0)})
    everyone = dict.fromkeys(training.METHODS, (7.0, 5.0)) | ends
    curves = {method: [[(5.0, 9.0), end]] for method, end in everyone.items()}
    study = report.Study(language.FULL, [one], {}, {}, curves)
    return [claim.holds for claim in report.claims(study)]


def test_claims_are_held_to_the_numbers():
    good = {training.GRADIENT: (5.5, 5.2), training.PROXIMAL: (5.5, 5.2)}
    better_adapters = {training.HELD_LORA: (6.0, 5.5)}
    assert all(claimed(good | better_adapters))
    assert claimed({}) == [True, *[False] * 7]
    assert not claimed(good | {training.PLAIN: (6.0, 5.0)})[0]
    forgets = claimed(good | better_adapters | {training.GRADIENT: (6.6, 5.0)})
    assert [number for number, holds in enumerate(forgets) if not holds] == [1]

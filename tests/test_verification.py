"""Wrong rules are found out, and samples that influence each other; nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
import torch.nn.functional as F
from layers import with_statistics
from models import CLASSES, FEATURES, Net, features, head, linear, mlp, sequences
from torch import Tensor, nn
from training import all_of, same

from ewc_fast import fisher_diagonal
from ewc_fast.fisher import fisher_report
from ewc_fast.fisher.recorder import plan as planning
from ewc_fast.fisher.recorder.layouts import Regular
from ewc_fast.fisher.recorder.per_sample import Dense, Outer, PerSample
from ewc_fast.fisher.recorder.rules import RULES, Operand

pytestmark = pytest.mark.usefixtures("one_thread")

DIFFERED = "its recorded squares differed from single samples'"
addmm = RULES["Addmm"]
Data = list[tuple[Tensor, Tensor]]


def batches(*sizes: int, inputs: Callable[[int], Tensor] = features) -> Data:
    return [(inputs(n), torch.randint(CLASSES, (n,))) for n in sizes]


def dense(use: Operand) -> Tensor:
    gradients = addmm(use)
    assert gradients is not None
    found = torch.zeros(use.layout.samples, *use.shape, dtype=use.grad.dtype)
    gradients.add_to(found, 0)
    return found


def twice_too_much(use: Operand) -> PerSample:
    return Dense(dense(use) * 2**0.5)


def batch_gradient_squared(use: Operand) -> PerSample:
    return Dense(dense(use).sum(0, keepdim=True))


def sum_of_squares_over_samples_and_positions(use: Operand) -> PerSample | None:
    right = addmm(use)
    if not isinstance(right, Outer):
        return right
    return Outer(right.left.flatten(0, 1)[:, None], right.right.flatten(0, 1)[:, None],
                 right.gradient_is_left)  # fmt: skip


def nothing(use: Operand) -> PerSample:
    return Dense(dense(use) * 0)


def not_a_number(use: Operand) -> PerSample:
    return Dense(dense(use) * float("nan"))


def samples_in_another_order(use: Operand) -> PerSample | None:
    right = addmm(use)
    if not isinstance(right, Outer):
        return right
    return Outer(right.left, right.right.flip(0), right.gradient_is_left)


WRONG = [twice_too_much, batch_gradient_squared, nothing, not_a_number, samples_in_another_order]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_a_wrong_rule_is_found_out_and_the_result_is_right(wrong, monkeypatch):
    monkeypatch.setitem(RULES, "Addmm", wrong)
    model, data = mlp(), batches(6, 6)
    found = fisher_diagonal(model, data)
    oracle.assert_fisher(found, model, data)
    weights = {name for name in found if name.endswith("weight")}
    assert weights <= found.report.slow.keys()
    assert all(reason.endswith(DIFFERED) for reason in found.report.slow.values())
    assert fisher_report(model, data).slow == found.report.slow


def test_squares_of_positions_in_place_of_sums_are_found_out(monkeypatch):
    monkeypatch.setitem(RULES, "Addmm", sum_of_squares_over_samples_and_positions)
    model = Net(lambda m, x: m.head(m.body(x).tanh().mean(1)), body=linear(), head=head())
    data = batches(4, 3, inputs=sequences)
    found = fisher_diagonal(model, data)
    oracle.assert_fisher(found, model, data)
    assert found.report.slow == dict.fromkeys(("body.weight", "body.bias"), DIFFERED)


def test_a_rule_that_is_wrong_for_the_bias_costs_the_biases_only(monkeypatch):
    def wrong(self: Outer, total: Tensor, bias_total: Tensor) -> bool:
        done = right(self, total, bias_total)
        bias_total.mul_(1.01)
        return done

    right = Outer.add_squares_with_bias
    monkeypatch.setattr(Outer, "add_squares_with_bias", wrong)
    model, data = mlp(), batches(6, 6)
    found = fisher_diagonal(model, data)
    oracle.assert_fisher(found, model, data)
    assert found.report.slow == dict.fromkeys(("0.bias", "2.bias", "4.bias"), DIFFERED)


def test_a_parameter_that_is_squared_together_with_a_wrong_one_goes_with_it(monkeypatch):
    monkeypatch.setitem(RULES, "Mm", lambda use: Dense(torch.ones(3, *use.shape)))
    model = Net(lambda m, x: m.head((x @ (m.a + m.b)).tanh()), head=head(),
                a=nn.Parameter(torch.randn(FEATURES, 6)),
                b=nn.Parameter(torch.randn(FEATURES, 6)))  # fmt: skip
    data = batches(3, 3)
    found = fisher_diagonal(model, data)
    oracle.assert_fisher(found, model, data)
    assert found.report.slow.keys() == {"a", "b"}


def test_a_wrong_layout_is_found_out_and_the_result_is_right(monkeypatch):
    def wrong(gradient: Tensor, scaled: list[Tensor], scales: list[Tensor]) -> planning.Found:
        found = right(gradient, scaled, scales)
        rows = isinstance(found, Regular) and found.within == "major" and len(gradient) == 12
        return Regular(0, 3, "minor") if rows else found

    right = planning.infer
    monkeypatch.setattr(planning, "infer", wrong)
    model = Net(lambda m, x: m.head(m.body(x.flatten(0, 1)).view(len(x), -1, 6).tanh().mean(1)),
                body=linear(), head=head())  # fmt: skip
    data = batches(4, 3, inputs=sequences)
    found = fisher_diagonal(model, data)
    oracle.assert_fisher(found, model, data)
    assert found.report.slow == dict.fromkeys(("body.weight", "body.bias"), DIFFERED)


def test_operations_that_were_not_held_to_single_samples_are_not_recorded(monkeypatch):
    """Large batches enter products that the first samples do not."""
    monkeypatch.setitem(RULES, "Mm", lambda use: Dense(torch.ones(len(use.grad), *use.shape)))
    zero = torch.zeros(6)
    model = Net(
        lambda m, x: m.head(torch.addmm(zero.to(x), x, m.w) if len(x) < 5 else x @ m.w),
        w=nn.Parameter(torch.randn(FEATURES, 6)), head=head(),
    )  # fmt: skip
    data = batches(4, 6, 5)
    found = fisher_diagonal(model, data)
    oracle.assert_fisher(found, model, data)
    assert found.report.slow == {"w": "its operations change from batch to batch"}


def test_without_verification_rules_are_believed(monkeypatch):
    monkeypatch.setitem(RULES, "Addmm", twice_too_much)
    model, data = mlp(), batches(6)
    found = fisher_diagonal(model, data, verify=False)
    right = oracle.fisher(model, data)
    for name, values in found.items():
        torch.testing.assert_close(values.double(), 2 * right[name], rtol=1e-5, atol=0)
    assert not found.report.slow


def with_batch_norm(**options) -> nn.Module:
    norm = with_statistics(nn.BatchNorm1d(6, **options))
    return nn.Sequential(linear(), norm, nn.Tanh(), head())


def of(run: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> Net:
    return Net(lambda m, x: m.head(run(m, x).tanh()), body=linear(), head=head(), **parts)


MIXING = {
    "batch_statistics_of_sequences": lambda: of(
        lambda m, x: m.norm(m.body(x[:, None].expand(-1, 2, -1)).mT).sum(2),
        norm=with_statistics(nn.BatchNorm1d(6, track_running_stats=False)),
    ),
    "mean_of_the_batch": lambda: of(lambda m, x: m.body(x - x.mean(0))),
    "softmax_over_the_batch": lambda: of(lambda m, x: m.body(x).softmax(0)),
    "attention_across_samples": lambda: of(
        lambda m, x: F.scaled_dot_product_attention(m.body(x), m.body(x), m.body(x))
    ),
    "neighbours": lambda: of(lambda m, x: m.body(x) + m.body(x).roll(1, 0)),
    "number_of_samples": lambda: of(lambda m, x: m.body(x) * len(x)),
}  # fmt: skip


@pytest.mark.parametrize("make", MIXING.values(), ids=MIXING.keys())
@pytest.mark.parametrize("ask", [fisher_diagonal, fisher_report])
def test_samples_that_influence_each_other_raise_and_leave_the_model_alone(make, ask):
    model, data = make(), batches(5, 4)
    model.train()
    before = all_of(model)
    with pytest.raises(ValueError, match="a sample's outputs depend on the other samples"):
        ask(model, data)
    assert same(all_of(model), before)


WITH_BATCH_STATISTICS = {
    "batch_statistics": lambda: with_batch_norm(track_running_stats=False),
    "batch_norm_in_training": lambda: of(
        lambda m, x: F.batch_norm(m.body(x), None, None, training=True)
    ),
    "batch_norm_in_training_with_running_statistics": lambda: of(
        lambda m, x: F.batch_norm(
            m.body(x), m.norm.running_mean, m.norm.running_var, m.norm.weight, training=True),
        norm=nn.BatchNorm1d(6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("make", WITH_BATCH_STATISTICS.values(), ids=WITH_BATCH_STATISTICS.keys())
@pytest.mark.parametrize("ask", [fisher_diagonal, fisher_report])
def test_batch_norm_that_cannot_run_on_one_sample_raises_and_leaves_the_model_alone(make, ask):
    model, data = make(), batches(5, 4)
    model.train()
    before = all_of(model)
    with pytest.raises(ValueError, match="not on one of them alone"):
        ask(model, data)
    assert same(all_of(model), before)


def test_samples_that_influence_each_other_are_accepted_one_by_one():
    model, data = MIXING["mean_of_the_batch"](), batches(1, 1, 1)
    oracle.assert_fisher(fisher_diagonal(model, data), model, data)


def test_batch_norm_by_running_statistics_treats_samples_apart():
    model, data = with_batch_norm(), batches(5, 4)
    found = fisher_diagonal(model, data)
    oracle.assert_fisher(found, model, data)
    assert not found.report.slow


def test_random_numbers_in_eval_mode_raise_unless_they_are_meant():
    model, data = of(lambda m, x: F.dropout(m.body(x), 0.5, training=True)), batches(5, 4)
    with pytest.raises(ValueError, match="or on chance"):
        fisher_diagonal(model, data)
    found = fisher_diagonal(model, data, verify=False)
    assert same(found, fisher_diagonal(model, data, verify=False))
    assert all(values.isfinite().all() for values in found.values())


def test_the_report_of_a_run_is_that_of_the_look_before_it():
    class Slow(nn.Module):
        def forward(self, x):
            return torch.fft.irfft(torch.fft.rfft(x) * self.w)

    slow = Slow()
    slow.w = nn.Parameter(torch.randn(FEATURES // 2 + 1))
    model = Net(lambda m, x: m.head(m.body(m.slow(x).repeat(1, 2)[:, :FEATURES]).tanh()),
                slow=slow, body=linear(), head=head(), spare=linear())  # fmt: skip
    data = batches(5, 4)
    found = fisher_diagonal(model, data)
    oracle.assert_fisher(found, model, data)
    report = fisher_report(model, data)
    assert report == found.report
    assert list(report.ways) == [name for name, _ in model.named_parameters()]
    assert str(report) == (
        "4 of 7 parameters recorded, 2 without gradient; one sample at a time: slow.w "
        "(it enters an operation on complex numbers)"
    )
    assert report.slow == {"slow.w": "it enters an operation on complex numbers"}


def test_the_report_is_one_line_that_names_each_reason_once(monkeypatch):
    monkeypatch.setitem(RULES, "Addmm", nothing)
    report = fisher_report(mlp(), batches(5))
    assert str(report).count(DIFFERED) == 1
    assert "0.weight, 0.bias, 2.weight" in str(report)
    assert "\n" not in str(report)


def test_a_report_needs_a_batch_of_two_samples_and_takes_the_first():
    model = mlp()
    read = []
    sizes = [1, 1, 5, 4]
    data = (read.append(n) or batches(n)[0] for n in sizes)
    assert str(fisher_report(model, data)) == "6 of 6 parameters recorded"
    assert read == [1, 1, 5]
    with pytest.raises(ValueError, match="expected one of two or more samples, got none"):
        fisher_report(model, batches(1, 1))


def test_the_call_of_the_model_can_be_replaced_for_a_report():
    model = Net(lambda m, x: [None, m.net(x)], net=mlp())
    report = fisher_report(model, [features(4)], forward=lambda m, x: m(x)[1])
    assert str(report) == "6 of 6 parameters recorded"

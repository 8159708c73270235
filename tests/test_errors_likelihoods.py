"""Bad options, outputs and targets of each likelihood: an error that says what was expected."""

from __future__ import annotations

import pytest
import torch

from ewc_fast.fisher import (
    Batch,
    Bernoulli,
    Categorical,
    CausalLM,
    Gaussian,
    HeteroscedasticGaussian,
    Poisson,
)
from ewc_fast.fisher.scores import ESTIMATORS, Scores

OPTIONS = {
    "dimension_of_samples": (
        lambda: Categorical(dim=0),
        ValueError,
        r"dim: expected the class dimension, 1 or -1 \(the last\), got 0",
    ),
    "fractional_ignore_index": (
        lambda: Categorical(ignore_index=0.5),
        TypeError,
        "ignore_index: expected an integer, got float",
    ),
    "classes_by_name": (
        lambda: Categorical(classes=["cat"]),
        TypeError,
        "classes: expected indices, a mask, or a function.*got list",
    ),
    "classes_in_floats": (
        lambda: Categorical(classes=torch.ones(3)),
        TypeError,
        "classes: expected integers or a mask of bool, got torch.float32",
    ),
    "one_class": (lambda: Categorical(classes=[3]), ValueError, r"two or more.*got \[3\]"),
    "a_class_twice": (lambda: Categorical(classes=[3, 3]), ValueError, r"different.*got \[3, 3\]"),
    "negative_class": (lambda: Categorical(classes=[-1, 3]), ValueError, r">= 0, got \[-1, 3\]"),
    "mask_of_one_class": (
        lambda: Categorical(classes=[False, True]),
        ValueError,
        "two or more different classes",
    ),
    "fixed_masks_of_samples": (
        lambda: Categorical(classes=torch.ones(2, 3).bool()),
        ValueError,
        r"classes: .*function of the batch that returns such or.*\(N, C\), got.*\(2, 3\)",
    ),
    "unknown_unit": (
        lambda: CausalLM(per="word"),
        ValueError,
        "per: expected one of 'sequence', 'token', got 'word'",
    ),
    "no_variance": (
        lambda: Gaussian(variance=0.0),
        ValueError,
        "variance: expected finite numbers > 0, got 0.0",
    ),
    "infinite_variance": (
        lambda: Gaussian(variance=torch.tensor([1.0, torch.inf])),
        ValueError,
        "variance: expected finite numbers > 0",
    ),
    "variance_by_name": (
        lambda: Gaussian(variance="unit"),
        TypeError,
        "variance: expected a number or a tensor, got str",
    ),
}


@pytest.mark.parametrize(("make", "error", "message"), OPTIONS.values(), ids=OPTIONS.keys())
def test_bad_options(make, error, message):
    with pytest.raises(error, match=message):
        make()


def choosing(*classes):
    return Categorical(classes=lambda batch: torch.tensor(classes))


LABELS = torch.tensor([0, 1, 2, 0])
TARGETS = {
    "labels_of_another_shape": (
        Categorical(), (4, 3), LABELS[:, None],
        r"targets: expected integer classes of shape \(4,\).*int64 of shape \(4, 1\)",
    ),
    "soft_labels": (
        Categorical(), (4, 3), torch.full((4, 3), 1 / 3),
        r"targets: expected integer classes.*got torch.float32.*yield inputs alone",
    ),
    "label_beyond_the_classes": (
        Categorical(), (4, 2), LABELS,
        r"targets: expected classes from 0 to 1 \(or -100 to ignore\), got 0 to 2",
    ),
    "negative_label": (
        Categorical(dim=-1), (4, 3), -LABELS, "targets: expected classes from 0 to 2.*-2 to 0"
    ),
    "impossible_label": (
        Categorical(classes=[0, 1]), (4, 3), LABELS,
        r"targets: expected possible classes only \(the likelihood's `classes`\), got 2; leave",
    ),
    "class_beyond_the_outputs": (
        Categorical(classes=[0, 3]), (4, 3), LABELS,
        "classes: expected indices below 3, the size of dimension 1 of the outputs, got 3",
    ),
    "mask_of_other_classes": (
        Categorical(classes=[True, True]), (4, 3), LABELS,
        r"classes: expected a mask of shape \(3,\) or \(4, 3\) for outputs of shape \(4, 3\)",
    ),
    "a_sample_without_classes": (
        choosing([True] * 3, [False] * 3, [True] * 3, [True] * 3), (4, 3), LABELS,
        "classes: expected one or more for each sample, got none for 1",
    ),
    "masks_of_other_samples": (
        choosing([True] * 3), (4, 3), LABELS, r"classes: .*shape \(4, C\), got.*\(1, 3\)"
    ),
    "masks_in_integers": (
        choosing([1] * 3, [1] * 3, [1] * 3, [1] * 3), (4, 3), LABELS,
        r"classes: .*shape \(4, C\), got torch.int64 of shape \(4, 3\)",
    ),
    "language_without_positions": (
        CausalLM(), (4, 3), LABELS, r"'causal_lm' needs logits \(N, T, V\), got.*\(4, 3\)"
    ),
    "ids_of_other_positions": (
        CausalLM(), (4, 5, 3), LABELS[:, None].expand(4, 4),
        r"targets: expected integer classes of shape \(4, 5\).*'causal_lm', got.*\(4, 4\)",
    ),
    "labels_without_output_dimension": (
        Bernoulli(), (4, 1), torch.ones(4),
        r"targets: expected shape \(4, 1\) for likelihood 'bernoulli', got \(4,\); reshape",
    ),
    "classes_as_yes_no_labels": (
        Bernoulli(), (4,), LABELS, r"expected numbers in \[0, 1\].*got 0 to 2; use 'categorical'"
    ),
    "means_that_would_broadcast": (
        Gaussian(), (4, 1), torch.ones(4),
        r"targets: expected shape \(4, 1\) for likelihood 'gaussian', got \(4,\); reshape them",
    ),
    "variance_of_other_outputs": (
        Gaussian(variance=torch.ones(2)), (4, 3), torch.ones(4, 3),
        r"variance: .*broadcasts to one sample's outputs \(3,\), got \(2,\)",
    ),
    "an_odd_number_of_outputs": (
        HeteroscedasticGaussian(), (4, 3), torch.ones(4, 1),
        r"needs outputs \(N, 2 D\): D means, then D log-variances, got shape \(4, 3\)",
    ),
    "targets_for_log_variances": (
        HeteroscedasticGaussian(), (4, 2), torch.ones(4, 2), r"expected shape \(4, 1\).*\(4, 2\)"
    ),
    "negative_counts": (
        Poisson(), (4,), -LABELS, "expected counts >= 0 for likelihood 'poisson', got -2 among"
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("likelihood", "shape", "targets", "message"), TARGETS.values(), ids=TARGETS.keys()
)
def test_bad_targets(likelihood, shape, targets, message):
    batch = Batch(None, targets, None, 4)
    with pytest.raises(ValueError, match=message):
        Scores(likelihood, "empirical").vectors(torch.zeros(shape), batch)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_impossible_labels_are_errors_even_where_others_are_drawn(estimator):
    scores = Scores(Categorical(classes=[0, 1]), estimator)
    with pytest.raises(ValueError, match="expected possible classes only"):
        scores.vectors(torch.zeros(4, 3), Batch(None, LABELS, None, 4))


@pytest.mark.parametrize("estimator", ["exact", "sampled", "rademacher"])
def test_labels_of_another_numbering_do_no_harm_where_others_are_drawn(estimator):
    batch = Batch(None, LABELS + 6, None, 4)  # a head of its own, labels of the whole data set
    assert all(v.any() for v in Scores("categorical", estimator).vectors(torch.zeros(4, 3), batch))


@pytest.mark.parametrize("estimator", ["exact", "sampled", "rademacher"])
def test_soft_labels_are_not_looked_at_where_others_are_drawn(estimator):
    soft = Batch(None, torch.full((4, 3), 1 / 3), None, 4)
    assert all(v.any() for v in Scores("categorical", estimator).vectors(torch.zeros(4, 3), soft))


def test_a_function_of_the_batch_needs_a_batch():
    with pytest.raises(ValueError, match="call for_batch"):
        choosing([True] * 3).log_prob(torch.zeros(1, 3), LABELS[:1])


def test_outputs_must_be_numbers_with_a_gradient():
    batch = Batch(None, LABELS, None, 4)
    with pytest.raises(TypeError, match=r"outputs: expected floating-point.*int64; pass forward="):
        Scores("categorical", "exact").vectors(torch.zeros(4, 3).long(), batch)


def test_the_generator_must_be_where_the_outputs_are():
    scores = Scores("categorical", "sampled", generator=torch.Generator())
    with pytest.raises(ValueError, match=r"generator: expected one on .*'meta', got one on 'cpu'"):
        scores._check_generator(torch.device("meta"))


def test_directions_and_log_probabilities_of_ones_own_are_checked():
    class Careless:
        def log_prob(self, outputs, targets):
            return targets.sum(1)

        def directions(self, outputs):
            yield torch.ones(3)

    batch = Batch(None, torch.ones(4, 2), None, 4)
    with pytest.raises(ValueError, match=r"Careless.directions must yield.*\(4, 2\), got \(3,\)"):
        list(Scores(Careless(), "exact").vectors(torch.zeros(4, 2), batch))
    with pytest.raises(ValueError, match=r"Careless.log_prob must be differentiable"):
        Scores(Careless(), "empirical").vectors(torch.zeros(4, 2), batch)

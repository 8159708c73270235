"""fisher_diagonal of real architectures, as they are really run, is the definition."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import oracle
import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from labels import Remembering, relabelled
from torch import Tensor

from ewc_fast import fisher_diagonal

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft's call
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
]

# One of each kind: the rest takes the same rules.
ON_A_GPU = (
    "gpt2", "llama", "bert", "t5", "vit", "resnet", "convnext", "lstm", "channels_last", "bfloat16",
)  # fmt: skip
SIZES = (3, 2)  # two batches: what was learned on the first must hold for the second

# The error allowed each parameter, in units of its largest entry. float32: sums in any order, with
# normalisations before and squares after them. bfloat16 (unit roundoff 2^-8): one sample at a time
# loses up to 5 roundings on these models, and is allowed to lose other ones.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 16 * 2**-8}
# Gradients that are 0 by cancellation (a softmax does not see its key's bias) keep roundings of
# the terms: so many, of the model's largest gradient. One sample at a time keeps up to 1.4 of
# float32's, and 0.15 of bfloat16's in the one such parameter there is.
CANCELLED = {torch.float32: 8 * 2**-24, torch.bfloat16: 2 * 2**-8}


def in_batches(inputs: Any, targets: Tensor) -> list[tuple[Any, Tensor]]:
    cuts, start = [], 0
    for size in SIZES:
        part = slice(start, start + size)
        cuts.append((oracle._change(inputs, lambda t, part=part: t[part]), targets[part]))
        start += size
    assert start == len(targets)
    return cuts


def assert_right(
    found: Mapping[str, Tensor], exact: Mapping[str, Tensor], arithmetic: torch.dtype
) -> None:
    assert list(found) == list(exact)
    largest = max(values.max().item() for values in exact.values())
    cancelled = CANCELLED[arithmetic] ** 2 * largest
    wrong = {}
    for name, expected in exact.items():
        assert found[name].shape == expected.shape, name
        assert (found[name] >= 0).all(), name  # false for NaN
        error = (found[name].double() - expected).abs().max().item()
        if error > ALLOWED[arithmetic] * expected.max().item() + cancelled:
            wrong[name] = f"off by {error:.1e}, largest entry {expected.max().item():.1e}"
        if not expected.any() and found[name].any():
            wrong[name] = "not exactly 0"
    assert not wrong


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_of_every_architecture(name):
    assert_architecture(ARCHITECTURES[name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ON_A_GPU)
def test_some_architectures_on_cuda(name, triton_device):
    assert_architecture(ARCHITECTURES[name])


def assert_architecture(architecture: Architecture) -> None:
    scene, likelihood = architecture.build(), architecture.likelihood
    model, data = scene.model.train(), in_batches(scene.inputs, scene.targets)
    before = copy.deepcopy(model.state_dict())
    options = {"likelihood": likelihood, "estimator": architecture.estimator}
    if architecture.estimator == "sampled":
        options["likelihood"] = remembering = Remembering(likelihood)
        options["generator"] = torch.Generator(torch.get_default_device()).manual_seed(1)

    found = fisher_diagonal(model, data, forward=scene.forward, **options)

    assert not found.report.slow

    assert all(module.training for module in model.modules())
    assert all(param.grad is None for param in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    estimator = architecture.estimator
    if estimator == "sampled":
        data, estimator = relabelled(data, remembering.drawn), "empirical"
    exact = oracle.fisher(model, data, likelihood, estimator, forward=scene.forward)
    assert_right(found, exact, architecture.arithmetic)

"""The plugin beside Avalanche's own: equal where theirs is exact, and one penalty in all."""

from __future__ import annotations

import copy

import pytest
import torch
from models import CLASSES, features, mlp
from torch import nn, optim
from training import same

from ewc_fast import EWC

pytest.importorskip("avalanche")

from avalanche import training
from avalanche.benchmarks import tensors_benchmark
from avalanche.models import IncrementalClassifier, MultiTaskModule

from ewc_fast.integrations.avalanche import EWCPlugin

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def experiences(count: int = 3, n: int = 16, classes=lambda task: range(CLASSES)):
    tensors = []
    for task in range(count):
        labels = torch.tensor(list(classes(task)))[torch.randint(len(classes(task)), (n,))]
        tensors.append((features(n), labels))
    task_labels = list(range(count))
    return tensors_benchmark(
        train_tensors=tensors, test_tensors=tensors, task_labels=task_labels
    ).train_stream


def train(model: nn.Module, plugin, stream, *, batch_size: int = 4) -> nn.Module:
    torch.manual_seed(1)  # the order of the samples
    strategy = training.Naive(
        model=model,
        optimizer=optim.SGD(model.parameters(), lr=0.05),
        train_mb_size=batch_size,
        train_epochs=2,
        plugins=[plugin],
        evaluator=None,
    )
    for experience in stream:
        strategy.train(experience)
    return model


@pytest.mark.parametrize(
    "mode", [{"mode": "separate"}, {"mode": "online", "decay_factor": 0.5}], ids=lambda m: m["mode"]
)
def test_with_batches_of_one_it_is_avalanches_plugin(mode):
    """Their squares of batches are then squares of samples; and ours keeps one penalty of three."""
    stream, model = experiences(), mlp()
    theirs = train(
        copy.deepcopy(model), training.plugins.EWCPlugin(5.0, **mode), stream, batch_size=1
    )
    free = train(
        copy.deepcopy(model), training.plugins.EWCPlugin(0.0, **mode), stream, batch_size=1
    )
    ours = train(model, EWCPlugin(2 * 5.0 / 1, **mode), stream, batch_size=1)
    for name, param in ours.named_parameters():
        torch.testing.assert_close(param, theirs.get_parameter(name), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours[0].weight, free[0].weight, rtol=1e-2)


def test_the_fisher_does_not_depend_on_the_batch_size():
    stream, fishers = experiences(count=1), []
    for batch_size in (1, 4):
        plugin = EWCPlugin(1.0)
        model = mlp()
        torch.manual_seed(0)
        for param in model.parameters():
            nn.init.normal_(param)
        strategy = training.Naive(
            model=model,
            optimizer=optim.SGD(model.parameters(), lr=0.0),
            train_mb_size=batch_size,
            plugins=[plugin],
            evaluator=None,
        )
        strategy.train(stream[0])
        fishers.append(plugin.ewc.fisher)
    for name, fisher in fishers[0].items():
        torch.testing.assert_close(fisher, fishers[1][name])


def test_every_experience_can_be_kept():
    plugin = EWCPlugin(1.0, keep_importance_data=True)
    model = train(mlp(), plugin, experiences())
    assert sorted(plugin.importances) == sorted(plugin.saved_params) == [0, 1, 2]
    assert same(plugin.saved_params[2], {n: p.detach() for n, p in model.named_parameters()})
    for name, total in plugin.ewc.fisher.items():
        torch.testing.assert_close(total, sum(plugin.importances[t][name] for t in range(3)))
    lean = EWCPlugin(1.0)
    train(mlp(), lean, experiences())
    assert not lean.importances
    assert not lean.saved_params


class Growing(nn.Module):
    """Gains outputs with each experience's classes."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 7)
        self.head = IncrementalClassifier(7, initial_out_features=2, masking=False)

    def forward(self, x):
        return self.head(self.body(x).relu())


class Heads(MultiTaskModule):
    """Has a head for each task label, chosen sample by sample."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 7)
        self.heads = nn.ModuleList([nn.Linear(7, CLASSES) for _ in range(3)])

    def forward_single_task(self, x, task_label):
        return self.heads[task_label](self.body(x).relu())


def test_rows_that_a_layer_gains_start_free():
    plugin, model = EWCPlugin(10.0), Growing()
    train(model, plugin, experiences(classes=lambda task: range(task + 2)))
    assert plugin.ewc.tasks == 3
    assert plugin.ewc.fisher["head.classifier.weight"].shape == (4, 7)


def test_task_labels_reach_the_model():
    plugin, model = EWCPlugin(10.0), Heads()
    stream = experiences()
    train(model, plugin, stream[:2])
    fisher = plugin.ewc.fisher
    assert fisher["heads.0.weight"].any()
    assert fisher["heads.1.weight"].any()
    assert not fisher["heads.2.weight"].any()


def test_its_strength_can_be_changed_between_experiences():
    plugin = EWCPlugin(0.0)
    stream, model = experiences(), mlp()
    train(model, plugin, stream[:1])
    plugin.ewc_lambda = 7.0
    train(model, plugin, stream[1:])
    assert plugin.ewc.ewc_lambda == 7.0


def test_wrong_arguments_are_refused_as_avalanche_does():
    with pytest.raises(ValueError, match="mode: expected 'separate' or 'online'"):
        EWCPlugin(1.0, mode="both")
    with pytest.raises(ValueError, match="decay_factor"):
        EWCPlugin(1.0, mode="online")
    with pytest.raises(ValueError, match="decay_factor"):
        EWCPlugin(1.0, decay_factor=0.5)


def test_a_plugin_survives_a_copy_of_its_strategy():
    plugin, model = EWCPlugin(3.0), mlp()
    train(model, plugin, experiences(count=1))
    twin = copy.deepcopy(plugin)
    assert isinstance(twin.ewc, EWC)
    assert same(twin.ewc.state_dict(), plugin.ewc.state_dict())

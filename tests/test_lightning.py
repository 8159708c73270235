"""Lightning's callback: the penalty once a step, its checkpoints, both names of the library."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from models import CLASSES, features, mlp
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset
from training import same

from ewc_fast import EWC, EWCOptimizer

LIBRARIES = ["lightning.pytorch", "pytorch_lightning"]


@pytest.fixture(params=LIBRARIES)
def library(request):
    """Lightning by one of its names; the callback comes from ewc_fast either way."""
    return pytest.importorskip(request.param)


def callback(ewc: EWC, **options):
    return importlib.import_module("ewc_fast.integrations.lightning").EWCCallback(ewc, **options)


def trainer(library, folder, *callbacks, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "enable_checkpointing": False, "log_every_n_steps": 1}
    settings = {"max_epochs": 2, "callbacks": list(callbacks), **quiet, **options}
    return library.Trainer(default_root_dir=str(folder), **settings)


def module_of(library, network: nn.Module, make_optimizer):
    class Module(library.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network

        def training_step(self, one, index):
            return F.cross_entropy(self.network(one[0]), one[1])

        def configure_optimizers(self):
            return make_optimizer(self.network.parameters())

    return Module()


def sgd(params):
    return optim.SGD(params, lr=0.1)


def task() -> DataLoader:
    return DataLoader(TensorDataset(features(32), torch.randint(CLASSES, (32,))), batch_size=8)


def after_a_task() -> tuple[nn.Module, EWC]:
    network = mlp()
    ewc = EWC(network, ewc_lambda=30.0)
    ewc.consolidate(task())
    return network, ewc


def by_hand(network, ewc, data, *, clip: float | None = None, every: int = 1) -> None:
    optimizer, data = sgd(network.parameters()), list(data)
    for _ in range(2):
        for start in range(0, len(data), every):
            optimizer.zero_grad()
            for points, labels in data[start : start + every]:
                (F.cross_entropy(network(points), labels) / every).backward()
            ewc.add_penalty_grad_()
            if clip is not None:
                nn.utils.clip_grad_norm_(network.parameters(), clip)
            optimizer.step()


@pytest.mark.parametrize("every", [1, 2])
def test_every_step_gets_one_penalty(library, tmp_path, every):
    network, ewc = after_a_task()
    plain, its_ewc = copy.deepcopy((network, ewc))
    data = task()
    run = trainer(library, tmp_path, callback(ewc), accumulate_grad_batches=every)
    run.fit(module_of(library, network, sgd), data)
    by_hand(plain, its_ewc, data, every=every)
    assert same(network.state_dict(), plain.state_dict())


def test_clipping_clips_the_sum(library, tmp_path):
    network, ewc = after_a_task()
    plain, its_ewc = copy.deepcopy((network, ewc))
    data = task()
    run = trainer(library, tmp_path, callback(ewc), gradient_clip_val=0.01)
    run.fit(module_of(library, network, sgd), data)
    by_hand(plain, its_ewc, data, clip=0.01)
    assert same(network.state_dict(), plain.state_dict())


def test_a_wrapped_optimizer_gets_no_second_penalty(library, tmp_path):
    network, ewc = after_a_task()
    plain, its_ewc = copy.deepcopy((network, ewc))
    data = task()
    module = module_of(library, network, lambda params: EWCOptimizer(sgd(params), ewc))
    trainer(library, tmp_path, callback(ewc)).fit(module, data)
    by_hand(plain, its_ewc, data)
    assert same(network.state_dict(), plain.state_dict())


def test_a_wrapped_proximal_optimizer_trains(library, tmp_path):
    network, ewc = after_a_task()
    plain, its_ewc = copy.deepcopy((network, ewc))
    data = task()

    def make(params):
        return EWCOptimizer(sgd(params), ewc, mode="proximal")

    run = trainer(library, tmp_path, callback(ewc), max_epochs=1)
    run.fit(module_of(library, network, make), data)
    reference = EWCOptimizer(sgd(plain.parameters()), its_ewc, mode="proximal")
    for points, labels in data:
        reference.zero_grad()
        F.cross_entropy(plain(points), labels).backward()
        reference.step()
    assert same(network.state_dict(), plain.state_dict())


def test_the_end_of_a_fit_consolidates_the_task(library, tmp_path):
    network, ewc = after_a_task()
    trainer(library, tmp_path, callback(ewc)).fit(module_of(library, network, sgd), task())
    assert ewc.tasks == 2
    left = callback(ewc, at_end=False)
    trainer(library, tmp_path, left).fit(module_of(library, network, sgd), task())
    assert ewc.tasks == 2


def test_a_checkpoint_holds_the_ewc(library, tmp_path):
    network, ewc = after_a_task()
    data = task()
    whole, its_ewc = copy.deepcopy((network, ewc))
    trainer(library, tmp_path, callback(its_ewc)).fit(module_of(library, whole, sgd), data)

    half = trainer(library, tmp_path, callback(ewc, at_end=False), max_epochs=1)
    half.fit(module_of(library, network, sgd), data)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = mlp()
    restored = EWC(resumed, ewc_lambda=1.0)
    rest = trainer(library, tmp_path, callback(restored))
    rest.fit(module_of(library, resumed, sgd), data, ckpt_path=tmp_path / "half.ckpt")
    assert same(resumed.state_dict(), whole.state_dict())
    assert same(restored.state_dict(), its_ewc.state_dict())


def test_the_penalty_is_logged(library, tmp_path):
    network, ewc = after_a_task()
    run = trainer(library, tmp_path, callback(ewc, at_end=False))
    run.fit(module_of(library, network, sgd), task())
    assert run.logged_metrics["ewc_penalty"] > 0.0


@pytest.mark.parametrize("kind", ["two", "lbfgs", "si"])
def test_what_needs_the_wrapper_is_refused_without(library, tmp_path, kind):
    network = mlp()
    ewc = EWC(network, ewc_lambda=30.0, importance="si" if kind == "si" else "fisher")
    makes = {"two": lambda ps: [sgd(ps), sgd(ps)], "lbfgs": optim.LBFGS, "si": sgd}
    module = module_of(library, network, lambda params: makes[kind](list(params)))
    module.automatic_optimization = kind != "two"
    with pytest.raises(ValueError, match="EWCOptimizer"):
        trainer(library, tmp_path, callback(ewc)).fit(module, task())

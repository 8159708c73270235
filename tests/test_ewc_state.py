"""What must survive does: restarts, files, copies, moves, and models that grow."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import mlp
from training import batch, consolidated, loss, same, shift

from ewc_fast import EWC, EWCOptimizer


class Run:
    """A training run: model, EWC, wrapped Adam."""

    def __init__(self, make=mlp, seed=0):
        torch.manual_seed(seed)
        self.model = make()
        self.ewc = EWC(self.model, ewc_lambda=50.0)
        adam = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.optimizer = EWCOptimizer(adam, self.ewc)

    def train(self, data):
        for one in data:
            self.optimizer.zero_grad()
            loss(self.model, one).backward()
            self.optimizer.step()

    def everything(self):
        return [self.model.state_dict(), self.optimizer.state_dict()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_training_resumes_bit_for_bit_in_mid_task(dtype, tmp_path):
    run = Run(lambda: mlp().to(dtype))
    tasks = [[batch(run.model) for _ in range(6)] for _ in range(4)]
    for data in tasks[:2]:
        run.train(data)
        run.ewc.consolidate(data)
    run.train(tasks[2][:3])
    file = tmp_path / "checkpoint.pt"
    torch.save([run.model.state_dict(), run.optimizer.state_dict()], file)

    def to_the_end(run):
        run.train(tasks[2][3:])
        run.ewc.consolidate(tasks[2])  # merging needs the anchor's residual as well
        run.train(tasks[3])
        return run.everything()

    resumed = Run(lambda: mlp().to(dtype), seed=1)
    model_state, optimizer_state = torch.load(file, weights_only=True)
    resumed.model.load_state_dict(model_state)
    resumed.optimizer.load_state_dict(optimizer_state)
    assert same(resumed.everything(), run.everything())
    assert same(to_the_end(resumed), to_the_end(run))


def test_the_ewc_alone_round_trips_through_a_file_with_its_settings(tmp_path):
    model, ewc = consolidated(ewc_lambda=12.5, gamma=0.75)
    torch.save(ewc.state_dict(), tmp_path / "ewc.pt")
    state = torch.load(tmp_path / "ewc.pt", weights_only=True)
    other = EWC(model, ewc_lambda=1.0, anchor="latest")
    other.load_state_dict(state)
    assert same(other.state_dict(), ewc.state_dict())
    assert repr(other) == repr(ewc)
    assert torch.equal(other.penalty(), ewc.penalty())


def test_a_state_before_the_first_task_round_trips():
    ewc, other = EWC(mlp(), ewc_lambda=3.0), consolidated()[1]
    other.load_state_dict(ewc.state_dict())
    assert same(other.state_dict(), ewc.state_dict())
    assert other.penalty().item() == 0.0


def test_a_loaded_state_is_a_copy():
    model, ewc = consolidated()
    other = EWC(model, ewc_lambda=1.0)
    other.load_state_dict(ewc.state_dict())
    before = copy.deepcopy(other.state_dict())
    shift(model)
    ewc.consolidate([batch(model)])
    assert same(other.state_dict(), before)
    assert not same(ewc.state_dict(), before)


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused_and_changes_nothing(kept, tmp_path):
    _, ewc = consolidated()
    file = tmp_path / "ewc.pt"
    torch.save(ewc.state_dict(), file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    before = copy.deepcopy(ewc.state_dict())
    with pytest.raises((RuntimeError, EOFError, OSError, pickle.UnpicklingError)):
        ewc.load_state_dict(torch.load(file, weights_only=True))
    assert same(ewc.state_dict(), before)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_a_copy_trains_like_the_original_and_apart_from_it(copied):
    run = Run()
    data = [batch(run.model) for _ in range(4)]
    run.train(data)
    run.ewc.consolidate(data)
    run.train(data)
    twin = copied(run)
    assert twin.optimizer.ewc is twin.ewc
    assert next(iter(twin.ewc.parameters.values())) is twin.model[0].weight
    assert same(twin.everything(), run.everything())
    before = copy.deepcopy(run.everything())
    twin.train(data)
    twin.ewc.consolidate(data)
    assert same(run.everything(), before)
    run.train(data)
    run.ewc.consolidate(data)
    assert same(twin.everything(), run.everything())


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_an_ewc_can_be_copied_alone(copied):
    for ewc in (EWC(mlp(), ewc_lambda=1.0), consolidated()[1]):
        ewc.add_penalty_grad_()  # it is in use
        twin = copied(ewc)
        assert repr(twin) == repr(ewc)
        assert same(twin.state_dict(), ewc.state_dict())
        assert torch.equal(twin.penalty(), ewc.penalty())


def test_to_moves_all_state_and_returns_the_ewc():
    _, ewc = consolidated()
    before, penalty = copy.deepcopy(ewc.state_dict()), ewc.penalty()
    assert ewc.to("cpu") is ewc
    assert same(ewc.state_dict(), before)
    assert torch.equal(ewc.penalty(), penalty)
    ewc.to(torch.device("meta"))
    for field in ("fisher", "anchor", "residual"):
        assert all(t.device.type == "meta" for t in ewc.state_dict()[field].values())

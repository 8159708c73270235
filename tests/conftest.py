"""Every test starts from the same random state and leaves PyTorch's settings as they were."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator

import pytest
import torch
from torch import nn, optim

if not torch.cuda.is_available():
    # Triton's kernels then run in its interpreter; it must know before they are defined.
    os.environ["TRITON_INTERPRET"] = "1"

from training import all_of, batch, consolidated, loss, same

from ewc_fast import EWC, EWCOptimizer


@pytest.fixture(autouse=True)
def same_start_for_every_test() -> Iterator[None]:
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(True)


def _made_on(device: str) -> Iterator[str]:
    if device == "cpu":
        yield device
        return
    torch.set_default_device(device)
    yield device
    torch.set_default_device(None)


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test on the CPU, and on the GPU if there is one: what it makes is made there."""
    yield from _made_on(request.param)


@pytest.fixture
def triton_device() -> Iterator[str]:
    """Run a test where Triton's kernels run: on a GPU, or in the interpreter on the CPU."""
    yield from _made_on("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def one_thread() -> None:
    """Keep to one thread: models as small as these only lose where cores are busy."""
    torch.set_num_threads(1)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN: whoever forgets to write it is found out.

    Some of PyTorch's operations on a GPU have no deterministic form, and warn.
    """
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def scene() -> Iterator[tuple[nn.Module, EWC, EWCOptimizer]]:
    """A model in mid-training, its EWC and wrapper; afterwards all must be as it was."""
    model, ewc = consolidated()
    optimizer = EWCOptimizer(optim.Adam(model.parameters(), lr=0.01), ewc)
    loss(model, batch(model)).backward()
    optimizer.step()
    before = all_of(model), copy.deepcopy(optimizer.state_dict()), repr(ewc)
    yield model, ewc, optimizer
    assert same((all_of(model), optimizer.state_dict(), repr(ewc)), before)

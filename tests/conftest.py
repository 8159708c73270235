"""Every test starts from the same random state and leaves PyTorch's settings as they were."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def same_start_for_every_test() -> Iterator[None]:
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(True)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN: whoever forgets to write it is found out."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)

"""What can't be flattened is named, and nothing has moved then."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ewc_fast import flatten_parameters_


def with_parameter(tensor, **others):
    model = nn.Sequential(nn.Linear(2, 2))
    model.odd = tensor
    for name, other in others.items():
        model.register_parameter(name, other)
    return model


def sharing_memory():
    one = nn.Parameter(torch.zeros(10))
    return with_parameter(one, other=nn.Parameter(one.data[5:]))


def sharing_with_a_buffer():
    model = with_parameter(nn.Parameter(torch.zeros(10)))
    model.register_buffer("mask", model.odd.data)
    return model


def with_sparse_gradient():
    model = nn.Sequential(nn.Linear(2, 2), nn.Embedding(5, 2, sparse=True))
    model[1](torch.tensor([1])).sum().backward()
    return model


BAD = {
    "meta": (
        lambda: with_parameter(nn.Parameter(torch.zeros(3, device="meta"))),
        ValueError,
        "parameter 'odd'.*meta",
    ),
    "sparse": (
        lambda: with_parameter(nn.Parameter(torch.zeros(3).to_sparse())),
        TypeError,
        "parameter 'odd'.*sparse",
    ),
    "lazy": (
        lambda: nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)),
        TypeError,
        "parameter '1.weight'.*UninitializedParameter",
    ),
    "complex": (
        lambda: with_parameter(nn.Parameter(torch.zeros(3, dtype=torch.complex64))),
        TypeError,
        "parameter 'odd'.*complex64",
    ),
    "expanded": (
        lambda: with_parameter(nn.Parameter(torch.zeros(1).expand(3))),
        ValueError,
        r"parameter 'odd'.*strides \(0,\)",
    ),
    "shared_memory": (sharing_memory, ValueError, "'other' and 'odd'.*shared memory"),
    "shared_with_buffer": (sharing_with_a_buffer, ValueError, "'odd'.*shared memory"),
    "sparse_gradient": (
        with_sparse_gradient,
        TypeError,
        "gradient of parameter '1.weight'.*sparse",
    ),
    "nothing_to_train": (
        lambda: nn.Linear(2, 2).requires_grad_(False),
        ValueError,
        "at least one parameter",
    ),
    "no_module": (lambda: [torch.zeros(3)], TypeError, "expected a torch.nn.Module, got list"),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_flattened_is_named_and_nothing_is_moved(make, error, message):
    model = make()
    before = model[0].weight.data_ptr() if isinstance(model, nn.Sequential) else None
    with pytest.raises(error, match=message):
        flatten_parameters_(model)
    if before is not None:
        assert model[0].weight.data_ptr() == before


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone."""
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("PyTorch was built without torch.distributed")
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_parameters_under_fsdp_are_refused():
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(2, 2))
    fully_shard(model)
    with pytest.raises(TypeError, match="FSDP"):
        flatten_parameters_(model)


@pytest.mark.usefixtures("process_group")
def test_distributed_tensors_are_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    model = with_parameter(nn.Parameter(distribute_tensor(torch.ones(4), mesh)))
    with pytest.raises(TypeError, match=r"parameter 'odd'.*DTensor"):
        flatten_parameters_(model)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_gradients_that_cannot_be_held_are_refused():
    model = nn.Embedding(5, 2, sparse=True)
    flat = flatten_parameters_(model)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match=r"gradient of parameter 'weight'.*sparse"):
        flat.grads  # noqa: B018
    model = nn.Linear(2, 1)
    flat = flatten_parameters_(model)
    model(torch.ones(2)).square().sum().backward(create_graph=True)
    with pytest.raises(RuntimeError, match=r"gradient of parameter 'weight' has a graph"):
        flat.grads  # noqa: B018

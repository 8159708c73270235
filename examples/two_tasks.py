"""Two small tasks, the second of which makes a network forget the first: what examples share."""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def task(seed: int) -> TensorDataset:
    """Return 1,000 points around ten centres in 20 dimensions; other centres for another seed."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(10, 20, generator=generator)
    labels = torch.randint(10, (1000,), generator=generator)
    return TensorDataset(centres[labels] + 0.5 * torch.randn(1000, 20, generator=generator), labels)


def batches(data: TensorDataset) -> DataLoader[tuple[Tensor, ...]]:
    """Return the points and labels in shuffled batches."""
    return DataLoader(data, batch_size=50, shuffle=True)


def network() -> nn.Sequential:
    """Return the same small network at each call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 100), nn.ReLU(), nn.Linear(100, 10))


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Return the share of points that the model labels rightly."""
    points, labels = data.tensors
    return (model(points).argmax(1) == labels).float().mean().item()


def compare(with_ewc: float, without: float) -> None:
    """Print what is left of the first task after the second; EWC must have kept more."""
    print(f"accuracy on the first task after the second: {with_ewc:.0%}, without EWC {without:.0%}")
    assert with_ewc > without + 0.2

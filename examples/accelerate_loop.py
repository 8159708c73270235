"""Accelerate: prepare the wrapped optimizer like any other, and checkpoint with save_state."""

import tempfile

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from two_tasks import accuracy, batches, compare, network, task

from ewc_fast import EWC, EWCOptimizer


def left_of_the_first_task(ewc_lambda: float) -> float:
    """Train on two tasks, and return the accuracy on the first."""
    accelerator = Accelerator(cpu=True)
    model, tasks = network().to(accelerator.device), [task(1), task(2)]
    ewc = EWC(model, ewc_lambda=ewc_lambda)
    optimizer = EWCOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), ewc)
    model, optimizer = accelerator.prepare(model, optimizer)
    for data in tasks:
        loader = accelerator.prepare(batches(data))
        for _ in range(5):
            for points, labels in loader:
                optimizer.zero_grad()
                accelerator.backward(F.cross_entropy(model(points), labels))
                optimizer.step()
        ewc.consolidate(loader)
        with tempfile.TemporaryDirectory() as folder:  # EWC is in the optimizer's state
            accelerator.save_state(folder)
            accelerator.load_state(folder)
    return accuracy(model, tasks[0])


compare(left_of_the_first_task(ewc_lambda=1000.0), left_of_the_first_task(ewc_lambda=0.0))

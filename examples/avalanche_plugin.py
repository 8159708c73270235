"""Avalanche: this EWCPlugin in place of Avalanche's own."""

import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.training import Naive
from two_tasks import accuracy, compare, network, task

from ewc_fast.integrations.avalanche import EWCPlugin


def left_of_the_first_task(ewc_lambda: float) -> float:
    """Train on two experiences, and return the accuracy on the first."""
    model, tasks = network(), [task(1), task(2)]
    tensors = [data.tensors for data in tasks]
    benchmark = tensors_benchmark(train_tensors=tensors, test_tensors=tensors, task_labels=[0, 0])
    strategy = Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        train_mb_size=50,
        train_epochs=5,
        plugins=[EWCPlugin(ewc_lambda, estimator="exact")],
        evaluator=None,
    )
    for experience in benchmark.train_stream:
        strategy.train(experience)
    return accuracy(model, tasks[0])


compare(left_of_the_first_task(ewc_lambda=1000.0), left_of_the_first_task(ewc_lambda=0.0))

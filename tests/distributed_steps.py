"""One process of data-parallel training with EWC: ``python distributed_steps.py RANK FILE OUT``."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from models import CLASSES, features, mlp
from torch import nn, optim
from torch.nn.parallel import DistributedDataParallel

from ewc_fast import EWC, EWCOptimizer

WORLD, SAMPLES, STEPS = 2, 8, 4


def two_tasks(rank, world, mode):
    """Train on this process's share of every batch; return parameters, Fisher and penalty."""
    torch.manual_seed(0)
    model = mlp()
    ewc = EWC(model, ewc_lambda=20.0)
    optimizer = EWCOptimizer(optim.SGD(model.parameters(), lr=0.1, momentum=0.9), ewc, mode=mode)
    forward = DistributedDataParallel(model) if world > 1 else model
    for _ in range(2):
        for _ in range(STEPS):
            inputs, targets = features(SAMPLES), torch.randint(CLASSES, (SAMPLES,))
            share = slice(rank, None, world)
            optimizer.zero_grad()
            nn.functional.cross_entropy(forward(inputs[share]), targets[share]).backward()
            optimizer.step()
        ewc.consolidate([(features(SAMPLES), torch.randint(CLASSES, (SAMPLES,)))])
    state = {name: param.detach() for name, param in model.named_parameters()}
    return {"parameters": state, "fisher": ewc.fisher, "anchor": ewc.anchor}


if __name__ == "__main__":
    rank, meeting, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=WORLD)
    torch.save({mode: two_tasks(rank, WORLD, mode) for mode in ("gradient", "proximal")}, out)
    dist.destroy_process_group()

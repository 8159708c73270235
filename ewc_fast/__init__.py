"""Elastic Weight Consolidation for PyTorch: fast, exact, a drop-in optimizer wrapper.

>>> import torch, ewc_fast
>>> model = torch.nn.Linear(784, 10)
>>> ewc = ewc_fast.EWC(model, ewc_lambda=400.0)
>>> optimizer = ewc_fast.EWCOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), ewc)

Train as usual with ``optimizer``; after each task, call ``ewc.consolidate(loader)``.
"""

from importlib.metadata import version as _version

from ewc_fast import functional
from ewc_fast.ewc import EWC
from ewc_fast.fisher import fisher_diagonal, fisher_report
from ewc_fast.flat import FlatParameters, flatten_parameters_
from ewc_fast.lora import LoRAPenalty, LowRankDelta, lora_deltas
from ewc_fast.optim import EWCOptimizer

__version__ = _version("ewc-fast")
__all__ = [
    "EWC",
    "EWCOptimizer",
    "FlatParameters",
    "LoRAPenalty",
    "LowRankDelta",
    "fisher_diagonal",
    "fisher_report",
    "flatten_parameters_",
    "functional",
    "lora_deltas",
]

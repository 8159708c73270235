"""Optimizers under the EWC penalty: a wrapper for any of PyTorch's, and three that have it inside.

:class:`EWCOptimizer` wraps any optimizer and takes a pass over memory of its own before or after
each step. :class:`SGD`, :class:`Adam` and :class:`AdamW` are PyTorch's with the penalty, moments
and update in one pass.
"""

from ewc_fast.optim.adam import Adam, AdamW
from ewc_fast.optim.sgd import SGD
from ewc_fast.optim.wrapper import EWCOptimizer

__all__ = ["SGD", "Adam", "AdamW", "EWCOptimizer"]

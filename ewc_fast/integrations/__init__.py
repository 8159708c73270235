"""Thin adapters to training frameworks, one a file; each is imported by its own name only.

=============================  ==================================================================
`ewc_fast.integrations`        needs
=============================  ==================================================================
``.huggingface``               transformers and accelerate: ``pip install 'ewc-fast[hf]'``
``.lightning``                 lightning or pytorch_lightning: ``pip install 'ewc-fast[lightning]'``
``.avalanche``                 avalanche-lib: ``pip install 'ewc-fast[avalanche]'``
=============================  ==================================================================

Accelerate and plain PyTorch need no adapter: ``accelerator.prepare(EWCOptimizer(...))`` is all, and
``save_state`` saves Fisher and anchor with the optimizer. Loops that call ``ewc.add_penalty_grad_``
instead use ``accelerator.register_for_checkpointing(ewc)``. The folder ``examples/`` runs them all.
"""

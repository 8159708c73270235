"""A callback for Lightning, under both of its names: lightning and pytorch_lightning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch.optim import LBFGS, Optimizer

from ewc_fast import EWC, EWCOptimizer

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule
    from lightning.pytorch import Trainer as LightningTrainer
else:
    try:
        from lightning.pytorch import Callback
    except ImportError:
        from pytorch_lightning import Callback


class EWCCallback(Callback):
    """Applies the penalty in every step of a fit, consolidates at its end, logs and saves.

    The penalty's gradient is added when gradients are complete and, in mixed precision, unscaled;
    once per optimizer step, however many batches are accumulated. Lightning clips afterwards, so
    ``gradient_clip_val`` clips the sum. For the proximal form, for clipping the task's gradient
    alone, for several optimizers, LBFGS and ``importance="si"``, let ``configure_optimizers``
    return :class:`~ewc_fast.EWCOptimizer`; this callback then leaves the penalty to it.

    Fisher and anchor are in Lightning's checkpoints, as this callback's state. ``"ewc_penalty"`` is
    logged every ``log_every_n_steps``.

    Parameters
    ----------
    ewc
        Built from the LightningModule, or from the network inside it. The Fisher runs its
        ``forward``; pass ``forward=`` where that is something else.
    at_end
        ``False`` leaves consolidation to you: ``ewc.consolidate(batches)``.
    batches
        What to measure the Fisher on; the training batches by default.
    fisher_options
        Those of :func:`ewc_fast.fisher_diagonal`.

    Raises
    ------
    ValueError
        When a fit starts with one of the last three, not wrapped; or in several processes,
        each with its share of the batches, and ``batches`` does not give all of them the same.

    Examples
    --------
    >>> ewc = EWC(module, ewc_lambda=400.0)  # doctest: +SKIP
    >>> for task in tasks:  # doctest: +SKIP
    ...     Trainer(max_epochs=5, callbacks=[EWCCallback(ewc)]).fit(module, task)
    """

    def __init__(
        self,
        ewc: EWC,
        *,
        at_end: bool = True,
        batches: Iterable[Any] | None = None,
        **fisher_options: Any,
    ) -> None:
        self.ewc, self.at_end, self.batches = ewc, at_end, batches
        self.fisher_options = fisher_options

    def on_train_start(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Follow the module to its device; refuse what could not be right."""
        bare = [o for o in trainer.optimizers if not isinstance(o, EWCOptimizer)]
        in_steps = self.ewc.importance == "si"
        if bare and (in_steps or len(trainer.optimizers) > 1 or isinstance(bare[0], LBFGS)):
            raise ValueError(
                "optimizers: several, LBFGS, and importance='si' need more than gradients; return "
                "EWCOptimizer(optimizer, ewc) from configure_optimizers for each that holds "
                "parameters of ewc"
            )
        if self.at_end and self.batches is None and trainer.world_size > 1:
            raise ValueError(
                f"batches: each of the {trainer.world_size} processes trains on its own share, and "
                "would get a Fisher of its own; pass batches=, the same on every process"
            )
        self.ewc.to(pl_module.device)

    def on_before_optimizer_step(
        self, trainer: LightningTrainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the penalty's gradient, unless the optimizer does."""
        if not isinstance(optimizer, EWCOptimizer):
            self.ewc.add_penalty_grad_()

    def on_train_batch_end(self, trainer: LightningTrainer, *args: Any, **kwargs: Any) -> None:
        """Log the penalty where Lightning writes to its logger."""
        every = trainer.log_every_n_steps
        if every and trainer.global_step % every == 0:
            self.log("ewc_penalty", self.ewc.penalty().detach().float())

    def on_train_end(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Consolidate the finished task."""
        if self.at_end:
            batches = trainer.train_dataloader if self.batches is None else self.batches
            self.ewc.consolidate(batches, **self.fisher_options)

    def state_dict(self) -> dict[str, Any]:
        """Return Fisher, anchor and settings for a checkpoint."""
        return self.ewc.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them over from a checkpoint."""
        self.ewc.load_state_dict(state_dict)

"""The Trainer of Hugging Face's transformers: an optimizer for it, and a callback."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from ewc_fast import EWC, EWCOptimizer

Mode = Literal["gradient", "proximal"]


class TrainerOptimizer(EWCOptimizer):
    """An EWCOptimizer that makes its inner optimizer itself, see :func:`ewc_optimizer`."""

    def __init__(
        self, params: Iterable[Any], *, ewc: EWC, inner: type[Optimizer], mode: Mode, **options: Any
    ) -> None:
        super().__init__(inner(params, **options), ewc, mode=mode)


def ewc_optimizer(
    ewc: EWC, args: TrainingArguments, *, mode: Mode = "gradient"
) -> tuple[type[TrainerOptimizer], dict[str, Any]]:
    """Return a Trainer's ``optimizer_cls_and_kwargs``: the optimizer of ``args``, under EWC.

    The Trainer then makes it with its own groups of parameters (no weight decay on biases and
    norms) and learning rate schedule. Its checkpoints hold Fisher and anchor in the optimizer's
    state, and ``trainer.train(resume_from_checkpoint=...)`` restores them. An optimizer of your
    own goes the other way: ``optimizers=(EWCOptimizer(yours, ewc), None)``.

    Parameters
    ----------
    ewc
        Built from the model that the Trainer gets.
    args
        The Trainer's arguments; ``optim``, ``learning_rate`` and so on say which optimizer.
    mode
        That of :class:`~ewc_fast.EWCOptimizer`. The Trainer's ``max_grad_norm`` (1 by default)
        clips the task's gradient; the penalty is then added whole.

    Raises
    ------
    ValueError
        If ``args.optim`` names one that is built from the model, not from parameters.

    Examples
    --------
    >>> Trainer(model, args, train_dataset=data, callbacks=[EWCCallback(ewc)],
    ...         optimizer_cls_and_kwargs=ewc_optimizer(ewc, args)).train()  # doctest: +SKIP
    """
    inner, options = Trainer.get_optimizer_cls_and_kwargs(args)
    if not (isinstance(inner, type) and issubclass(inner, Optimizer)):
        raise ValueError(
            f"args: optim={str(args.optim)!r} is not a class of optimizers; build yours and pass "
            "optimizers=(EWCOptimizer(optimizer, ewc), None) to the Trainer"
        )
    return TrainerOptimizer, {**options, "ewc": ewc, "inner": inner, "mode": mode}


class EWCCallback(TrainerCallback):
    """Consolidates when a Trainer's training ends, and logs the penalty as ``"ewc_penalty"``.

    The optimizer applies the penalty, see :func:`ewc_optimizer`; this does not. Consolidation comes
    after the Trainer's last checkpoint: save ``ewc.state_dict()`` to keep it by itself. Callbacks
    before this one, those that report to other services, do not see the penalty.

    Parameters
    ----------
    ewc
        Its model is measured.
    at_end
        ``False`` leaves consolidation to you: ``ewc.consolidate(trainer.get_train_dataloader())``.
    batches
        What to measure the Fisher on; the Trainer's training batches by default.
    fisher_options
        Those of :func:`ewc_fast.fisher_diagonal`: ``likelihood="causal_lm"``, ``max_samples``, ...

    Raises
    ------
    ValueError
        When training begins in several processes, without ``batches`` that are the same on all.
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

    def on_train_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        """Refuse what would end in a different Fisher on every process."""
        if self.at_end and self.batches is None and args.world_size > 1:
            raise ValueError(
                f"batches: each of the {args.world_size} processes trains on its own share, and "
                "would get a Fisher of its own; pass batches=, the same on every process"
            )

    def on_log(
        self, _: Any, state: TrainerState, *__: Any, logs: dict[str, float], **___: Any
    ) -> None:
        """Add the penalty to what is logged of the training."""
        if "loss" in logs:
            logs["ewc_penalty"] = self.ewc.penalty().item()
            state.log_history[-1]["ewc_penalty"] = logs["ewc_penalty"]

    def on_train_end(self, *_: Any, train_dataloader: Iterable[Any], **__: Any) -> None:
        """Consolidate the finished task."""
        if self.at_end:
            batches = train_dataloader if self.batches is None else self.batches
            self.ewc.consolidate(batches, **self.fisher_options)

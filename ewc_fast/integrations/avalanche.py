"""A plugin for Avalanche with the interface of its EWCPlugin."""

from __future__ import annotations

from typing import Any, Literal

from avalanche.models.utils import avalanche_forward
from avalanche.training.plugins import SupervisedPlugin
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ewc_fast import EWC, fisher_diagonal


class EWCPlugin(SupervisedPlugin):
    r"""Avalanche's ``EWCPlugin`` with each sample's gradient squared by itself.

    Where it differs from ``avalanche.training.plugins.EWCPlugin``:

    - ``ewc_lambda`` is the paper's, with one half and a Fisher that no batch size changes. For
      their strength ``L`` pass ``2 * L / strategy.train_mb_size``; near an optimum the penalties
      are then about the same.
    - ``mode="separate"`` costs the time and memory of one experience, however many there were:
      their penalties are merged into one, exactly, up to a constant.
    - Layers may gain rows from experience to experience; new rows start free.

    Parameters
    ----------
    ewc_lambda
        Strength :math:`\lambda \ge 0`.
    mode
        ``"separate"``: one penalty for each experience. ``"online"``: one in all, around the
        latest parameters, its Fisher :math:`F' = \gamma F + F_t`.
    decay_factor
        :math:`\gamma` in (0, 1], for ``mode="online"`` only.
    keep_importance_data
        Keep a copy of every experience's Fisher and parameters, in ``importances`` and
        ``saved_params``, by the experience's number. The penalty needs none of them.
    fisher_options
        Those of :func:`ewc_fast.fisher_diagonal`; ``estimator="empirical"`` by default, what
        Avalanche's plugin approximates by batches.

    Raises
    ------
    ValueError
        For another mode, and for a decay factor with ``"separate"`` or none with ``"online"``.

    Examples
    --------
    >>> plugins = [EWCPlugin(ewc_lambda=400.0)]
    >>> strategy = Naive(model=model, optimizer=optimizer, plugins=plugins)  # doctest: +SKIP
    """

    def __init__(
        self,
        ewc_lambda: float,
        mode: Literal["separate", "online"] = "separate",
        decay_factor: float | None = None,
        keep_importance_data: bool = False,
        **fisher_options: Any,
    ) -> None:
        super().__init__()
        if mode not in ("separate", "online"):
            raise ValueError(f"mode: expected 'separate' or 'online', got {mode!r}")
        if (decay_factor is None) != (mode == "separate"):
            raise ValueError(
                f"decay_factor: mode='online' needs one and 'separate' has none, got "
                f"{decay_factor!r} with {mode!r}"
            )
        self.ewc_lambda, self.mode, self.decay_factor = ewc_lambda, mode, decay_factor
        self.keep_importance_data = keep_importance_data
        usual = {"estimator": "empirical", "forward": _forward}
        self.fisher_options: dict[str, Any] = usual | fisher_options
        self.importances: dict[int, dict[str, Tensor]] = {}
        self.saved_params: dict[int, dict[str, Tensor]] = {}
        self.ewc: EWC | None = None

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Take up the model as it was adapted to the experience."""
        self._up_to_date(strategy)

    def before_backward(self, strategy: Any, **_: Any) -> None:
        """Add the penalty to the loss."""
        if self.ewc is not None and self.ewc.tasks:
            self.ewc.ewc_lambda = self.ewc_lambda
            strategy.loss = strategy.loss + self.ewc.penalty().to(strategy.loss)

    def after_training_exp(self, strategy: Any, num_workers: int = 0, **_: Any) -> None:
        """Measure the Fisher of the finished experience and merge it."""
        dataset = strategy.experience.dataset
        loader = DataLoader(
            dataset,
            batch_size=strategy.train_mb_size,
            collate_fn=getattr(dataset, "collate_fn", None),
            num_workers=num_workers,
        )
        batches = (((batch[0], batch[-1]), batch[1]) for batch in loader)
        fisher = fisher_diagonal(strategy.model, batches, **self.fisher_options)
        self._up_to_date(strategy).consolidate_from(fisher)
        if self.keep_importance_data:
            now, params = strategy.clock.train_exp_counter, strategy.model.named_parameters()
            self.importances[now] = fisher
            self.saved_params[now] = {name: param.detach().clone() for name, param in params}

    def _up_to_date(self, strategy: Any) -> EWC:
        if self.ewc is None:
            self.ewc = EWC(
                strategy.model.named_parameters(),
                ewc_lambda=self.ewc_lambda,
                gamma=1.0 if self.decay_factor is None else self.decay_factor,
                anchor="merged" if self.mode == "separate" else "latest",
            )
        self.ewc.track(strategy.model)
        return self.ewc


def _forward(model: nn.Module, inputs: tuple[Tensor, Tensor]) -> Tensor:
    points, task_labels = inputs
    return avalanche_forward(model, points, task_labels)

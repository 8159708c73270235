"""EWC: the one stateful object. What each parameter is worth, where it was, and the pull back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ewc_fast import _checks
from ewc_fast._encoded import active_springs
from ewc_fast._springs import ActiveSprings, Spring, merge_
from ewc_fast.drift import drifts, penalties, per_layer
from ewc_fast.fisher import fisher_diagonal
from ewc_fast.importance import mas_importance, uniform_importance
from ewc_fast.state import EWCState


class EWC(EWCState):
    r"""Elastic Weight Consolidation of a model's parameters.

    .. math:: \text{penalty} = \frac\lambda2 \sum_i F_i (\theta_i - a_i)^2 + \lambda R

    Before the first :meth:`consolidate` the penalty is exactly 0. Each consolidation takes the
    Fisher information :math:`F_t` of a finished task at the current parameters and merges it:

    ``anchor="merged"`` (default)
        one penalty per task, exactly, at the cost of one:
        :math:`F' = \gamma F + F_t`, :math:`a' = a + \frac{F_t}{F'}(\theta - a)`, and the constant
        :math:`R' = \gamma R + \frac12 \sum \frac{\gamma F F_t}{F'}(\theta - a)^2`, so that
        :math:`\sum_t \frac12 F_t(\theta - \theta_t)^2 = \frac12 F'(\theta - a')^2 + R'`.
    ``anchor="latest"``
        online EWC (Schwarz et al. 2018): :math:`F' = \gamma F + F_t`, :math:`a' = \theta`, R = 0;
        with ``gamma=1`` the form that Huszar (2018) derives.

    Parameters
    ----------
    model
        A module, or an iterable of ``(name, parameter)`` pairs. Parameters must be floating;
        frozen ones are constants until they are unfrozen.
    ewc_lambda
        Strength :math:`\lambda \ge 0` of the paper, with its one half. Assign at any time.
    gamma
        Decay of old Fisher information at each consolidation, in (0, 1]; 1 keeps all.
    anchor
        ``"merged"`` or ``"latest"``, see above.
    importance
        What stands for F: how much a finished task needs each parameter.

        ``"fisher"`` (default)
            the Fisher information, see :func:`ewc_fast.fisher_diagonal`.
        ``"mas"``
            memory aware synapses (Aljundi et al. 2018): how much the outputs react, without labels;
            see :func:`ewc_fast.importance.mas_importance`. Their lambda is ``ewc_lambda / 2``.
        ``"si"``
            synaptic intelligence (Zenke et al. 2017): the path integral
            :math:`\omega = -\sum_t g \, \delta\theta` that :class:`~ewc_fast.EWCOptimizer` and
            :mod:`ewc_fast.optim` accumulate in their steps, from the task's own gradient as it is
            when the step begins; at a task's end
            :math:`\Omega = \max(\omega, 0) / (\Delta\theta^2 + \xi)`.
            :meth:`consolidate` takes ``xi`` (0.1) and needs no data. Their strength c is
            ``ewc_lambda / 2``.
        ``"l2"``
            1 for every parameter: the paper's baseline, without data.

        Merging, penalty and all else are the same for each. The papers of MAS and SI keep the
        latest anchor: ``anchor="latest"``; the default holds each task where it ended.
    impl
        Implementation of the in-place operations, see :mod:`ewc_fast._dispatch`.
    storage
        How the Fisher is kept: ``"float32"`` (default), ``"bfloat16"`` or ``"e5m3"``
        (:mod:`ewc_fast.formats`); with ``"@cpu"`` behind it, Fisher and anchor stay in the host's
        memory and come to a GPU ahead of their use (:mod:`ewc_fast.offload`). Others
        than ``"float32"`` and ``"bfloat16"`` do not run in ``torch.compile(fullgraph=True)``, and
        their :meth:`penalty` can be differentiated once only.

    Memory, whatever the number of tasks; none before the first consolidation:

    ============  =====================  ===================================================
    ``storage``   bytes for a parameter  relative error of an entry of F and of its pull
    ============  =====================  ===================================================
    ``float32``   10                     2^-24 at most
    ``bfloat16``  8                      0.2 % on average, less than 0.8 % at each merge
    ``e5m3``      7.02                   2.3 % on average and 6.3 % at most after one task,
                                         less than 12.5 % at each merge after
    ============  =====================  ===================================================

    4 bytes are the anchor's and 2 the residual's: what float32 rounds off the merged anchor. The
    hot loop does not read it, the next merge does. Merges into less than float32 round by chance,
    right on average, from PyTorch's default CPU generator: ``torch.manual_seed`` makes them repeat.
    Beside float64 parameters the Fisher stays in float64.

    Raises
    ------
    TypeError, ValueError
        For parameters that are not floating tensors, and for numbers out of range.

    References
    ----------
    Kirkpatrick et al. 2017, https://doi.org/10.1073/pnas.1611835114; Schwarz et al. 2018,
    https://arxiv.org/abs/1805.06370; Huszar 2018, https://arxiv.org/abs/1712.03847; Aljundi et al.
    2018, https://arxiv.org/abs/1711.09601; Zenke et al. 2017, https://arxiv.org/abs/1703.04200.

    Examples
    --------
    >>> model = torch.nn.Linear(4, 3)
    >>> ewc = EWC(model, ewc_lambda=400.0)
    >>> ewc.consolidate([(torch.randn(8, 4), torch.randint(3, (8,)))])
    >>> ewc
    EWC(parameters=2 (15 values), tasks=1, ewc_lambda=400, gamma=1, anchor='merged')
    >>> ewc.penalty().item()
    0.0
    """

    # Each step: three ways to the same gradient

    def penalty(self) -> Tensor:
        r"""Return :math:`\frac\lambda2 \sum F (\theta - a)^2 + \lambda R` to add to a loss.

        A differentiable scalar (float32; float64 for float64 parameters). Exactly 0, with zero
        gradient, before the first consolidation.
        """
        if not self._springs:
            return torch.zeros((), dtype=self._value_dtype, requires_grad=True)
        value = self._active().penalty(self.strength) + self.constant_penalty
        return value.to(self._value_dtype)

    def add_penalty_grad_(self) -> Tensor:
        r"""Add :math:`\lambda F (\theta - a)` to every ``.grad`` in place; return the penalty.

        The value is a float64 scalar. Call it after ``backward()``. A trainable parameter without a
        gradient gets one. Does nothing before the first consolidation, and returns 0.
        """
        return self._active().add_penalty_grad_(self.strength, self.constant_penalty)

    def _active(self) -> ActiveSprings:
        if torch.compiler.is_compiling():  # a graph keeps what it was traced with; a cache that
            return self.springs_of(self._params.values())  # fills up would be traced once more
        if self._cached is None:
            self._cached = self.springs_of(self._params.values())
        return self._cached

    # For logs

    def penalty_per_parameter(self) -> dict[str, Tensor]:
        """Return each trainable parameter's part of the penalty (but for its constant).

        Float64 scalars, empty before the first consolidation; nothing waits for the GPU until one
        is read. See :mod:`ewc_fast.drift`.
        """
        return penalties(self._each_spring(), self.ewc_lambda)

    def penalty_per_layer(self, depth: int = 1) -> dict[str, Tensor]:
        """Return the same by module: names up to their ``depth``-th dot."""
        return per_layer(self.penalty_per_parameter(), depth=depth)

    def drift(self) -> dict[str, Tensor]:
        r"""Return how far each trainable parameter is from its anchor.

        .. math:: \sqrt{\sum_i F_i (\theta_i - a_i)^2}

        As :meth:`penalty_per_parameter`; it does not depend on lambda. See :mod:`ewc_fast.drift`.
        """
        return drifts(self._each_spring())

    def _each_spring(self) -> dict[str, ActiveSprings]:
        return {
            name: active_springs(
                [param], [self._springs[name]], self._impl, on_cpu=self._storage.on_cpu
            )
            for name, param in self._params.items()
            if param.requires_grad and name in self._springs
        }

    # After each task

    def consolidate(self, batches: Iterable[Any] | None = None, **options: Any) -> None:
        """Measure the importance at the current parameters and merge it; move the anchor.

        New parameters of the model (a new head, a head with more rows) are taken up first. If
        anything raises, importance and anchor are as before.

        Parameters
        ----------
        batches
            As :func:`ewc_fast.fisher_diagonal` takes them. ``importance="si"`` and ``"l2"`` need no
            data and leave them unread, so that one loop serves all four.
        options
            Those of :func:`ewc_fast.fisher_diagonal`, or of
            :func:`ewc_fast.importance.mas_importance`; ``xi`` for ``"si"``; none for ``"l2"``.
        """
        self.consolidate_from(self._measured(batches, **options))

    def _measured(self, batches: Iterable[Any] | None, **options: Any) -> Mapping[str, Tensor]:
        if self._paths is not None:
            self.track()
            return self._paths.importance(self._params, **options)
        if self._importance == "l2":
            return uniform_importance(self._tracked(self._model), **options)
        if self._model is None:
            raise ValueError(
                "consolidate needs the model, but this EWC was built from (name, parameter) pairs; "
                "build it as EWC(model, ...), or compute the Fisher by "
                "ewc_fast.fisher_diagonal and pass it to consolidate_from"
            )
        if batches is None:
            raise TypeError(
                f"batches: importance={self._importance!r} is measured on data of the task, got "
                "none; pass its loader"
            )
        measure = fisher_diagonal if self._importance == "fisher" else mas_importance
        return measure(self._model, batches, **options)

    @torch.no_grad()
    def consolidate_from(self, fisher: Mapping[str, Tensor]) -> None:
        """Merge a Fisher diagonal computed elsewhere, at the current parameters.

        ``fisher`` maps parameter names to tensors of the parameters' shapes, finite and >= 0: a
        mean over samples of squared per-sample gradients (or an importance of your own). Frozen
        parameters may be missing. Paths of ``importance="si"`` end here, and begin anew.

        Raises
        ------
        TypeError, ValueError
            For a missing or unknown name, a wrong shape, or a negative or non-finite entry. The
            state is then as before.
        """
        params = self._tracked(self._model)
        springs = self._fitting(params)
        _checks.new_fisher(fisher, params)
        names = list(params)
        prior = [springs.get(name) or Spring.slack(params[name], self._storage) for name in names]
        new = [
            fisher[name] if name in fisher else torch.zeros_like(spring.anchor)
            for name, spring in zip(names, prior, strict=True)
        ]
        constant = merge_(
            prior,
            new,
            list(params.values()),
            latest=self._rule == "latest",
            gamma=self.gamma,
            impl=self._impl,
            on_cpu=self._storage.on_cpu,
        )
        self._constant = self.gamma * self._constant + constant
        self._springs = springs | dict(zip(names, prior, strict=True))
        self._tasks += 1
        if self._paths is not None:
            self._paths.restart()
        self._use(params)

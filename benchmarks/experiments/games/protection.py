r"""EWC for Q-learning: what each task needs, measured where it is left, one penalty for each.

The likelihood is that of the loss: :math:`Q(s, a)` is the mean of a Gaussian around which the
target y scatters, for the action a that was taken in s. So, over transitions drawn from the task's
replay,

.. math:: F_i = \frac{1}{\sigma^2} E_{(s, a)}\left[\left(
    \frac{\partial Q(s, a)}{\partial \theta_i}\right)^2\right], \qquad
    \sigma^2 = E\left[(y - Q(s, a))^2\right]

exactly, by one backward pass. The variance is the task's own, its most likely value: where rewards
are rare, small differences of values decide, and with the same variance for all games such a game's
penalty is too weak by orders of magnitude. (The paper does not name its likelihood. A softmax
policy would be another, but values that are not log-probabilities have no scale for it.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ewc_fast import EWC, fisher_diagonal
from ewc_fast.fisher import Gaussian

from .network import QNetwork
from .replay import Transitions


def of_action(values: Tensor, actions: Tensor) -> Tensor:
    """Return from values (N, actions) each row's at its action, (N,)."""
    return values.gather(1, actions[:, None]).squeeze(1)


class Protection:
    """Each task's Fisher information and parameters, as they were when it was last left.

    A game that comes again replaces what was kept of it. While it is played, the penalties of all
    others hold, not its own: it may still improve.
    """

    def __init__(self, network: QNetwork) -> None:
        self._network = network
        self._kept: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def memorise(self, task: int, minibatches: Sequence[Transitions], variance: float) -> None:
        """Measure what the task needs of the network as it is now.

        ``variance`` is that of the targets around the values, sigma squared.
        """

        def values(network: nn.Module, inputs: tuple[Tensor, Tensor]) -> Tensor:
            states, actions = inputs
            return of_action(network(states, task), actions)

        data = [((batch.states, batch.actions),) for batch in minibatches]
        fisher = fisher_diagonal(self._network, data, likelihood=Gaussian(variance), forward=values)
        self._kept[task] = fisher, self._parameters()

    def of_all_but(self, task: int, strength: float) -> EWC:
        """Return the sum of all other tasks' penalties, each around its own parameters."""
        ewc, now = EWC(self._network, ewc_lambda=strength), self._parameters()
        for other, (fisher, then) in self._kept.items():
            if other != task:
                self._set(then)
                ewc.consolidate_from(fisher)
        self._set(now)
        return ewc

    def _parameters(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self._network.named_parameters()}

    @torch.no_grad()
    def _set(self, parameters: dict[str, Tensor]) -> None:
        for name, parameter in self._network.named_parameters():
            parameter.copy_(parameters[name])

"""Causal language models: the next token at every position."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ewc_fast.fisher.likelihoods.categorical import Categorical


class CausalLM(Categorical):
    r"""Logits z (N, T, V) of the next token; targets (N, T) are the input ids themselves.

    .. math:: \log p(y \mid z) = \sum_{t < T} \log \mathrm{softmax}(z_t)_{y_{t+1}}

    The shift by one is done here: pass ``labels = input_ids``, with ``ignore_index`` where padding
    or a prompt must not count. The last position predicts nothing and never counts. Labels that are
    drawn are drawn at each position given the data's tokens before it (teacher forcing).

    Parameters
    ----------
    per
        ``"sequence"``: a sequence is one sample, its gradient is squared whole, and the mean is
        over sequences. ``"token"``: each token's gradient is squared by itself, and the mean is
        over the tokens that count. The ``"empirical"`` estimator then takes one backward pass for
        each position. The others cost what they cost for a sequence: labels of different
        positions are independent and scores have mean zero, so cross terms between positions vanish
        in expectation, :math:`E (\sum_t g_t)^2 = \sum_t E g_t^2`, and only the divisor differs.
    ignore_index
        A target that does not count, in any estimator.

    ``"exact"`` takes (T - 1) (V - 1) backward passes. ``"sampled"`` and
    ``"rademacher"`` take one a draw and are unbiased for it.

    Examples
    --------
    >>> from ewc_fast import fisher_diagonal
    >>> model = torch.nn.Sequential(torch.nn.Embedding(5, 8), torch.nn.Linear(8, 5))
    >>> ids = torch.randint(5, (4, 6))
    >>> options = {"likelihood": CausalLM(per="token"), "estimator": "empirical"}
    >>> fisher = fisher_diagonal(model, [(ids, ids)], **options)
    >>> {name: tuple(values.shape) for name, values in fisher.items()}
    {'0.weight': (5, 8), '1.weight': (5, 8), '1.bias': (5,)}
    """

    name = "causal_lm"

    def __init__(self, per: str = "sequence", ignore_index: int = -100) -> None:
        if per not in ("sequence", "token"):
            raise ValueError(f"per: expected one of 'sequence', 'token', got {per!r}")
        super().__init__(dim=-1, ignore_index=ignore_index)
        self.per = per

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw the token after each position; the first is nobody's, hence ignored."""
        drawn = super().sample(outputs, generator)
        first = torch.full_like(drawn[:, :1], self.ignore_index)
        return torch.cat([first, drawn[:, :-1]], dim=1)

    def count(self, outputs: Tensor) -> int:
        """Return V - 1 for each position but the last."""
        return super().count(outputs[:, :-1]) if outputs.shape[1] > 1 else 0

    def directions(self, outputs: Tensor) -> Iterator[Tensor]:
        """Yield the columns of each position's factor but the last's."""
        if self.count(outputs) > 0:
            for direction in super().directions(outputs[:, :-1]):
                yield F.pad(direction, (0, 0, 0, 1))

    def observed(self, outputs: Tensor, targets: Tensor | None) -> Tensor | None:
        """Return which positions have a token after them that counts, (N, T, 1)."""
        self._check(outputs)
        if targets is None:
            last = outputs.shape[1] - 1
            counts = torch.arange(last + 1, device=outputs.device) < last
            return counts.expand(outputs.shape[:2]).unsqueeze(-1)
        counts = self._at_positions(outputs, targets) != self.ignore_index
        return counts.unsqueeze(-1)

    def per_sample(self, observed: Tensor | None) -> Tensor | None:
        """Return how many tokens count in each sequence."""
        if self.per == "sequence" or observed is None:
            return None
        return observed.flatten(1).sum(1)

    def part_count(self, observed: Tensor | None) -> int:
        """Return at how many positions a token counts in any sequence."""
        return 1 if self.per == "sequence" else len(_positions(observed))

    def parts(self, score: Tensor, observed: Tensor | None) -> Iterator[Tensor]:
        """Yield the score of one position at a time."""
        if self.per == "sequence":
            yield score
            return
        for position in _positions(observed):
            alone = torch.zeros_like(score)
            alone[:, position] = score[:, position]
            yield alone

    def _check(self, outputs: Tensor) -> None:
        if outputs.dim() != 3:
            raise ValueError(
                "likelihood: 'causal_lm' needs logits (N, T, V), got outputs of shape "
                f"{tuple(outputs.shape)}"
            )
        super()._check(outputs)

    def _at_positions(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the token after each position; there is none after the last."""
        ids = super()._at_positions(outputs, targets)
        return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], self.ignore_index)], dim=1)


def _positions(observed: Tensor | None) -> list[int]:
    if observed is None:
        return []
    positions: list[int] = observed.flatten(2).any(2).any(0).nonzero().flatten().tolist()
    return positions

"""Classes: a softmax over all of them or over those allowed, at one position or at many."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ewc_fast._checks import state_dtype
from ewc_fast.fisher.batches import Batch
from ewc_fast.fisher.likelihoods.allowed import as_tensor, check_choice, mask_of
from ewc_fast.fisher.likelihoods.base import Known, computed, random_signs, total

Classes = Sequence[int] | Tensor | Callable[[Batch], Tensor]
CHUNK = 1 << 20  # entries of float64 temporaries at a time, 8 MiB


class Categorical(Known):
    r"""Logits z of classes, as ``cross_entropy`` takes them, at one position a sample or at many.

    .. math:: \log p(y \mid z) = \sum_t \log \mathrm{softmax}(z_t)_{y_t}, \qquad
        M_t = \mathrm{diag}(p_t) - p_t p_t^\top

    with :math:`p_t` the softmax at position t; positions are independent given the inputs. Exact:
    C - 1 backward passes for C classes, at each position, since :math:`M_t` has rank C - 1; its
    Cholesky factor is known in closed form (Tanabe and Sagae 1992).

    Parameters
    ----------
    dim
        The dimension of the classes: 1, outputs (N, C, ...), or -1, outputs (N, ..., C). Targets:
        integers of the same shape without it.
    ignore_index
        A target that says that its position does not count: it contributes nothing, in any
        estimator. A sample of which nothing counts is still one sample; give it weight 0 to leave
        it out of the mean.
    classes
        The classes that are possible (the others' logits count as minus infinity: no gradient
        through them): a list of indices or a mask of shape (C,); or, for samples of several heads,
        a function of the batch (:class:`~ewc_fast.fisher.Batch`: inputs, targets, size) that
        returns such a mask or one mask a sample, shape (N, C); its tensors are on the model's
        device. A target outside them is an error.

    References
    ----------
    K. Tanabe and M. Sagae 1992, "An exact Cholesky decomposition and the generalized inverse of the
    variance-covariance matrix of the multinomial distribution", J. R. Stat. Soc. B 54, 211.

    Examples
    --------
    >>> from ewc_fast import fisher_diagonal
    >>> model = torch.nn.Linear(3, 4)
    >>> _ = torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
    >>> second_task = Categorical(classes=[2, 3])
    >>> fisher_diagonal(model, [torch.randn(8, 3)], likelihood=second_task)["bias"]
    tensor([0.0000, 0.0000, 0.2500, 0.2500])

    Every sample by the head that its target belongs to, with two heads of two classes:

    >>> heads = torch.eye(2, dtype=torch.bool).repeat_interleave(2, dim=1)
    >>> by_head = Categorical(classes=lambda batch: heads[batch.targets // 2])
    >>> data = [(torch.randn(4, 3), torch.tensor([0, 1, 3, 1]))]
    >>> fisher_diagonal(model, data, likelihood=by_head)["bias"]
    tensor([0.1875, 0.1875, 0.0625, 0.0625])
    """

    name = "categorical"

    def __init__(
        self, dim: int = 1, ignore_index: int = -100, classes: Classes | None = None
    ) -> None:
        if dim not in (1, -1):
            raise ValueError(f"dim: expected the class dimension, 1 or -1 (the last), got {dim!r}")
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(f"ignore_index: expected an integer, got {type(ignore_index).__name__}")
        self.dim, self.ignore_index = dim, ignore_index
        self.classes = classes if classes is None or callable(classes) else as_tensor(classes)
        if isinstance(self.classes, Tensor):
            check_choice(self.classes)

    def for_batch(self, batch: Batch) -> Categorical:
        """Return the likelihood with the classes that are possible in this batch."""
        if not callable(self.classes):
            return self
        bound = copy.copy(self)
        bound.classes = as_tensor(self.classes(batch))
        check_choice(bound.classes, batch.size)
        return bound

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the log-likelihood of each sample, summed over its positions."""
        z = self._logits(outputs)
        index, ignored = self._labels(outputs, targets)
        log_p = z.log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)
        return total(log_p.masked_fill(ignored, 0))

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw classes from the softmax."""
        return _drawn(self._logits(outputs).softmax(-1), generator)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return [class = y] - p, and 0 where the target is the ignored one."""
        z = self._logits(outputs)
        index, ignored = self._labels(outputs, targets)
        score = _label_minus_p(z.softmax(-1), index)
        return self._as_outputs(score.masked_fill_(ignored.unsqueeze(-1), 0))

    def drawn_score(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the score of drawn classes, none of which is ignored whatever its index."""
        p = self._logits(outputs).softmax(-1)
        return self._as_outputs(_label_minus_p(p, _drawn(p, generator)))

    def count(self, outputs: Tensor) -> int:
        """Return the number of possible classes less one, for each position."""
        self._check(outputs)
        allowed = self._allowed(outputs)
        classes = outputs.shape[self.dim]
        most = classes if allowed is None else int(allowed.sum(1).max())
        return (most - 1) * outputs[0].select(self.dim - (self.dim > 0), 0).numel()

    def directions(self, outputs: Tensor) -> Iterator[Tensor]:
        """Yield the columns of the Cholesky factor of diag(p) - p p^T, position by position."""
        z = self._logits(outputs).double()
        chosen = self._chosen(outputs)
        p = (z if chosen is None else z.gather(-1, chosen.expand(*z.shape[:-1], -1))).softmax(-1)
        diagonal, beyond = _factors(p)
        for j in range(p.shape[-1] - 1):
            column = torch.zeros_like(p)
            column[..., j] = diagonal[..., j]
            share = _quotient(p[..., j + 1 :], beyond[..., j : j + 1])
            column[..., j + 1 :] = -diagonal[..., j : j + 1] * share
            if chosen is not None:
                index = chosen.expand(*z.shape[:-1], -1)
                column = torch.zeros_like(z).scatter_(-1, index, column)
            column = column.to(state_dtype(outputs.dtype))
            for alone in _one_position_at_a_time(column):
                yield self._as_outputs(alone)

    def random_direction(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        r"""Return L s for the Cholesky factor L and random signs s, in time linear in the classes.

        With the factor's diagonal d and tail sums q,
        :math:`(L s)_i = d_i s_i - p_i \sum_{j < i} d_j s_j / q_j`: a cumulative sum. Of two classes
        only the sign is random, and the squared gradient is exact.
        """
        z = self._logits(outputs)
        rows = z.reshape(-1, z.shape[-1])
        result = torch.empty_like(rows)
        step = max(1, CHUNK // rows.shape[1])
        for start in range(0, len(rows), step):
            p = rows[start : start + step].double().softmax(-1)
            diagonal, beyond = _factors(p)
            signed = diagonal * random_signs(tuple(p.shape), generator, p)
            carried = _quotient(signed, beyond)
            before = F.pad(carried[..., :-1].cumsum(-1), (1, 0))  # subtracting would cancel
            result[start : start + step] = signed - p * before
        return self._as_outputs(result.view(z.shape))

    def observed(self, outputs: Tensor, targets: Tensor | None) -> Tensor | None:
        """Return where the target is not the ignored one; soft labels (floats) count everywhere."""
        if targets is None or targets.is_floating_point():
            return None
        if self.classes is None:
            ignored = self._at_positions(outputs, targets) == self.ignore_index
        else:
            _, ignored = self._labels(outputs, targets)
        return self._as_outputs(~ignored.unsqueeze(-1))

    def _check(self, outputs: Tensor) -> None:
        if outputs.dim() < 2 or outputs.shape[self.dim] < 2:
            where = "1" if self.dim == 1 else "-1, the last"
            raise ValueError(
                f"likelihood: {self.name!r} needs logits of two or more classes in dimension "
                f"{where}, got outputs of shape {tuple(outputs.shape)}; use 'bernoulli' for the "
                "logits of yes-no labels, 'gaussian' for regression"
            )

    def _logits(self, outputs: Tensor) -> Tensor:
        """Return logits with the classes last, those not possible at minus infinity."""
        self._check(outputs)
        z, allowed = computed(outputs).movedim(self.dim, -1), self._allowed(outputs)
        if allowed is None:
            return z
        return z.masked_fill(~_over_positions(allowed, z), -torch.inf)

    def _as_outputs(self, classes_last: Tensor) -> Tensor:
        return classes_last.movedim(-1, self.dim)

    def _allowed(self, outputs: Tensor) -> Tensor | None:
        """Return the mask of possible classes, (1, C) or (N, C)."""
        if self.classes is None:
            return None
        if not isinstance(self.classes, Tensor):
            raise ValueError("classes: a function of the batch needs one; call for_batch(batch)")
        return mask_of(self.classes, outputs, self.dim)

    def _chosen(self, outputs: Tensor) -> Tensor | None:
        """Return the indices of the possible classes, (1 or N, 1, ..., K), to the most there are.

        Where a sample has fewer, others fill up: their probability is 0.
        """
        allowed = self._allowed(outputs)
        if allowed is None:
            return None
        most = int(allowed.sum(1).max())
        first = allowed.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        return _over_positions(first, outputs)

    def _at_positions(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the target of each position of the outputs."""
        self._check(outputs)
        expected = tuple(outputs.movedim(self.dim, -1).shape[:-1])
        if targets.is_floating_point() or targets.shape != expected:
            raise ValueError(
                f"targets: expected integer classes of shape {expected} for likelihood "
                f"{self.name!r}, got {targets.dtype} of shape {tuple(targets.shape)}; where the "
                "data has no such labels, yield inputs alone, and let the model's own be drawn"
            )
        return targets.long()

    def _labels(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return class indices, 0 where ignored, and where they are ignored."""
        targets, z = self._at_positions(outputs, targets), outputs.movedim(self.dim, -1)
        ignored = targets == self.ignore_index
        index = targets.masked_fill(ignored, 0)
        if ((index < 0) | (index >= z.shape[-1])).any():
            raise ValueError(
                f"targets: expected classes from 0 to {z.shape[-1] - 1} (or {self.ignore_index} "
                f"to ignore), got {index.min().item()} to {index.max().item()}"
            )
        allowed = self._allowed(outputs)
        if allowed is not None:
            possible = _over_positions(allowed, z).expand(z.shape).gather(-1, index.unsqueeze(-1))
            outside = ~(possible.squeeze(-1) | ignored)
            if outside.any():
                raise ValueError(
                    "targets: expected possible classes only (the likelihood's `classes`), got "
                    f"{index[outside][0].item()}; leave such samples out, or make it possible"
                )
        return index, ignored


def _over_positions(of_samples: Tensor, z: Tensor) -> Tensor:
    """Return a tensor (1 or N, K) as it broadcasts over the positions of z, (N, ..., K)."""
    return of_samples.view(len(of_samples), *[1] * (z.dim() - 2), -1)


def _drawn(p: Tensor, generator: torch.Generator | None) -> Tensor:
    drawn = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator)
    return drawn.view(p.shape[:-1])


def _label_minus_p(p: Tensor, index: Tensor) -> Tensor:
    """Return [class = index] - p, in place of p; 1 - p is the others' sum: no cancellation."""
    label = index.unsqueeze(-1)
    others = p.scatter_(-1, label, 0).sum(-1, keepdim=True)
    return p.neg_().scatter_(-1, label, others)


def _factors(p: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the diagonal of the Cholesky factor of diag(p) - p p^T, and the tail sums q.

    :math:`q_j = \sum_{k > j} p_k`, :math:`L_{jj} = \sqrt{p_j q_j / q_{j-1}}`,
    :math:`L_{ij} = -L_{jj} p_i / q_j`.
    """
    from_here = p.flip(-1).cumsum(-1).flip(-1)  # q_{j-1}
    beyond = torch.cat([from_here[..., 1:], torch.zeros_like(p[..., :1])], dim=-1)  # q_j
    return _quotient(p * beyond, from_here).sqrt(), beyond


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, and 0 where b is; NaN stays NaN, to be seen."""
    return (a / b).masked_fill_(b == 0, 0)


def _one_position_at_a_time(column: Tensor) -> Iterator[Tensor]:
    flat = column.view(len(column), -1, column.shape[-1])
    if flat.shape[1] == 1:
        yield column
        return
    for position in range(flat.shape[1]):
        alone = torch.zeros_like(flat)
        alone[:, position] = flat[:, position]
        yield alone.view_as(column)

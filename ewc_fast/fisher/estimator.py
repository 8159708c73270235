"""fisher_diagonal: runs the model over the data and adds up squared per-sample gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ewc_fast import _checks, functional
from ewc_fast.fisher.batches import Batch, call_model, read_batches, run_model, with_progress
from ewc_fast.fisher.isolation import left_as_it_was
from ewc_fast.fisher.likelihoods import Likelihood
from ewc_fast.fisher.recorder import Recorder
from ewc_fast.fisher.scores import Estimator, Scores


def fisher_diagonal(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    likelihood: str | Likelihood = "categorical",
    estimator: Estimator = "exact",
    max_samples: int | None = None,
    draws: int = 1,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    r"""Return the diagonal Fisher information of every trainable parameter, by name.

    .. math:: F_i = \frac1N \sum_n E_{y}\left[\left(
        \frac{\partial \log p(y \mid x_n, \theta)}{\partial \theta_i}\right)^2\right]

    a MEAN over samples of squared gradients, each sample's gradient squared by itself: the square
    of a batch gradient is something else, and depends on the batch size. The result does not, so
    long as the model treats samples apart.

    Parameters
    ----------
    model
        Runs in eval mode: dropout off, batch norm by its running statistics. It comes back as it
        was: mode, gradients, ``requires_grad``, buffers, random state.
    batches
        Iterable of ``(inputs, targets)``, of ``(inputs, targets, weights)``, of inputs alone, or of
        mappings that may have ``"labels"`` and ``"sample_weight"``; samples in dimension 0 of every
        tensor, batches of any size. Tensors are moved to the model's device. Inputs that are a
        tuple or mapping are passed to the model by position or keyword. A tuple ``(a, b)`` is
        always read as inputs and targets: two inputs without targets are ``((a, b),)``. With
        weights :math:`w_n \ge 0`, shape (N,), the result is the weighted mean
        :math:`\sum_n w_n E[g_n^2] / \sum_n w_n`.
    likelihood
        What the outputs mean: ``"categorical"`` (logits, classes in dimension 1), ``"causal_lm"``
        (logits (N, T, V), targets the input ids), ``"bernoulli"`` (logits of independent labels),
        ``"gaussian"`` (means, unit variance), ``"heteroscedastic_gaussian"`` (means, then
        log-variances), ``"poisson"`` (log-rates); an object of :mod:`ewc_fast.fisher` with other
        options, as ``Categorical(dim=-1, classes=[2, 3])``; or an object of your own, see
        :class:`~ewc_fast.fisher.Likelihood`.
    estimator
        ``"exact"``: expectation over the model's own labels in closed form, C - 1 backward passes
        for C classes. ``"sampled"``: labels drawn from the model, unbiased for ``exact``.
        ``"rademacher"``: the vectors of ``exact`` with random signs in one backward pass, unbiased
        for it too. ``"empirical"``: the data's labels; not the Fisher information, though often
        used for it. ``"batched"``: the mean over batches of the square of the gradient of a
        batch's MEAN log-likelihood, at the data's labels, as in GMvandeVen/continual-learning with
        ``fisher_batch`` (which then divides by one batch too few): BIASED, near an optimum too
        small by about the batch size b, and kept only to reproduce results. Times :math:`b^2` it is
        the square of the summed gradient.
    max_samples
        Stop after so many samples.
    draws
        Backward passes to average, ``estimator="sampled"`` and ``"rademacher"`` only.
    forward
        ``forward(model, inputs) -> outputs`` where the usual call does not fit.
    generator
        Source of the drawn labels or signs, on the model's device. Without it the global one is
        used and set back afterwards, so that equal calls draw equal labels.
    progress
        Show a progress bar (needs tqdm).

    Returns
    -------
    dict
        Name to tensor of the parameter's shape and device, float32 (float64 for float64
        parameters), all >= 0. Frozen parameters are left out; one without influence is 0.

    Cost: for networks of ``nn.Linear`` layers with one position a sample, about one forward and
    backward pass a direction over whole batches; other parameters take one sample at a time.
    On the first batch what is recorded is compared with single samples; a parameter that differs
    takes the slow way.

    Raises
    ------
    TypeError, ValueError
        For data without samples or batch dimension, missing or impossible labels, bad weights,
        unknown names, or ``"exact"`` with more than 1,000 directions.

    References
    ----------
    Kirkpatrick et al. 2017, https://doi.org/10.1073/pnas.1611835114; van de Ven 2025 on the
    estimators, https://arxiv.org/abs/2502.11756.

    Examples
    --------
    >>> model = torch.nn.Linear(4, 3)
    >>> data = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
    >>> fisher = fisher_diagonal(model, data)
    >>> {name: tuple(values.shape) for name, values in fisher.items()}
    {'weight': (3, 4), 'bias': (3,)}
    """
    scores = Scores(likelihood, estimator, draws, generator)
    if max_samples is not None:
        _checks.positive_integer("max_samples", max_samples)
    params = _checks.trainable_parameters(model)
    pass_ = _Pass(
        model=getattr(model, "_orig_mod", model),  # a compiled module hides its operations
        params=params,
        scores=scores,
        forward=forward or call_model,
    )
    device = next(iter(params.values())).device
    with left_as_it_was(model), torch.enable_grad():
        read = read_batches(batches, max_samples, device)
        for batch in with_progress(read, batches, max_samples) if progress else read:
            pass_.add(batch)
    return pass_.mean()


class _Pass:
    """One pass over the data: sums of squares, and how each parameter's are taken."""

    def __init__(
        self,
        model: nn.Module,
        params: dict[str, nn.Parameter],
        scores: Scores,
        forward: Callable[[nn.Module, Any], Any],
    ) -> None:
        self._model, self._params, self._scores, self._forward = model, params, scores, forward
        self._sums = self._zeros(params)
        self._slow: set[str] = set()  # not recorded, or distrusted, in some batch
        self._verified = False
        self._samples = 0.0

    def add(self, batch: Batch) -> None:
        """Add the squares of every sample of the batch."""
        if self._scores.batched:
            self._add_whole(batch)
            return
        recorder, outputs = self._watch(batch)
        recorded: set[str] = set()
        if batch.size > 1 and outputs.requires_grad:  # else nothing to gain, or to verify on
            recorded = recorder.recorded() - self._slow
            if recorded and not self._verified:
                recorded -= self._verify(batch, recorder, outputs, recorded)
                self._verified = True
            self._slow = self._params.keys() - recorded
        vectors = self._scores.vectors(outputs, batch)
        others = [name for name in self._params if name not in recorded]
        if others:
            vectors = list(vectors)  # needed again for each sample
        if recorded:
            self._backward(recorder, outputs, vectors)
            sums = {name: self._sums[name] for name in recorded}
            for use in recorder.uses:
                use.add_to(sums)
        if others:
            for n in range(batch.size):
                sample, its_vectors = batch.samples(n, n + 1), [v[n : n + 1] for v in vectors]
                self._add_sample({name: self._sums[name] for name in others}, sample, its_vectors)
        self._samples += self._scores.samples(outputs, batch)

    def _add_whole(self, batch: Batch) -> None:
        """Add the square of the whole batch's gradient: not the Fisher of any sample."""
        outputs = self._outputs(batch)
        vectors = self._scores.vectors(outputs, batch)
        self._add_squares(self._sums, outputs, vectors)
        self._samples += self._scores.samples(outputs, batch)

    def mean(self) -> dict[str, Tensor]:
        """Return the mean over all samples."""
        if self._samples == 0:
            raise ValueError("batches: expected at least one sample, got none that counts")
        return {name: total.div_(self._samples) for name, total in self._sums.items()}

    def _watch(self, batch: Batch) -> tuple[Recorder, Tensor]:
        recorder = Recorder(self._params, batch.size)
        with recorder:
            outputs = self._outputs(batch)
        return recorder, outputs

    def _outputs(self, batch: Batch) -> Tensor:
        return run_model(self._forward, self._model, batch)

    def _zeros(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return sums to start from."""
        params = {name: self._params[name].detach() for name in names}
        return {
            name: torch.zeros_like(param, dtype=_checks.state_dtype(param.dtype))
            for name, param in params.items()
        }

    def _backward(self, recorder: Recorder, outputs: Tensor, vectors: Iterable[Tensor]) -> None:
        """Hand the recorder's uses their gradients; those of the parameters are not formed."""
        edges = [use.edge for use in recorder.uses]
        for vector in vectors:
            grads = torch.autograd.grad(
                outputs, edges, vector, retain_graph=True, allow_unused=True
            )
            for use, grad in zip(recorder.uses, grads, strict=True):
                if grad is not None:
                    use.add(grad)

    def _add_sample(self, sums: dict[str, Tensor], sample: Batch, vectors: list[Tensor]) -> None:
        """Add one sample's squares, by its own forward pass and one backward pass a vector."""
        self._add_squares(sums, self._outputs(sample), vectors)

    def _add_squares(
        self, sums: dict[str, Tensor], outputs: Tensor, vectors: Iterable[Tensor]
    ) -> None:
        """Add the squares of the whole gradient, one backward pass a vector."""
        params = [self._params[name] for name in sums]
        if not outputs.requires_grad:
            return
        for vector in vectors:
            grads = torch.autograd.grad(
                outputs, params, vector, retain_graph=True, allow_unused=True
            )
            found = [(s, g) for s, g in zip(sums.values(), grads, strict=True) if g is not None]
            functional.accumulate_square_([s for s, _ in found], [g for _, g in found])

    def _verify(
        self, batch: Batch, recorder: Recorder, outputs: Tensor, names: set[str]
    ) -> set[str]:
        """Return those names whose squares may differ from single samples'.

        Where rows are not samples, or samples mix, the gradient of two samples' outputs within the
        batch, squared row by row, is not the sum of squares of those samples' own gradients.
        """
        probe = torch.Generator().manual_seed(0)
        vectors = torch.randn(outputs.shape, generator=probe, dtype=torch.float64).to(outputs)
        distrusted = names & self._on_mixed_rows(recorder, outputs, vectors)
        together, alone = self._zeros(names), self._zeros(names)
        vector = torch.zeros_like(outputs)
        for n in (0, batch.size - 1):
            vector[n] = vectors[n]
            self._add_sample(alone, batch.samples(n, n + 1), [vector[n : n + 1]])
        self._backward(recorder, outputs, [vector])
        for use in recorder.uses:
            use.add_to(together)
        return distrusted | {
            name
            for name in names
            if not _close(together[name], alone[name], self._params[name].dtype)
        }

    def _on_mixed_rows(
        self, recorder: Recorder, outputs: Tensor, vectors: Tensor
    ) -> set[str | None]:
        """Return the parameters used on rows that are not the samples, one for one, in order.

        If each sample's vector is scaled by a power of two of its own, its row's squares must scale
        alike. A row that belongs to another sample, or to several, betrays itself.
        """
        order = torch.randperm(len(outputs), generator=torch.Generator().manual_seed(0))
        scales = torch.exp2(order % 16 - 8.0).to(outputs)
        squares = []
        for sent in (vectors, (vectors.movedim(0, -1) * scales).movedim(-1, 0)):
            self._backward(recorder, outputs, [sent])
            squares.append([use.take() for use in recorder.uses])
        mixed: set[str | None] = set()
        for use, plain, scaled in zip(recorder.uses, *squares, strict=True):
            if plain is None or scaled is None:
                continue
            expected = plain.sum(1) * scales.to(plain).square()
            if not torch.allclose(scaled.sum(1), expected, rtol=_tolerance(outputs.dtype), atol=0):
                mixed |= {use.weight, use.bias}
        return mixed


def _close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether two sets of squares differ by rounding only; wrong ones differ by a factor."""
    if found.numel() == 0:
        return True
    largest = torch.maximum(found.abs().amax(), expected.abs().amax())
    return bool((found - expected).abs().amax() <= _tolerance(dtype) * largest)


def _tolerance(dtype: torch.dtype) -> float:
    return 4 * math.sqrt(torch.finfo(dtype).eps)

"""Fisher diagonals by libraries: BackPACK, nngeometry, ASDL, Opacus, laplace-torch.

Each is used as its documentation says, on a copy of the model, made beforehand. Labels are
drawn from the same generator as everybody's, so that the sampled estimates can be compared.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
from fisher_case import (
    Diagonal,
    Estimator,
    FisherCase,
    Labels,
    add_squares,
    losses,
    summed_loss,
)
from harness import MismatchError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Call = Callable[[], Diagonal]
Build = Callable[[FisherCase, Estimator], Call]


def peers(
    case: FisherCase, estimator: Estimator, only: Collection[str] | None = None
) -> dict[str, Call]:
    """Return those that are installed and know the estimator; all, or only some."""
    return {
        name: _attempted(build, case, estimator)
        for name, (package, build, known) in PEERS.items()
        if importlib.util.find_spec(package)
        and estimator in known
        and (only is None or name in only)
    }


def _attempted(build: Build, case: FisherCase, estimator: Estimator) -> Call:
    """Build a peer; return its call, whose errors, and those of building, are its verdict."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = build(case, estimator)
    except Exception as error:
        return partial(_refuse, error)

    def call() -> Diagonal:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return built()
        except Exception as error:
            return _refuse(error)

    return call


def _refuse(error: Exception) -> Diagonal:
    first_line = (str(error).strip().splitlines() or [""])[0]
    raise MismatchError(f"error: {type(error).__name__}: {first_line[:100]}") from error


def backpack(case: FisherCase, estimator: Estimator) -> Call:
    """Return BackPACK's: the generalised Gauss-Newton diagonal where exact, else squares."""
    from backpack import backpack as recording
    from backpack import extend
    from backpack.extensions import DiagGGNExact, SumGradSquared

    model = copy.deepcopy(case.model)
    plain = isinstance(model, nn.Sequential) and not any(
        list(part.children()) for part in model.children()
    )
    model = extend(model, use_converter=not plain)
    loss = extend(nn.CrossEntropyLoss(reduction="sum"))
    extension = DiagGGNExact() if estimator == "exact" else SumGradSquared()
    field = "diag_ggn_exact" if estimator == "exact" else "sum_grad_squared"
    # Its converter names parameters anew, in the same order.
    names = [name for name, _ in case.model.named_parameters()]

    def call() -> Diagonal:
        totals: Diagonal = {}
        chosen = Labels(estimator)
        for inputs, data_labels in case.batches:
            model.zero_grad()
            logits = model(inputs)
            labels = chosen.of(logits, data_labels)
            if case.has_positions:
                logits = logits.transpose(1, 2)
            with recording(extension):
                loss(logits, labels).backward()
            for name, param in zip(names, model.parameters(), strict=True):
                if hasattr(param, field):
                    totals[name] = totals.get(name, 0) + getattr(param, field)
                    delattr(param, field)
        return {name: total / case.samples for name, total in totals.items()}

    return call


def nngeometry(case: FisherCase, estimator: Estimator) -> Call:
    """Return nngeometry's diagonal, over batches made beforehand."""
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatDiag
    from torch.utils.data import DataLoader

    model = copy.deepcopy(case.model)
    batches: Any = [(inputs.clone(), labels) for inputs, labels in case.batches]
    loader: DataLoader[Any] = DataLoader(batches, batch_size=None)

    def matrix() -> Any:
        if estimator == "exact":
            return FIM(model, loader, PMatDiag)
        chosen = Labels(estimator)

        def log_prob(inputs: Tensor, data_labels: Tensor) -> Tensor:
            logits = model(inputs)
            return -losses(logits, chosen.of(logits, data_labels))[:, None]

        return PMatDiag(TorchHooksJacobianBackend(model, log_prob), examples=loader)

    def call() -> Diagonal:
        # Given a loader of whole batches, it divides by their number.
        return _split(matrix().get_diag() * (len(batches) / case.samples), model)

    return call


def asdl(case: FisherCase, estimator: Estimator) -> Call:
    """Return ASDL's, which it leaves on the modules that it has a rule for."""
    from asdl import FISHER_EMP, FISHER_EXACT, SHAPE_DIAG, FisherConfig, get_fisher_maker
    from asdl.grad_maker import LOSS_CROSS_ENTROPY

    model = copy.deepcopy(case.model)
    kind = FISHER_EXACT if estimator == "exact" else FISHER_EMP
    config = FisherConfig(kind, [SHAPE_DIAG], loss_type=LOSS_CROSS_ENTROPY, data_size=1)
    maker = get_fisher_maker(model, config)

    def call() -> Diagonal:
        chosen = Labels(estimator)

        def loss(logits: Tensor, data_labels: Tensor, reduction: str = "sum") -> Tensor:
            assert reduction == "sum"
            return summed_loss(logits, chosen.of(logits, data_labels))

        for number, (inputs, data_labels) in enumerate(case.batches):
            logits = maker.setup_model_call(model, inputs)
            maker.setup_loss_call(loss, logits, data_labels)
            maker.forward_and_backward(accumulate=number > 0)
        found: Diagonal = {}
        for path, module in model.named_modules():
            diagonal = getattr(getattr(module, "fisher", None), "diag", None)
            for kind in ("weight", "bias"):
                values = getattr(diagonal, kind, None)
                if values is not None:
                    found[f"{path}.{kind}"] = values / case.samples
        return found

    return call


def opacus(case: FisherCase, estimator: Estimator) -> Call:
    """Return the sum of squares of the per-sample gradients that Opacus' hooks form."""
    from opacus.grad_sample import GradSampleModule

    # Its hooks work in training mode only; batch norm, which would differ, it refuses.
    model = GradSampleModule(copy.deepcopy(case.model).train(), loss_reduction="sum")

    def call() -> Diagonal:
        totals: Diagonal = {}
        chosen = Labels(estimator)
        for inputs, data_labels in case.batches:
            model.zero_grad(set_to_none=True)
            logits = model(inputs)
            summed_loss(logits, chosen.of(logits, data_labels)).backward()
            for name, param in model._module.named_parameters():
                per_sample = getattr(param, "grad_sample", None)
                if per_sample is not None:
                    total = totals.setdefault(name, torch.zeros_like(param.detach()))
                    add_squares(total, per_sample, [1.0] * len(per_sample))
                    param.grad_sample = None
        return {name: total / case.samples for name, total in totals.items()}

    return call


def laplace(case: FisherCase, estimator: Estimator) -> Call:
    """Return laplace-torch's: curvlinops' empirical Fisher, BackPACK's where exact."""
    from laplace.curvature import BackPackGGN, CurvlinopsEF

    model = copy.deepcopy(case.model)
    kind = BackPackGGN if estimator == "exact" else CurvlinopsEF
    curvature = kind(model, "classification")

    def call() -> Diagonal:
        total: Any = 0
        chosen = Labels(estimator)
        for inputs, data_labels in case.batches:
            labels = data_labels
            if estimator == "sampled":
                with torch.no_grad():
                    labels = chosen.of(case.model(inputs), data_labels)
            with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the others
                total = total + curvature.diag(inputs, labels)[1]
        return _split(total / case.samples, model)

    return call


def _split(diagonal: Tensor, model: nn.Module) -> Diagonal:
    """Return the parts of one long vector, by name."""
    shapes = {name: param.shape for name, param in model.named_parameters()}
    parts: Iterable[Tensor] = diagonal.split([shape.numel() for shape in shapes.values()])
    return {n: part.view(s) for (n, s), part in zip(shapes.items(), parts, strict=True)}


ALL: tuple[Estimator, ...] = ("exact", "sampled", "empirical")
PEERS: dict[str, tuple[str, Build, tuple[Estimator, ...]]] = {
    "BackPACK": ("backpack", backpack, ALL),
    "nngeometry": ("nngeometry", nngeometry, ALL),
    "ASDL": ("asdl", asdl, ALL),
    "Opacus": ("opacus", opacus, ("sampled", "empirical")),
    "laplace-torch": ("laplace", laplace, ALL),
}

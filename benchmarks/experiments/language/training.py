"""One language model learns the first domain, then the second, by each of the methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from ewc_fast import EWC, LoRAPenalty, fisher_diagonal
from ewc_fast.optim import AdamW

from . import text
from .model import GPT, adapt, deltas

Arrays = Mapping[str, NDArray[Any]]
EVALUATED_AT_ONCE = 64  # sequences


@dataclass(frozen=True)
class Settings:
    """The protocol's numbers."""

    width: int
    blocks: int
    heads: int
    length: int  # of a sequence, in bytes
    batch: int  # sequences; of both domains each, when they are learned together
    first_steps: int
    first_lr: float
    second_steps: int
    second_lr: float
    adapters_rank: int
    adapters_scaling: float
    adapters_lr: float
    fisher_sequences: int
    tested_sequences: int  # of each domain
    points: int  # of a curve, after its start
    seeds: int
    grids: Mapping[str, tuple[float, ...]]  # lambda, for each method that has one


@dataclass(frozen=True)
class Learned:
    """What is kept of the first domain: parameters and Fisher, by name, and how well it went."""

    seed: int
    parameters: Arrays
    fisher: Arrays
    perplexity: Mapping[str, tuple[float, float]]  # on both domains, by their parts


@dataclass(frozen=True)
class First:
    """Learn the first domain."""

    settings: Settings
    seed: int


@dataclass(frozen=True)
class Second:
    """Learn the second domain by a method, and watch both."""

    settings: Settings
    learned: Learned
    method: str
    ewc_lambda: float
    part: Literal["validation", "test"]
    points: int


@dataclass(frozen=True)
class Way:
    """What a training step does with the gradients: perhaps a pull first, then the optimizer."""

    optimizer: AdamW
    pull: Callable[[], object] = lambda: None


def learn_first(job: First) -> Learned:
    """Train on the documentation, and measure what each parameter is worth to it."""
    settings, domain = job.settings, text.documentation()
    model = _new_model(settings, job.seed)
    order = torch.Generator().manual_seed(job.seed)
    way = Way(AdamW(model.parameters(), lr=settings.first_lr))
    schedule = CosineAnnealingLR(way.optimizer, settings.first_steps)
    for _ in range(settings.first_steps):
        _step(model, way, text.draw(domain.train, settings.batch, settings.length, order))
        schedule.step()
    sequences = text.draw(domain.train, settings.fisher_sequences, settings.length, order)
    # Labels drawn from the model: the Fisher information. A sequence's gradient is squared whole.
    fisher = fisher_diagonal(
        model,
        [(ids, ids) for ids in sequences.split(settings.batch)],
        likelihood="causal_lm",
        estimator="sampled",
        generator=order,
    )
    return Learned(
        seed=job.seed,
        parameters=_arrays(model.state_dict()),
        fisher=_arrays(fisher),
        perplexity={part: on_both(model, settings, part) for part in ("validation", "test")},
    )


def learn_second(job: Second) -> list[tuple[float, float]]:
    """Train on the code; return the perplexity on both domains, from the start on."""
    settings = job.settings
    model = _new_model(settings, job.learned.seed)
    model.load_state_dict(_tensors(job.learned.parameters))
    way = METHODS[job.method](model, job)
    schedule = CosineAnnealingLR(way.optimizer, settings.second_steps)
    seen = [job.learned.perplexity[job.part]]
    for number, ids in enumerate(_second_batches(job), start=1):
        _step(model, way, ids)
        schedule.step()
        if number * job.points % settings.second_steps == 0:
            seen.append(on_both(model, settings, job.part))
    return seen


def _second_batches(job: Second) -> Iterator[Tensor]:
    order = torch.Generator().manual_seed(1000 + job.learned.seed)
    sources = [text.code().train]
    if job.method == JOINT:
        sources.append(text.documentation().train)
    for _ in range(job.settings.second_steps):
        yield torch.cat(
            [text.draw(each, job.settings.batch, job.settings.length, order) for each in sources]
        )


# The methods: what is trained, and what holds it


def _plain(model: GPT, job: Second) -> Way:
    return Way(AdamW(model.parameters(), lr=job.settings.second_lr))


def _uniform(model: GPT, job: Second) -> Way:
    ewc = EWC(model, ewc_lambda=job.ewc_lambda, importance="l2")
    ewc.consolidate()
    return Way(AdamW(model.parameters(), lr=job.settings.second_lr, ewc=ewc))


def _ewc(mode: Literal["gradient", "proximal"]) -> Callable[[GPT, Second], Way]:
    def prepare(model: GPT, job: Second) -> Way:
        ewc = EWC(model, ewc_lambda=job.ewc_lambda)
        ewc.consolidate_from(_tensors(job.learned.fisher))
        return Way(AdamW(model.parameters(), lr=job.settings.second_lr, ewc=ewc, mode=mode))

    return prepare


def _adapters(model: GPT, job: Second) -> Way:
    settings = job.settings
    adapted = adapt(
        model,
        rank=settings.adapters_rank,
        scaling=settings.adapters_scaling,
        seed=job.learned.seed,
    )
    factors = [param for param in model.parameters() if param.requires_grad]
    penalty = LoRAPenalty(deltas(adapted, _tensors(job.learned.fisher)), ewc_lambda=job.ewc_lambda)
    return Way(AdamW(factors, lr=settings.adapters_lr), pull=penalty.add_penalty_grad_)


JOINT = "both domains together"
PLAIN, UNIFORM = "fine-tuning", "uniform L2"
GRADIENT, PROXIMAL = "EWC, gradient", "EWC, proximal"
LORA, HELD_LORA = "LoRA", "LoRA with EWC"
METHODS: dict[str, Callable[[GPT, Second], Way]] = {
    PLAIN: _plain,
    UNIFORM: _uniform,
    GRADIENT: _ewc("gradient"),
    PROXIMAL: _ewc("proximal"),
    LORA: _adapters,  # with lambda 0
    HELD_LORA: _adapters,
    JOINT: _plain,
}


# Models, steps, scores


def _new_model(settings: Settings, seed: int) -> GPT:
    return GPT(
        width=settings.width,
        blocks=settings.blocks,
        heads=settings.heads,
        length=settings.length,
        seed=seed,
    )


def _step(model: nn.Module, way: Way, ids: Tensor) -> None:
    way.optimizer.zero_grad()
    _surprise(model, ids, "mean").backward()
    way.pull()
    way.optimizer.step()


def _surprise(model: nn.Module, ids: Tensor, reduction: str) -> Tensor:
    """Return -log p of each byte but the first, given those before it; or their mean."""
    logits = model(ids)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction=reduction)


def on_both(model: nn.Module, settings: Settings, part: str) -> tuple[float, float]:
    """Return the perplexity on documentation and on code: of their validation or test parts."""
    first, second = (
        perplexity(
            model,
            text.in_order(getattr(domain, part), settings.length)[: settings.tested_sequences],
        )
        for domain in (text.documentation(), text.code())
    )
    return first, second


@torch.no_grad()
def perplexity(model: nn.Module, sequences: Tensor) -> float:
    """Return exp of the mean surprise a byte: 256 for one who knows nothing, 1 for a prophet."""
    batches = sequences.split(EVALUATED_AT_ONCE)
    total = sum(_surprise(model, ids, "none").double().sum().item() for ids in batches)
    return math.exp(total / sequences[:, 1:].numel())


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Return what can be sent to another process whole: tensors are sent as handles."""
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _tensors(arrays: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}

"""The formats a Fisher can be kept in: bytes, the pull's error, and the time of a step.

Errors are those of the penalty's gradient, element by element, against the Fisher in float64, after
one task: Fishers are log-normal, as heavy-tailed as real ones (sigma = 2 spans 5 decades, 4 spans
10). Relative error in norm would hide all but the few largest.
"""

from __future__ import annotations

from functools import partial

import torch
from harness import MismatchError, Provider, Result, measure, script
from torch import Tensor, nn

from ewc_fast import EWC, reference
from ewc_fast.environment import environment

FORMATS = ("float32", "bfloat16", "e5m3")
SIGMAS = (1.0, 2.0, 4.0)
ELEMENTS = 1_000_000
FP32 = torch.finfo(torch.float32).eps


def consolidated(elements: int, sigma: float, storage: str) -> tuple[nn.Parameter, Tensor, EWC]:
    """Return a parameter that was moved since its only task, that task's Fisher, and the EWC."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(elements))
    fisher = torch.exp(sigma * torch.randn(elements, dtype=torch.float64))
    ewc = EWC([("weight", param)], ewc_lambda=1.0, storage=storage)
    ewc.consolidate_from({"weight": fisher.float()})
    with torch.no_grad():
        param += 0.01 * torch.randn(elements)
    return param, fisher.float().double(), ewc


def errors(sigma: float, storage: str) -> tuple[float, float, float, float]:
    """Return the median, mean and 99th percentile of the error of what pulls, and what does not."""
    param, fisher, ewc = consolidated(ELEMENTS, sigma, storage)
    ewc.add_penalty_grad_()
    exact = fisher * (param.detach().double() - ewc.anchor["weight"].double())
    moved = exact != 0
    assert param.grad is not None
    error = ((param.grad.double() - exact).abs() / exact.abs())[moved]
    lost = param.grad[moved] == 0
    kept = error[~lost].sort().values
    at = [kept[int(share * (len(kept) - 1))].item() for share in (0.5, 0.99)]
    return at[0], kept.mean().item(), at[1], lost.double().mean().item()


def error_table() -> str:
    """Return bytes a parameter, and errors: median / mean / 99th percentile / share lost."""
    head = " | ".join(f"sigma = {sigma:g}" for sigma in SIGMAS)
    lines = [f"| storage | bytes a parameter | {head} |", "|---|---:|" + "---|" * len(SIGMAS)]
    for storage in FORMATS:
        size = consolidated(1 << 16, 1.0, storage)[2].bytes_per_parameter
        cells = []
        for sigma in SIGMAS:
            median, mean, high, lost = errors(sigma, storage)
            cells.append(f"{median:.2g} / {mean:.2g} / {high:.2g} / {lost:.2g}")
        lines.append(f"| `{storage}` | {size:.4g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def provider(elements: int, storage: str) -> Provider:
    """Return the step ``EWC.add_penalty_grad_`` with a Fisher in a format."""
    param, _, ewc = consolidated(elements, 2.0, storage)
    param.grad = torch.zeros_like(param)
    return Provider(ewc.add_penalty_grad_, partial(check, param, ewc))


def check(param: nn.Parameter, ewc: EWC) -> None:
    """Raise unless a step adds the pull of the Fisher as it is kept."""
    assert param.grad is not None
    param.grad.zero_()
    ewc.add_penalty_grad_()
    fisher, anchor = ewc.fisher["weight"].float(), ewc.anchor["weight"]
    (pull,) = reference.penalty_grad([param.detach()], [fisher], [anchor], ewc_lambda=1.0)
    worst = ((param.grad - pull).abs() / pull.abs().clamp_min(1e-30)).max().item()
    if not worst <= 4 * FP32:
        raise MismatchError(f"the pull is off by {worst:g}")


def suite(quick: bool) -> Result:
    """Time a step with each format in units of the step with float32."""
    result = Result()
    sizes = {"1e5": 100_000} if quick else {"1e6": 1_000_000, "1e7": 10_000_000}
    names = (*FORMATS, "e5m3@cpu")
    for case, elements in sizes.items():
        providers = {name: provider(elements, name) for name in names}
        timings = measure(providers, seconds=0.2 if quick else 5.0, calls=3)
        result.add(case, timings, ["float32"])
    return result


if __name__ == "__main__":
    print(environment())
    print(error_table())
    script(suite)

"""Times calls on a GPU side by side, each checked first; on a CPU too, to try it all out."""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from harness import MismatchError, Provider, Result, Timings

OURS = "ewc_fast"  # how the names of this library's providers begin
WRONG, ERROR, UNAVAILABLE, NO_ROOM = "WRONG", "ERROR", "unavailable", "does not fit"
TURN = 2e-4  # seconds of the device's time that a turn takes at least, in calls one after another
MOST_CALLS = 20
MOST_HEAD_START = 5e-3  # seconds; a turn that takes longer to enqueue is bound by its launches

Call = Callable[[], object]


@dataclass(frozen=True)
class Effort:
    """How long providers are timed: rounds until time is up, at least so many."""

    seconds: float
    rounds: int


TRIED_OUT = Effort(seconds=0.0, rounds=2)


def device_for(quick: bool) -> torch.device:
    """Return the GPU; without one a quick run goes to the CPU, with Triton in its interpreter.

    One thread then: it is tried out, not measured.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not quick:
        raise SystemExit("no GPU: PyTorch finds no CUDA device; --quick tries this out on a CPU")
    os.environ["TRITON_INTERPRET"] = "1"  # before ewc_fast first imports a kernel
    torch.set_num_threads(1)
    return torch.device("cpu")


class Clock:
    """Seconds of the device's time for a call.

    On a GPU calls lie between two CUDA events, behind a kernel that keeps the GPU busy for as long
    as enqueuing them takes: what is measured is the device's work and not the Python before it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cycles_a_second = _sleeping_rate() if device.type == "cuda" else 0.0

    def wait(self) -> None:
        """Wait for all that was enqueued."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Call, calls: int = 1, head_start: float = 0.0) -> float:
        """Return the time of one of several calls, after the GPU has slept for a head start."""
        self.wait()
        if self.device.type != "cuda":
            started = perf_counter()
            for _ in range(calls):
                call()
            return (perf_counter() - started) / calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(head_start * self._cycles_a_second))
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / calls

    def host_seconds(self, call: Call, calls: int = 20, rounds: int = 15) -> float:
        """Return the time that enqueuing a call takes Python, while the GPU is idle otherwise."""
        if self.device.type != "cuda":
            return self.seconds(call)  # nothing is enqueued
        found = []
        for _ in range(rounds):
            self.wait()
            started = perf_counter()
            for _ in range(calls):
                call()
            found.append((perf_counter() - started) / calls)
        self.wait()
        return statistics.median(found)


def _sleeping_rate() -> float:
    """Return how many of ``torch.cuda._sleep``'s cycles pass in a second."""
    cycles = 20_000_000
    torch.cuda._sleep(cycles)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    return cycles / (begin.elapsed_time(end) * 1e-3)


def measure(
    providers: Mapping[str, Provider],
    clock: Clock,
    effort: Effort,
    *,
    ahead: bool = True,
) -> Timings:
    """Check every provider, then time those that are right in rounds until time is up.

    Each has a turn in every round, in an order drawn anew. ``ahead`` lets the host enqueue a turn
    before the device begins it; calls that wait for the device themselves go without.
    """
    refused, order = {}, []
    for name, provider in providers.items():
        why = refusal(provider)
        if why is None:
            order.append(name)
        else:
            refused[name] = why
    turns = {name: _turn(providers[name].call, clock, ahead) for name in order}
    found: dict[str, list[float]] = {name: [] for name in order}
    draw, begin, rounds = random.Random(0), perf_counter(), 0
    while order and (rounds < effort.rounds or perf_counter() - begin < effort.seconds):
        draw.shuffle(order)
        for name in order:
            found[name].append(clock.seconds(providers[name].call, *turns[name]))
        rounds += 1
    for name in order:
        why = refusal(providers[name])  # a race may pass once
        if why is not None:
            refused[name] = why
            del found[name]
    return Timings(found, found, refused)


def refusal(provider: Provider) -> str | None:
    """Return why a provider can't be timed, or ``None``: wrong, no memory, not there, raising."""
    try:
        provider.check()
    except MismatchError as mismatch:
        return f"{WRONG}: {mismatch}"
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return NO_ROOM
    # Whatever else is raised must not cost the other providers their times; it is reported, and a
    # suite in which one of ours raises fails.
    except Exception as error:
        # ewc_fast begins so where it refuses a backend that was asked for by name
        kind = UNAVAILABLE if str(error).startswith("impl=") else f"{ERROR}: {type(error).__name__}"
        return f"{kind}: {error}".splitlines()[0]
    return None


def _turn(call: Call, clock: Clock, ahead: bool) -> tuple[int, float]:
    """Return how many calls a turn has, and the head start that enqueuing them takes."""
    if clock.device.type != "cuda":
        return 1, 0.0
    call()
    alone = clock.seconds(call)
    calls = max(1, min(MOST_CALLS, int(TURN / max(alone, 1e-9))))
    if not ahead:
        return calls, 0.0
    enqueuing = clock.host_seconds(call, calls, rounds=3)
    return calls, min(MOST_HEAD_START, 2 * enqueuing * calls)


def launches(call: Call, device: torch.device) -> int | None:
    """Return how many kernels, copies and fills a call launches; ``None`` without a GPU."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    parts = ("LaunchKernel", "Memcpy", "Memset", "GraphLaunch")
    names = [event.name for event in seen.events()]
    return sum(n.startswith(("cuda", "cu")) and any(part in n for part in parts) for n in names)


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Return the most memory that was allocated during a call, what was there before included.

    ``None`` without a GPU.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated()


@dataclass
class Budget:
    """Seconds that a suite may take; what does not fit is left out and named."""

    seconds: float

    def __post_init__(self) -> None:
        self._end = perf_counter() + self.seconds

    @property
    def spent(self) -> bool:
        """Whether no further case should begin."""
        return perf_counter() >= self._end


Suite = Callable[[bool, Budget], Iterator[Result]]


def script(suite: Suite, seconds: float) -> None:
    """Run a suite from the command line; what was measured is written after every case.

    The exit status is 1 where something of this library was wrong or raised.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="small sizes; on a CPU too")
    parser.add_argument("--json", type=Path, help="write the result to this file as well")
    parser.add_argument("--seconds", type=float, default=seconds, help="begin no case after these")
    options = parser.parse_args()
    whole = Result()
    for part in suite(options.quick, Budget(options.seconds)):
        print(part, flush=True)
        whole.rows += part.rows
        whole.claims += part.claims
        whole.refused |= part.refused
        if options.json:
            options.json.write_text(json.dumps(whole.as_json()))
    failures = faults(whole)
    for failure in failures:
        print(f"FAULT  {failure}", file=sys.stderr)
    raise SystemExit(1 if failures else 0)


def faults(result: Result) -> list[str]:
    """Return what of this library was wrong or raised."""
    return [
        f"{name}: {why}"
        for name, why in result.refused.items()
        if f": {OURS}" in name and why.startswith((WRONG, ERROR))
    ]

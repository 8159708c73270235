"""State in the host's memory is copied ahead of its use, whole, and never over what is in use."""

from __future__ import annotations

import pytest
import torch
from training import same

from ewc_fast.offload import Prefetch


@pytest.mark.parametrize("lists", [0, 1, 2, 5])
def test_prefetch_hands_out_every_list_as_it_was(lists, device):
    given = [
        [torch.randn(3, n).t(), torch.randint(255, (n,)).to(torch.uint8), torch.randn(0)]
        for n in range(1, lists + 1)
    ]
    prefetch = Prefetch(torch.device(device))
    for _ in range(2):
        seen = 0
        for sent, came in zip(given, prefetch(given), strict=True):
            assert same([t.to(device) for t in sent], came)
            assert [t.stride() for t in sent] == [t.stride() for t in came]
            assert not {t.data_ptr() for t in sent if t.numel()} & {t.data_ptr() for t in came}
            seen += 1
        assert seen == lists


def test_prefetch_is_one_list_ahead():
    asked = []

    def given():
        for number in range(4):
            asked.append(number)
            yield [torch.full((2,), float(number))]

    used = 0
    for number, (copy_,) in enumerate(Prefetch(torch.device("cpu"))(given())):
        assert asked[-1] == min(number + 1, 3)
        assert copy_.tolist() == [number, number]
        used += 1
    assert used == 4


class Log(list):
    """Stands in for CUDA's streams and events, and writes down what waits for what."""

    def __init__(self, monkeypatch):
        log, main = self, "main"
        log.current = main

        class Event:
            recorded = None

            def record(self, stream):
                self.recorded = len(log)
                log.append(("record", str(stream)))

        class Stream:
            def __str__(self):
                return "side" if self is log.side else main

            def wait_event(self, event):
                log.append((str(self), "waits for", event.recorded))

        class On:
            def __init__(self, stream):
                self.stream = stream

            def __enter__(self):
                log.current = str(self.stream)

            def __exit__(self, *_):
                log.current = main

        log.side, user, empty, copy_ = Stream(), Stream(), torch.empty, torch.Tensor.copy_
        replaced = {
            (torch.cuda, "Event"): Event,
            (torch.cuda, "Stream"): lambda device: log.side,
            (torch.cuda, "stream"): On,
            (torch.cuda, "current_stream"): lambda device: (
                log.side if log.current == "side" else user
            ),
            (torch, "empty"): lambda *size, dtype, device: empty(*size, dtype=dtype),
            (torch.Tensor, "record_stream"): lambda tensor, stream: log.append(
                ("memory is kept for", str(stream))
            ),
            (torch.Tensor, "copy_"): lambda to, of, non_blocking=False: (
                log.append(("copy", log.current, non_blocking)),
                copy_(to, of),
            )[1],
        }
        for (owner, name), stand_in in replaced.items():
            monkeypatch.setattr(owner, name, stand_in)


def test_on_a_gpu_copies_run_ahead_on_a_side_stream_and_lanes_are_not_overwritten(monkeypatch):
    given = [[torch.full((4,), float(n))] for n in range(4)]
    with monkeypatch.context() as patch:
        log = Log(patch)
        prefetch = Prefetch(torch.device("cuda"))
        for (copy_,) in prefetch(given):
            log.append(("use", int(copy_[0])))
    uses = [log.index(("use", n)) for n in range(4)]
    copies = [i for i, entry in enumerate(log) if entry == ("copy", "side", True)]
    assert len(copies) == log.count(("memory is kept for", "main")) == 4
    for n in range(4):
        filled = log[copies[n] + 1 :].index(("record", "side")) + copies[n] + 1
        assert filled == copies[n] + 1  # recorded right behind the copy
        assert log[uses[n] - 1] == ("main", "waits for", filled)
        assert log[uses[n] + 1] == ("record", "main")
        if n + 1 < 4:
            assert copies[n + 1] < uses[n]  # the next copy is under way
        if n >= 2:  # the lane's last use is over before it is filled again
            assert log[copies[n] - 1] == ("side", "waits for", uses[n - 2] + 1)

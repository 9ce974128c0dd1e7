"""A bound call: the launches of a call, with its addresses, whatever the tensors hold when it starts."""

from threading import Thread
from typing import Any

import pytest
import torch

import attngen
from attngen.errors import ArgumentError
from attngen.runtime import launch
from attngen.runtime.launch import Launcher
from tests.plans import no_code
from tests.runtime.test_launch import KERNEL, Recorder

PAGED = {"problem": {"head_dim": 32, "keys": "paged"}, "mask": "causal", "split": "auto"}


def decoding(*lengths: int) -> tuple[attngen.Kernel, tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """A kernel of few queries, tensors for it on the CPU, and what it is passed by name."""
    make = torch.Generator().manual_seed(0)
    q = torch.randn(len(lengths), 1, 4, 32, generator=make).bfloat16()
    k, v = torch.randn(2, 8 * len(lengths), 16, 2, 32, generator=make).bfloat16()
    table = torch.arange(8 * len(lengths), dtype=torch.int32).view(len(lengths), 8)
    named = {"block_table": table, "seqused_k": torch.tensor(lengths, dtype=torch.int32)}
    return attngen.compile(PAGED, arch="simulator"), (q, k, v), named


def test_a_bound_call_starts_what_the_call_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same struct every time, of addresses that were given, and nothing of another call of the signature in it."""
    recorder = Recorder(monkeypatch)
    launcher = Launcher(KERNEL.manifest, no_code, load=recorder.load, start=recorder.start)
    q, k = torch.randn(2, 300, 4, 64).bfloat16(), torch.randn(2, 100, 2, 64).bfloat16()
    out = torch.empty_like(q)
    launcher.run(q, k, k, out=out)
    (made,), start = launcher.bind(("out",), q, k, k, None, (out,))
    assert len(recorder.structs) == 1 and made is out
    launcher.run(q.clone(), k.clone(), k.clone())
    start()
    start()
    called, others, *bound = recorder.structs
    assert bound == [called] * 2 != [others] * 2
    assert recorder.grids == recorder.grids[:1] * 4


def test_a_thread_of_its_own_starts_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Structs are each thread's own; those of a bound call hold its addresses in every one."""
    recorder = Recorder(monkeypatch)
    launcher = Launcher(KERNEL.manifest, no_code, load=recorder.load, start=recorder.start)
    q = torch.randn(1, 64, 2, 64).bfloat16()
    _, start = launcher.bind(("out",), q, q, q)
    start()
    other = Thread(target=start)
    other.start()
    other.join()
    assert recorder.structs[0] == recorder.structs[1]


def test_counters_are_those_of_the_stream_that_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the one on which the call was bound."""
    of_kernel = attngen.compile({**PAGED, "problem": {"head_dim": 64, "keys": "paged"}}, arch="sm_90a")
    asked: list[tuple[int, int]] = []

    class Counters:
        def prepare(self, device: int, count: int = 1) -> None:
            pass

        def address(self, device: int, stream: int, count: int = 1) -> int:
            asked.append((stream, count))
            return 16 * stream

    counters, sent = Counters(), []
    for module in ("launch", "bound_launches"):
        monkeypatch.setattr(f"attngen.runtime.{module}.COUNTERS", counters)
    recorder = Recorder(monkeypatch)
    monkeypatch.setattr(recorder, "start", lambda *passed: sent.append(passed))
    launcher = launch.Launcher(of_kernel.manifest, no_code, load=recorder.load, start=recorder.start)
    _, (q, k, v), named = decoding(100, 7)
    q, k, v = (x.repeat(*[1] * (x.dim() - 1), 2) for x in (q, k, v))
    _, start = launcher.bind(("out",), q, k, v, None, (), "bshd", named)
    assert not asked and not sent
    for stream in (3, 5):
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index, stream=stream: stream)
        start()
    assert [stream for stream, _ in asked] == [3, 5] and len(sent) == 4  # each lists its parts first
    assert {count for _, count in asked} != {1}


def test_what_tensors_hold_counts_as_it_is_then() -> None:
    """Queries, caches and lengths; the result stays where it is. A list that is made anew where it lies is followed."""
    kernel, (q, k, v), named = decoding(100, 7)
    out = torch.empty_like(q)
    whole = kernel.bind(q, k, v, return_lse=True, **named)
    work = kernel.work(q, k, v, **named)
    listed = kernel.bind(q, k, v, out=out, work=work, **named)
    for lengths in ((100, 7), (3, 128), (0, 61)):
        q.copy_(torch.randn_like(q))
        named["seqused_k"].copy_(torch.tensor(lengths))
        expected, lse = kernel(q, k, v, return_lse=True, **named)
        found = whole()
        assert torch.equal(found[0], expected) and torch.equal(found[1], lse) and found[0] is whole.out
        assert kernel.work(q, k, v, out=work, **named) is work
        assert listed() is out and torch.equal(out, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": torch.empty(2, 1, 4, 16)}, "out: got"),
        ({"work": "a list"}, "work: got str"),
        ({"softmax_scale": "1"}, "softmax_scale"),
        ({"k": torch.zeros(16, 16, 2, 32, dtype=torch.bfloat16, requires_grad=True)}, "requires grad"),
    ],
    ids=["out", "work", "scale", "grad"],
)
def test_what_a_call_refuses_is_not_bound(changes: dict[str, Any], message: str) -> None:
    """Arguments are looked at once, when the call is bound."""
    kernel, (q, k, v), named = decoding(100, 7)
    with pytest.raises(ArgumentError, match=message):
        kernel.bind(**{"q": q, "k": k, "v": v, **named, **changes})


def test_a_list_is_made_anew_for_calls_of_its_sizes_alone() -> None:
    """What it was made for, and what is asked for, are named."""
    kernel, (q, k, v), named = decoding(100, 7)
    work = kernel.work(q, k, v, **named)
    with pytest.raises(ArgumentError, match="batch 2"):
        one = {name: x[:1] for name, x in named.items()}
        kernel.work(q[:1], k, v, out=work, **one)
    with pytest.raises(ArgumentError, match="out: got int"):
        kernel.work(q, k, v, out=3, **named)

"""What a call passes for keys in pages: each fault is named, with the place and the cure; launches are remembered."""

from typing import Any

import pytest
import torch

import attngen
from attngen.errors import ArgumentError, SpecError
from attngen.plan import division_by
from attngen.runtime import Launcher
from attngen.runtime.prepared import offsets
from tests.lengths.batches import batch, compiled
from tests.lengths.paged_batches import paged
from tests.plans import no_code
from tests.runtime.test_launch import Recorder


def faults() -> list[tuple[str, str]]:
    """A change of the arguments of a good call, as the text of an expression on them, and what is said of it."""
    return [
        ("{'block_table': None}", "block_table: got nothing, expected a torch tensor: i32[batch, max_pages]"),
        ("{'block_table': bt.long()}", "block_table: got dtype torch.int64, expected torch.int32"),
        ("{'block_table': bt[0]}", "block_table: got 1 dimensions, expected 2: i32[batch, max_pages]"),
        ("{'block_table': bt[:1]}", "block_table: got 1 rows, expected 2, as q has 2 sequences"),
        ("{'block_table': bt.repeat(1, 2)[:, ::2]}", "stride 2 in the last dimension, expected 1"),
        ("{'block_table': bt.to('meta')}", "block_table: got device meta, expected cpu"),
        ("dict.fromkeys('kv', kc[:, :1].expand(-1, 2**29, -1, -1))", "expected at most 2^30 - 512 rows"),
        (
            "{'block_table': bt[:0], 'cache_batch_idx': used}",
            "block_table: got 0 rows, expected at least one",
        ),
        ("{'cache_batch_idx': used.long()}", "cache_batch_idx: got dtype torch.int64, expected torch.int32"),
        ("{'cache_batch_idx': used[:1]}", "cache_batch_idx: got shape (1,), expected i32[batch]"),
        ("{'cache_batch_idx': bt}", "cache_batch_idx: got 2 dimensions, expected 1: i32[batch]"),
        ("{'cache_batch_idx': used.repeat(2)[::2]}", "cache_batch_idx: got stride 2, expected contiguous"),
        ("{'seqused_k': None}", "seqused_k: got nothing, expected a torch tensor: i32[batch]"),
        ("{'seqused_k': used[:1]}", "seqused_k: got 1 elements, expected 2, as q has 2 sequences"),
        ("{'leftpad_k': used.float()}", "leftpad_k: got dtype torch.float32, expected torch.int32"),
        ("{'k': kc[:0], 'v': kc[:0]}", "argument k: got 0 pages, expected at least one"),
        ("{'k': kc[:, :0], 'v': kc[:, :0]}", "argument k: got pages of 0 rows, expected of one or more"),
        (
            "{'k': kc[0], 'v': kc[0]}",
            "argument k: got 3 dimensions, expected 4: (pages, page, heads, head_dim)",
        ),
        (
            "{'v': kc[:-1]}",
            "argument v: got shape (6, 4, 2, 16), expected (7, 4, 2, 16) = (pages, page, heads",
        ),
        ("{'v': kc[:, :3], 'layout': 'hnd'}", "argument v: got shape (7, 3, 2, 16), expected (7, 4, 2, 16)"),
        (
            "{'k': kc[:, :, [0, 1, 1]], 'v': kc[:, :, [0, 1, 1]]}",
            "3 heads, expected a divisor of q's 4 heads",
        ),
        ("{'k': kc.half()}", "argument k: got dtype torch.float16, expected torch.bfloat16"),
        ("{'layout': 'bhsd'}", "layout: got 'bhsd', expected 'nhd' or 'hnd', as the pages of k and v lie"),
        ("{'cu_seqlens_k': used}", "none: keys are paged"),
        ("{'tables': object()}", "tables: got object, expected None"),
    ]


@pytest.mark.parametrize(("change", "expected"), faults())
def test_a_fault_in_what_says_pages_is_named(change: str, expected: str) -> None:
    """Wrong types, devices, shapes and strides of tables and caches, pages of nothing, layouts of other tensors."""
    cached, kernel = (
        paged(batch("dense", "padded", (3, 3), (8, 4)), 4),
        compiled("fa2", "dense", "paged", "causal"),
    )
    passed: dict[str, Any] = {"q": cached.q, "k": cached.k, "v": cached.v, **cached.passed}
    names = {"bt": passed["block_table"], "used": passed["seqused_k"], "kc": cached.k}
    assert kernel(**passed).any()
    with pytest.raises(ArgumentError) as caught:
        kernel(**passed | eval(change, names | {"object": object}))
    assert expected in str(caught.value)


def test_strides_of_caches_are_multiples_of_16_bytes() -> None:
    """On a GPU's target; the cure is named."""
    kernel = attngen.compile({"problem": {"head_dim": 32, "keys": "paged"}}, arch="sm_80")
    q, odd = torch.zeros(1, 1, 1, 32).bfloat16(), torch.zeros(2, 4, 1, 36).bfloat16()[..., :32]
    said = {"block_table": torch.zeros(1, 1).int(), "seqused_k": torch.zeros(1).int()}
    with pytest.raises(
        ArgumentError, match="argument k: got stride 36 in dimension 1 .72 bytes., expected a multiple of 8"
    ):
        kernel(q, odd, odd, **said)
    with pytest.raises(ArgumentError, match="argument k: got a tensor that requires grad"):
        kernel(q, torch.zeros(2, 4, 1, 32).bfloat16().requires_grad_(), odd, **said)


def test_only_pages_take_a_table() -> None:
    """A kernel of other keys says what its spec would have to say; None says nothing."""
    x, kernel = torch.ones(1, 3, 2, 16).bfloat16(), compiled("fa2", "dense", "dense", "causal")
    assert kernel(x, x, x, block_table=None).any()
    with pytest.raises(ArgumentError, match=r"block_table: got an argument[^!]*say problem: \{keys: paged\}"):
        kernel(x, x, x, block_table=torch.zeros(1, 1).int())
    with pytest.raises(ArgumentError, match="layout: got 'hnd', expected 'bshd' or 'bhsd'"):
        kernel(x, x, x, layout="hnd")


@pytest.mark.parametrize(
    ("more", "message", "nearest"),
    [
        ("gradients: [q, k, v]", "gradients must be [] where keys are paged", "[]"),
        ("schedule: {kind: serial}", "schedule.kind = serial does not take keys in pages", "fa2"),
        ("schedule: {kind: serial}", "does not take keys in pages", "pingpong"),
        (
            "precision: {inputs: e4m3}",
            "precision.inputs = e4m3 must have 16 bits where keys are paged",
            "bf16",
        ),
        ("tensors: {pages: 'i32[batch]'}", "tensors.pages", ""),
    ],
)
def test_what_pages_rule_out_is_refused(more: str, message: str, nearest: str) -> None:
    """Gradients, e4m3, schedules of other copies, and names that calls have; the nearest that would do is named."""
    with pytest.raises(SpecError) as caught:
        attngen.compile(f"target: sm_90a\nproblem: {{head_dim: 64, keys: paged}}\n{more}\n")
    fault = caught.value.diagnostics[0]
    assert message in fault.message and (not nearest or nearest in fault.nearest)
    with pytest.raises(SpecError, match="problem.queries = paged must be one of dense, ragged, padded"):
        attngen.load({"problem": {"head_dim": 64, "queries": "paged"}})


@pytest.mark.parametrize("arch", ["simulator", "sm_80", "sm_90a"])
def test_auto_has_fa2_for_pages_of_any_size(arch: str) -> None:
    """On every target; on Hopper another takes those that are pieces."""
    kernel = attngen.compile({"problem": {"head_dim": 64, "keys": "paged"}}, arch=arch)
    assert kernel.plan.schedule == "fa2" and kernel.serving(torch.empty(0)) is kernel.plan
    assert len(kernel.call.programs) == 1 + (arch == "sm_90a")


def test_a_launch_is_handed_tables_strides_and_sizes_and_is_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Numbers of the call's caches, by which rows are divided; another table of the same shape binds nothing anew.

    Pages of 20 rows are no pieces, so that no map is made of them, which wants a driver.
    """
    kernel = attngen.compile({"problem": {"head_dim": 64, "keys": "paged"}}, arch="sm_90a")
    plan, starts = kernel.plan, offsets(kernel.manifest.kernels[-1])
    recorder = Recorder(monkeypatch, kernel, max(starts.values()) + 4)
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False, raising=False)
    monkeypatch.setattr(
        recorder,
        "start",
        lambda *launch: Recorder.start(recorder, launch[0], launch[1], plan.threads, *launch[3:]),
    )
    launcher = Launcher(kernel.manifest, no_code, load=recorder.load, start=recorder.start)
    q, cache = torch.zeros(2, 3, 4, 64).bfloat16(), torch.zeros(9, 2, 20, 64).bfloat16()
    table, used = torch.zeros(2, 10, dtype=torch.int32)[:, :7], torch.zeros(2, dtype=torch.int32)
    passed = {"block_table": table, "seqused_k": used, "cache_batch_idx": None}
    launcher.run(q, cache, cache, layout="hnd", declared=passed)
    sent = recorder.structs[-1]

    def said(value: str, size: int = 4) -> int:
        return int.from_bytes(sent[starts[value] : starts[value] + size], "little")

    assert said("block_table.ptr", 8) == table.data_ptr() and said("cache_batch_idx.ptr", 8) == 0
    assert said("block_table.stride_0", 8) == 10
    assert [said(f"k.stride_{of}", 8) for of in ("page", "seqlen", "head")] == [2 * 20 * 64, 64, 20 * 64]
    sizes = {"pages": 9, "page_size": 20, "table_rows": 2, "seqlen_k": 7 * 20, **division_by(20)}
    assert {name: said(name) for name in sizes} == sizes
    monkeypatch.setattr("attngen.runtime.launch.bind", None)
    other = torch.ones(2, 10, dtype=torch.int32)[:, :7]
    launcher.run(q, cache, cache, layout="hnd", declared={**passed, "block_table": other})
    with pytest.raises(TypeError):  # what binds is gone
        launcher.run(q, cache, cache, layout="hnd", declared={**passed, "block_table": table[:, :6]})

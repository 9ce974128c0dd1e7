"""The texts of lone kernels: run by g++ beside their meaning in torch, and compiled by NVRTC. Needs no GPU."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

from attngen.arch import ARCHS
from attngen.dtypes import BF16, E4M3, F16, F32, DType
from attngen.runtime import disassemble
from attngen.serving.append_call import AppendCall
from attngen.serving.append_checks import checked_call
from attngen.serving.append_kernel import AppendRows
from attngen.serving.appending import kernel_for
from attngen.serving.appending import launch_of as launch_of_append
from attngen.serving.lone_kernel import LoneKernel
from attngen.serving.meanings import appended, merged
from attngen.serving.merge_kernel import MOST_PARTS, MergeStates
from attngen.serving.merging import launch_of
from tests.effort import examples
from tests.emit.sass import done_before_waiting
from tests.serving.append_cases import (
    AppendCase,
    Before,
    append_cases,
    assert_appended,
    memory_of,
    with_cases,
)
from tests.serving.merge_cases import MergeCase, assert_near, merge_cases, merged_in_f64
from tests.serving.on_cpu import launcher_by_gpp, no_gpu

__all__ = ["no_gpu"]
SIMULATOR = ARCHS["sm_80"]
FOR_GPP = (
    (torch.bfloat16, torch.bfloat16, (torch.bfloat16, False)),
    (torch.float16, torch.float8_e4m3fn, (torch.float32, True)),
    (torch.float32, torch.float16, None),
)
"""Formats that g++ compiles texts for, a second each."""
FORMATS = {torch.float32: F32, torch.bfloat16: BF16, torch.float16: F16}


@pytest.mark.usefixtures("no_gpu")
@settings(
    max_examples=examples(1), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(merge_cases)
def test_the_text_merges_as_torch_does(case: MergeCase) -> None:
    """Every element of out and lse, of any strides and formats, is written once, and nothing beside them is."""
    outs, lses, sink = case.parts_and_sink()
    outs, lses = outs[:MOST_PARTS], lses[:MOST_PARTS]
    assume(outs[0].numel())
    outs, lses = [_on_16_bytes(x) for x in outs], lses
    kernel = MergeStates(SIMULATOR, FORMATS[case.dtype], FORMATS[case.dtype])
    guarded = torch.full((outs[0].numel() + 64,), torch.nan, dtype=case.dtype)
    out = guarded[32:-32].view(outs[0].shape)
    lse = torch.full_like(lses[0], torch.nan, memory_format=torch.contiguous_format)
    ready = launcher_by_gpp(kernel).prepare(
        out.device, *launch_of(kernel, outs, lses, sink, case.call_layout)
    )
    ready.start([*outs, *lses, *(() if sink is None else (sink,)), out, lse])
    assert guarded[:32].isnan().all() and guarded[-32:].isnan().all()
    assert_near((out, lse), merged_in_f64(outs, lses, sink, case.call_layout))
    wanted = merged(outs, lses, sink, case.call_layout, case.dtype)
    assert torch.equal(lse.isinf(), wanted[1].isinf())


@pytest.mark.usefixtures("no_gpu")
@settings(
    max_examples=examples(2), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@with_cases
@given(append_cases(FOR_GPP))
def test_the_text_appends_as_torch_does(case: AppendCase) -> None:
    """The same bits in all of the caches' memory, and in q, whatever numbers say."""
    before, call = Before.of(case), call_of(case)
    wanted_q, wanted = appended(call), Before.of(case)
    for name, x in before.caches.items():
        case.tensors[name].view(torch.uint8).copy_(x.view(torch.uint8))
    q = None if call.q is None else torch.full_like(call.q, torch.nan, memory_format=torch.contiguous_format)
    if call.tokens:
        kernel = replace(kernel_for(call), arch=SIMULATOR)
        names, *numbers = launch_of_append(call)
        turns = {} if call.rotary is None else vars(call.rotary)
        given = {**vars(call), **turns, "q_rotated": q}
        ready = launcher_by_gpp(kernel).prepare(call.k_new.device, names, *numbers)
        ready.start([given[name] for name in names])
    assert_appended(case, before, None if q is None else q.view(case.tensors["q"].shape))
    for name, x in wanted.memory.items():
        assert torch.equal(memory_of(case.tensors[name]), x)
    assert q is None or wanted_q is None or torch.equal(q.view(wanted_q.shape), wanted_q)


def call_of(case: AppendCase) -> AppendCall:
    """The call of a case, checked."""
    left_out = (
        "block_table",
        "cu_seqlens_q",
        "cache_batch_idx",
        "leftpad_k",
        "rotary",
        "q",
        "k_scale",
        "v_scale",
    )
    flags = {"rotary_interleaved": True, "q_advances": True}
    return checked_call(**{**dict.fromkeys(left_out), **flags, **case.tensors})


def _on_16_bytes(x: torch.Tensor) -> torch.Tensor:
    """The tensor where it may be read 16 bytes at a time, as far apart as it is."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


LONE = [
    MergeStates(ARCHS["sm_80"], BF16, BF16),
    MergeStates(ARCHS["sm_90a"], BF16, BF16),
    MergeStates(ARCHS["sm_90a"], F32, F16),
    AppendRows(ARCHS["sm_80"], BF16, BF16, "halves", BF16),
    AppendRows(ARCHS["sm_90a"], BF16, BF16, "none", BF16),
    AppendRows(ARCHS["sm_90a"], BF16, BF16, "interleaved", F32),
    AppendRows(ARCHS["sm_90a"], F16, E4M3, "halves", F32),  # which spilled
    AppendRows(ARCHS["sm_120"], BF16, E4M3, "halves", BF16),
]


@pytest.mark.usefixtures("nvdisasm")
@pytest.mark.parametrize("kernel", LONE, ids=lambda kernel: kernel.name)
def test_texts_compile_without_spills(kernel: LoneKernel) -> None:
    """No stack, no local memory; loads of 16 bytes, and none before what came ahead in the stream has ended."""
    compiled = kernel.compiled()
    (used,) = compiled.resources
    assert used.name == kernel.name
    assert (used.spill_stores, used.spill_loads, used.stack_bytes) == (0, 0, 0) and used.registers <= 64
    sass = disassemble(compiled.cubin)
    assert not re.search(r"\b(LDL|STL)\b", sass)
    stores = "STG.E.64" if isinstance(kernel, AppendRows) and kernel.cache is E4M3 else "STG.E.128"
    assert "LDG.E.128" in sass and stores in sass
    assert not kernel.arch.starts_early or not done_before_waiting(sass)
    assert ("griddepcontrol" in kernel.source) == kernel.arch.starts_early


def test_texts_are_the_same_bytes_and_their_structs_fit() -> None:
    """The same fields give the same text under one name; a parameter struct has at most 4 KB."""
    for kernel in LONE:
        again: DType = type(kernel)(**vars(kernel))
        assert again == kernel and again.source == kernel.source and f"\n{kernel.name}(" in kernel.source
        assert sum({"i32": 4}.get(param.ctype, 8) for param in kernel.params) <= 4096 - 8
    assert len({kernel.name for kernel in LONE}) == len(LONE)

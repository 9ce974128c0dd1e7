"""Merging partial results on a GPU: values of every format and stride, bits, graphs, streams, and the example."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_kernels import wait_for_gpu

import attngen
from attngen.errors import ArgumentError
from tests.serving.merge_cases import LAYOUTS, MergeCase, assert_near, merged_in_f64

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]
ROOT = Path(__file__).parents[2]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def on_gpu(x: torch.Tensor) -> torch.Tensor:
    """The tensor on the GPU, rows as far apart as they are, on 16 bytes."""
    reach = sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)) + 1
    there = torch.zeros(reach if x.numel() else 0, dtype=x.dtype, device="cuda")
    return there.as_strided(x.shape, x.stride()).copy_(x)


def case_of(
    layout: str, dtype: torch.dtype, parts: int, columns: int, sink: torch.dtype | None, seed: int = 0
) -> MergeCase:
    return MergeCase(layout, dtype, parts, (3, 37, 5, columns), 30, 4.0, sink, seed)


@pytest.mark.parametrize("sink", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_merged_values_are_those_of_f64(layout: str, dtype: torch.dtype, sink: torch.dtype | None) -> None:
    """One to seventy parts, rows without keys with NaN in them, heads from 8 to 512 columns wide."""
    for parts, columns in ((1, 64), (2, 128), (3, 8), (5, 192), (32, 64), (33, 64), (70, 8), (2, 512)):
        case = case_of(layout, dtype, parts, columns, sink, seed=parts)
        outs, lses, logits = case.parts_and_sink()
        there = None if logits is None else on_gpu(logits)
        made = [list(map(on_gpu, x)) for x in (outs, lses)]
        found = attngen.merge_states(*made, there, return_lse=True, layout=case.call_layout)
        wait_for_gpu()
        out, lse = (x.cpu() for x in found)
        assert_near((out, lse), merged_in_f64(outs, lses, logits, case.call_layout))
        again = attngen.merge_states(*made, there, return_lse=True, layout=case.call_layout)
        assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


def test_one_part_with_keys_is_the_result() -> None:
    """Its own numbers, for the exponential of 0 and the logarithm of 1 are exact; empty rows have none."""
    outs, lses, _ = case_of("bshd", torch.bfloat16, 6, 128, None).parts_and_sink()
    for lse in lses[:5]:
        lse.fill_(math.inf)
    lses[5][lses[5] == math.inf] = -math.inf
    found, lse = attngen.merge_states(list(map(on_gpu, outs)), list(map(on_gpu, lses)), return_lse=True)
    empty = lses[5] == -math.inf
    assert torch.equal(lse.cpu(), lses[5]) and 0 < empty.sum() < empty.numel()
    wanted = outs[5].masked_fill(empty.transpose(1, 2).unsqueeze(-1), 0.0)
    assert torch.equal(found.cpu(), wanted)


def test_parts_of_keys_merge_to_all_of_them() -> None:
    """Kernels' own outputs and lses of two parts of the keys, and one call over all with a sink."""
    q, k, v = (
        torch.randn(2, n, h, 64, device="cuda", dtype=torch.bfloat16)
        for n, h in ((50, 4), (900, 2), (900, 2))
    )
    sink = torch.tensor([0.5, -3.0, 6.0, 2.0], device="cuda")
    parts = [
        attngen.attention(q, k[:, at], v[:, at], return_lse=True) for at in (slice(300), slice(300, None))
    ]
    out, lse = attngen.merge_states(*map(list, zip(*parts, strict=True)), sink, return_lse=True)
    wanted, wanted_lse = attngen.attention(q, k, v, return_lse=True, sink=sink)
    torch.testing.assert_close(out, wanted, rtol=2**-6, atol=2e-3)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-5, atol=1e-4)


def test_a_first_call_may_be_captured() -> None:
    """A replay, on another stream, merges what the parts hold then."""
    outs, lses, sink = case_of("ragged", torch.float16, 3, 80, torch.float32).parts_and_sink()
    held, of_held, logits = list(map(on_gpu, outs)), list(map(on_gpu, lses)), on_gpu(sink)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attngen.merge_states(held, of_held, logits, return_lse=True)
    for factor in (1.0, 0.5):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            for x, value in zip(held, outs, strict=True):
                x.copy_(value.cuda() * factor)
            graph.replay()
        stream.synchronize()
        wanted = merged_in_f64([x * factor for x in outs], lses, sink, "bshd")
        assert_near((found[0].cpu(), found[1].cpu()), wanted)


def test_what_a_gpu_does_not_take_is_refused() -> None:
    """Columns that are no whole chunks, rows off 16 bytes, parts on two devices."""
    out, lse = torch.zeros(2, 5, 3, 24, device="cuda").half(), torch.zeros(2, 3, 5, device="cuda")
    for outs, lses, said in (
        ([out[..., :12]], [lse], r"outs\[0\]: got head_dim 12, expected a multiple of 8"),
        ([out[..., 4:20]], [lse], r"outs\[0\]: got an address that is 8 bytes past"),
        ([out, out.cpu()], [lse, lse.cpu()], r"outs\[1\]: got .* on cpu, expected .* on cuda:0"),
        ([out], [lse.cpu()], r"lses\[0\]: got .* on cpu"),
    ):
        with pytest.raises(ArgumentError, match=said):
            attngen.merge_states(outs, lses)


def test_the_cascade_example_runs() -> None:
    """As a reader runs it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    command = [sys.executable, ROOT / "examples/cascade.py", "--device", "cuda"]
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert run.stdout.count("as near as rounding lets them") == 2

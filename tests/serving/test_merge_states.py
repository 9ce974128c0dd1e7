"""Merging partial results on the CPU: values, rows without keys, sinks, layouts, and parts of real attention."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings

import attngen
from attngen.errors import ArgumentError
from tests.effort import examples
from tests.serving.merge_cases import MergeCase, assert_near, merge_cases, merged_in_f64


@settings(max_examples=examples(1), deadline=None)
@given(merge_cases)
def test_merged_values_are_those_of_f64(case: MergeCase) -> None:
    """Any layout, type, strides and number of parts; rows without keys in some parts or all, NaN in these; sinks."""
    outs, lses, sink = case.parts_and_sink()
    found = attngen.merge_states(outs, lses, sink, return_lse=True, layout=case.call_layout)
    assert found[0].is_contiguous() and found[0].dtype == case.dtype and found[0].shape == outs[0].shape
    assert_near(found, merged_in_f64(outs, lses, sink, case.call_layout))


def drawn(parts: int, sink: torch.dtype | None = None, empties: int = 30, **changes: Any) -> MergeCase:
    sizes = (2, 5, 3, 16)
    return MergeCase(**{"layout": "bshd", "dtype": torch.bfloat16, "parts": parts, "sizes": sizes, "empties": empties,
                        "spread": 3.0, "sink": sink, "seed": 1, **changes})  # fmt: skip


def test_rows_without_keys_are_zeros_and_no_other_row_is() -> None:
    """Where all parts are empty, by -inf or +inf, whatever their outputs hold: out 0, lse -inf; else neither."""
    outs, lses, _ = drawn(3, empties=70).parts_and_sink()
    out, lse = attngen.merge_states(outs, lses, return_lse=True)
    empty = torch.stack(lses).isinf().all(0)
    assert 0 < empty.sum() < empty.numel()
    assert torch.equal(lse == -math.inf, empty) and lse[~empty].isfinite().all()
    assert torch.equal((out == 0).all(-1).transpose(1, 2), empty) and out.isfinite().all()


@pytest.mark.parametrize("parts", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_part_with_keys_is_the_result(dtype: torch.dtype, parts: int) -> None:
    """Its own numbers, whatever place it has among the parts, in groups too."""
    (out, *outs), (lse, *lses), _ = drawn(parts, empties=100, dtype=dtype).parts_and_sink()
    draw = torch.Generator().manual_seed(2)
    out = torch.randn(out.shape, generator=draw).to(dtype)
    lse = torch.randn(lse.shape, generator=draw) * 50
    for place in {0, parts // 2, parts - 1}:
        found = attngen.merge_states(
            [*outs[:place], out, *outs[place:]], [*lses[:place], lse, *lses[place:]], return_lse=True
        )
        assert torch.equal(found[0], out) and torch.equal(found[1], lse)


def test_merging_in_steps_is_merging_at_once() -> None:
    """Results are parts again: of (a, b) and c as of a, b and c, but for rounding; the sink comes last."""
    outs, lses, sink = drawn(3, torch.float32, dtype=torch.float32).parts_and_sink()
    once = attngen.merge_states(outs, lses, sink, return_lse=True)
    out, lse = attngen.merge_states(outs[:2], lses[:2], return_lse=True)
    steps = attngen.merge_states([out, outs[2]], [lse, lses[2]], sink, return_lse=True)
    for found, wanted in zip(steps, once, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_sink_joins_once() -> None:
    """One of -inf changes nothing, one of +inf leaves 0; where no part has keys lse is the sink."""
    outs, lses, _ = drawn(3, empties=70).parts_and_sink()
    plain = attngen.merge_states(outs, lses, return_lse=True)
    none = attngen.merge_states(outs, lses, torch.full((3,), -math.inf), return_lse=True)
    assert all(torch.equal(x, y) for x, y in zip(none, plain, strict=True))
    out, lse = attngen.merge_states(outs, lses, torch.full((3,), math.inf), return_lse=True)
    assert not out.any() and (lse == math.inf).all()
    sink = torch.tensor([1.5, -2.0, 700.0])
    out, lse = attngen.merge_states(outs, lses, sink, return_lse=True)
    empty = torch.stack(lses).isinf().all(0)
    assert torch.equal(lse[empty], sink.view(1, 3, 1).expand_as(lse)[empty]) and empty.any()
    assert not out.transpose(1, 2)[empty].any() and not out[:, :, 2].any() and out[:, :, 1].any()


def test_nan_stays_where_it_is() -> None:
    """A NaN in an lse, or in the output of a part with keys, reaches its row and no other."""
    outs, lses, _ = drawn(2, empties=0).parts_and_sink()
    outs[0][0, 1, 2, 3] = math.nan
    lses[1][1, 0, 4] = math.nan
    out, lse = attngen.merge_states(outs, lses, return_lse=True)
    assert lse.isnan().nonzero().tolist() == [[1, 0, 4]]
    of_rows = out.isnan().sum(-1)
    assert of_rows[0, 1, 2] == 1 and of_rows[1, 4, 0] == 16 and of_rows.sum() == 17


@pytest.mark.parametrize("sink", [None, torch.tensor([0.5, -1.0, 3.0, 1.0])], ids=["plain", "sink"])
@pytest.mark.parametrize("cut", [0, 7, 64, 100])
def test_parts_of_keys_merge_to_all_of_them(cut: int, sink: torch.Tensor | None) -> None:
    """Two calls over parts of the keys, one of which may be empty, and one call over all, with the sink in it."""
    draw = torch.Generator().manual_seed(4)
    q, k, v = (
        torch.randn(2, length, heads, 32, generator=draw) for length, heads in ((9, 4), (100, 2), (100, 2))
    )
    parts = [
        attngen.attention(q, k[:, rows], v[:, rows], return_lse=True)
        for rows in (slice(cut), slice(cut, None))
    ]
    found = attngen.merge_states(*map(list, zip(*parts, strict=True)), sink, return_lse=True)
    wanted = attngen.attention(q, k, v, return_lse=True, sink=sink)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=2e-6)


OUT, LSE = torch.zeros(2, 5, 3, 16), torch.zeros(2, 3, 5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((OUT, [LSE]), r"argument outs: got a Tensor, expected a list of tensors.*(?s:.*)hint: pass outs.unbind\(\)"),
        (([OUT], LSE), r"argument lses: got a Tensor.*(?s:.*)hint: pass lses.unbind\(\)"),
        ((None, None), "argument outs: got a NoneType, expected a list of tensors"),
        (([], []), "argument outs: got 0 tensors, expected one for each part"),
        (([OUT, OUT], [LSE]), "argument lses: got 1 tensors, expected 2, as many as outs"),
        (([OUT, 3], [LSE, LSE]), r"argument outs\[1\]: got int, expected a torch tensor"),
        (([OUT.double()], [LSE]), r"argument outs\[0\]: got dtype torch.float64, expected torch.float16 or"),
        (([OUT, OUT.half()], [LSE, LSE]), r"argument outs\[1\]: got torch.float16 of .*as outs\[0\] is"),
        (([OUT, OUT[:1]], [LSE, LSE]), r"argument outs\[1\]: got .*shape \(1, 5, 3, 16\) on cpu, expected .*\(2, 5"),
        (([OUT[0, 0]], [LSE]), r"argument outs\[0\]: got 2 dimensions, expected 4: \(batch"),
        (([OUT[..., :0]], [LSE]), r"argument outs\[0\]: got head_dim 0, expected a multiple of 1, at least 1"),
        (([OUT.transpose(2, 3)], [torch.zeros(2, 16, 5)]), r"outs\[0\]: got stride 16 in the last dimension"),
        (([OUT.to("meta")], [LSE]), r"argument outs\[0\]: got device meta, expected cpu or cuda"),
        (([OUT.to_sparse()], [LSE]), r"argument outs\[0\]: got layout torch.sparse_coo"),
        (([OUT.clone().requires_grad_()], [LSE]), r"outs\[0\]: got a tensor that requires grad.*(?s:.*)detach\(\)"),
        (([OUT], [LSE.clone().requires_grad_()]), r"lses\[0\]: got a tensor that requires grad"),
        (([OUT], [LSE.half()]), r"argument lses\[0\]: got torch.float16 of shape \(2, 3, 5\)"),
        (([OUT], [LSE.transpose(1, 2)]), r"lses\[0\]: got .* \(2, 5, 3\) on cpu, expected .*\(batch, heads, seqlen\)"),
        (([OUT[0]], [LSE]), r"argument lses\[0\]: .*expected .* \(3, 5\) = \(heads, tokens\)"),
        (([OUT], [LSE], torch.zeros(2)), r"argument sink: got .*shape \(2,\) on cpu, expected .*\(3,\) = \(heads,\)"),
        (([OUT], [LSE], torch.zeros(3, dtype=torch.int32)), "argument sink: got torch.int32 of shape"),
        (([OUT], [LSE], 0.5), "argument sink: got float, expected a torch tensor"),
        (([OUT], [LSE], None, False, "sbhd"), "argument layout: got 'sbhd', expected 'bshd' or 'bhsd'"),
    ],
    ids=lambda x: x[:50] if isinstance(x, str) else "",
)  # fmt: skip
def test_what_is_no_part_is_refused_by_name(arguments: tuple[Any, ...], said: str) -> None:
    """The argument, what it is, and what it must be."""
    with pytest.raises(ArgumentError, match=said):
        attngen.merge_states(*arguments)


def test_gradients_are_refused_only_where_somebody_asks() -> None:
    """Under no_grad a tensor that requires grad is one like others; torch.compile is told."""
    with torch.no_grad():
        assert not attngen.merge_states([OUT.clone().requires_grad_()], [LSE]).any()
    compiled = torch.compile(lambda: attngen.merge_states([OUT], [LSE]), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="argument merge_states: got a call, expected none inside"):
        compiled()

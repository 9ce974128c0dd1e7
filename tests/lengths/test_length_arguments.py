"""What a call says of its lengths: each fault is named, with the place and the cure, and nothing is touched."""

from typing import Any

import pytest
import torch

import attngen
from attngen.errors import ArgumentError, SpecError
from tests.lengths.batches import batch, compiled


def faults() -> list[tuple[str, str]]:
    """A change of the arguments of a good call, as the text of an expression on them, and what is said of it."""
    return [
        ("{'cu_seqlens_k': None}", "cu_seqlens_k: got nothing, expected a torch tensor: i32[batch + 1]"),
        ("{'cu_seqlens_q': cu.long()}", "dtype torch.int64, expected torch.int32"),
        (
            "{'cu_seqlens_k': cu[:2]}",
            "cu_seqlens_k: got 2 elements, expected 4, as cu_seqlens_q has 3 sequences",
        ),
        ("{'cu_seqlens_q': cu[::2], 'cu_seqlens_k': cu[::2]}", "stride 2, expected contiguous elements"),
        ("{'cu_seqlens_q': cu[None]}", "cu_seqlens_q: got 2 dimensions, expected 1"),
        (
            "{'cu_seqlens_q': cu[:0]}",
            "cu_seqlens_q: got 0 elements, expected 1 more than there are sequences",
        ),
        ("{'seqused_k': cu}", "seqused_k: got 4 elements, expected 3, as cu_seqlens_q has 3 sequences"),
        (
            "{'max_seqlen_q': -1}",
            "max_seqlen_q: got -1, expected the length of the longest sequence, or more",
        ),
        ("{'max_seqlen_k': 2.5}", "max_seqlen_k"),
        ("{'q': x[None]}", "argument q: got 4 dimensions, expected 3: (tokens, heads, head_dim)"),
        ("{'k': x[:, :1], 'v': x}", "argument v: got shape"),
        ("dict.fromkeys(('cu_seqlens_q', 'cu_seqlens_k'), cu.new_zeros(2**22 + 2))", "at most 4,194,304"),
        ("{'leftpad_q': cu}", "leftpad_q: got an argument"),
        ("{'cu_seqlens_q': cu.to('meta')}", "device meta, expected cpu"),
    ]


@pytest.mark.parametrize(("change", "expected"), faults())
def test_a_fault_in_what_says_lengths_is_named(change: str, expected: str) -> None:
    """Wrong types, devices, shapes and strides, batches that differ, bounds that are none."""
    cu, x = torch.tensor([0, 2, 3, 5], dtype=torch.int32), torch.randn(5, 2, 16).to(torch.bfloat16)
    passed: dict[str, Any] = {"q": x, "k": x, "v": x, "cu_seqlens_q": cu, "cu_seqlens_k": cu}
    kernel = compiled("fa2", "ragged", "ragged", "causal")
    assert kernel(**passed).isfinite().all()
    with pytest.raises(ArgumentError) as caught:
        kernel(**passed | eval(change))
    assert expected in str(caught.value)


def test_bounds_of_lengths_only_choose_kernels() -> None:
    """A bound that is given changes no bit, even one that is too low."""
    of, kernel = batch("ragged", "ragged", (5, 9), (20, 3)), compiled("fa2", "ragged", "ragged", "causal")
    expected = kernel(of.q, of.k, of.v, **of.lengths)
    for bound in (20, 4, 10**6):
        bounds = {"max_seqlen_q": bound, "max_seqlen_k": bound}
        assert torch.equal(kernel(of.q, of.k, of.v, **bounds, **of.lengths), expected)


@pytest.mark.parametrize(
    ("name", "numbers", "expected"),
    [
        ("cu_seqlens_q", [0, 3, 2, 5], r"cu_seqlens_q\[2\]: got 2, expected 3 to 5"),
        ("cu_seqlens_k", [0, 2, 3, 9], r"cu_seqlens_k\[3\]: got 9, expected 3 to 5"),
        ("cu_seqlens_k", [-1, 2, 3, 5], r"cu_seqlens_k\[0\]: got -1, expected 0 to 5"),
        ("seqused_k", [2, 1, 3], r"seqused_k\[2\]: got 3, expected 0 to 2, the length of sequence 2"),
        ("leftpad_k", [0, -1, 0], r"leftpad_k\[1\]: got -1, expected 0 to 1"),
        ("leftpad_k", [0, 0, 3], r"leftpad_k\[2\]: got 3, expected 0 to 2, the length of sequence 2"),
        ("max_seqlen_k", [1], "max_seqlen_k: got 1, expected 2 or more, the length of sequence 0"),
    ],
)
def test_verify_says_which_number_no_tensor_has(name: str, numbers: list[int], expected: str) -> None:
    """A call keeps lengths within the tensors and reads none on the host; `verify` does, and names the entry."""
    cu, x = torch.tensor([0, 2, 3, 5], dtype=torch.int32), torch.randn(5, 2, 16).to(torch.bfloat16)
    kernel, lengths = compiled("fa2", "ragged", "ragged", "causal"), {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    kernel.verify(x, x, x, **lengths)
    lengths[name] = numbers[0] if "max" in name else torch.tensor(numbers, dtype=torch.int32)  # type: ignore[assignment]
    assert kernel(x, x, x, **lengths).isfinite().all()
    with pytest.raises(ArgumentError, match=expected):
        kernel.verify(x, x, x, **lengths)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"problem": {"head_dim": 64, "keys": "raged"}}, "problem.keys = raged"),
        (
            {"tensors": {"t": "f32[batch, seqlen_k]"}, "score": "score + t[b, kv_idx]"},
            "must have no dimension seqlen_k",
        ),
        (
            {"problem": {"head_dim": 64}, "tensors": {"t": "f32[tokens_q]"}, "score": "score + t[q_idx]"},
            "must have no dimension tokens_q",
        ),
        (
            {
                "tensors": {"t": "f32[num_heads_q]"},
                "score": "score + t[h]",
                "gradients": ["q", "k", "v", "t"],
            },
            "must be q, k, v and sink at most",
        ),
        ({"scalars": {"cu_seqlens_q": "i32"}}, "an argument or a size of calls with ragged lengths"),
    ],
)
def test_a_spec_that_lengths_rule_out_is_refused(spec: dict[str, Any], expected: str) -> None:
    """Kinds that there are not, dimensions that the tensors have not, gradients that are sums over one length."""
    ragged = {"problem": {"head_dim": 64, "queries": "ragged", "keys": "ragged"}}
    with pytest.raises(SpecError) as caught:
        attngen.load(ragged | spec)
    assert expected in str(caught.value)

"""Learned sinks of sequences with lengths of their own: each is what a dense call of it alone is, bit for bit."""

import math

import pytest
import torch

import attngen
from attngen.kernel import Kernel
from tests.lengths.batches import DIM, HEADS, Batch, batch

SCHEDULES = ("serial", "fa2", "warp_specialized", "pingpong")
KINDS = ("ragged ragged", "padded padded", "dense ragged", "ragged dense")
SEQLENS_Q, SEQLENS_K = (5, 0, 13, 9, 1), (5, 7, 20, 0, 3)
SINK = torch.tensor([0.5, -2.0, 3.0, -math.inf])
assert len(SINK) == HEADS


def compiled(schedule: str, queries: str, keys: str, gradients: bool = False) -> Kernel:
    return attngen.compile(
        {
            "target": "simulator",
            "problem": {"head_dim": DIM, "queries": queries, "keys": keys},
            "mask": "kv_idx < q_pos",
            "sink": "per_head",
            "tile": {"block_m": 8, "block_n": 8},
            "schedule": {"kind": schedule},
            "gradients": ["q", "k", "v", "sink"] if gradients else [],
        }
    )


def drawn(kinds: str) -> Batch:
    queries, keys = kinds.split()
    rows = (9,) * 5 if queries == "dense" else SEQLENS_Q
    columns = (11,) * 5 if keys == "dense" else SEQLENS_K
    return batch(queries, keys, rows, columns, unused=0 if "dense" in kinds else 2, tail=3, poison=math.nan)


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_sequence_with_sinks_is_a_dense_call(schedule: str, kinds: str) -> None:
    """Rows that see no key are 0 with lse the sink: those of sequences without keys too, and rows of no sequence."""
    of = drawn(kinds)
    out, lse = compiled(schedule, *kinds.split())(of.q, of.k, of.v, return_lse=True, sink=SINK, **of.lengths)
    dense = compiled(schedule, "dense", "dense")
    by_row = lse.transpose(-1, -2).clone()
    for _, rows, keys in of.sequences():
        q, k, v = of.q[rows][None], of.k[keys][None], of.v[keys][None]
        expected, expected_lse = dense(q, k, v, return_lse=True, sink=SINK)
        assert torch.equal(out[rows], expected[0]) and torch.equal(by_row[rows], expected_lse[0].mT)
        out[rows] = math.nan
    unused = ~out.isnan().any(-1).any(-1)
    assert not out[unused].any() and torch.equal(by_row[unused], SINK.expand_as(by_row[unused]))


@pytest.mark.parametrize("kinds", KINDS)
def test_the_gradient_of_a_sink_is_the_sum_over_sequences(kinds: str) -> None:
    """Of dense calls of each alone, but for the order of a sum; other gradients are theirs to the bit."""
    of, kernel = drawn(kinds), compiled("fa2", *kinds.split(), gradients=True)
    out, lse = kernel(of.q, of.k, of.v, return_lse=True, sink=SINK, **of.lengths)
    make = torch.Generator().manual_seed(1)
    dout, dlse = (torch.randn(x.shape, generator=make).to(x.dtype) for x in (out, lse))
    made = kernel.backward(dout, of.q, of.k, of.v, out, lse, dlse, sink=SINK, **of.lengths)
    dense, total = compiled("fa2", "dense", "dense", gradients=True), torch.zeros(HEADS)
    for _, rows, keys in of.sequences():
        q, k, v = of.q[rows][None], of.k[keys][None], of.v[keys][None]
        of_rows = [x.transpose(-1, -2)[rows].mT[None].contiguous() for x in (lse, dlse)]
        alone = dense.backward(dout[rows][None], q, k, v, out[rows][None], *of_rows, sink=SINK)
        for x, y, at in zip(made[:3], alone[:3], (rows, keys, keys), strict=True):
            assert torch.equal(x[at], y[0])
        total += alone[3]
    assert total[:3].abs().min() > 0.1 and made[3][3] == 0
    torch.testing.assert_close(made[3], total, rtol=1e-5, atol=1e-5)


def test_layers_with_sinks_of_their_own_share_a_list_of_tiles() -> None:
    """A list is of lengths: whatever the sink, of the simulator and of what a launcher would remember."""
    of, kernel = drawn("ragged ragged"), compiled("fa2", "ragged", "ragged")
    work = kernel.work(of.q, of.k, of.v, sink=SINK, **of.lengths)
    for sink in (SINK + 1.0, SINK.bfloat16()):
        shared = kernel(of.q, of.k, of.v, work=work, sink=sink, **of.lengths)
        assert torch.equal(shared, kernel(of.q, of.k, of.v, sink=sink, **of.lengths))


def test_layers_with_sinks_of_their_own_share_tables() -> None:
    """So are tables of what a mask reads."""
    kernel = attngen.compile(
        {
            "target": "simulator",
            "problem": {"head_dim": DIM},
            "mask": "document(doc)",
            "tensors": {"doc": "i32[batch, seqlen_k]"},
            "sink": "per_head",
        }
    )
    q, k = torch.randn(1, 9, HEADS, DIM).bfloat16(), torch.randn(1, 9, HEADS, DIM).bfloat16()
    doc = torch.arange(9, dtype=torch.int32)[None] // 4
    tables = kernel.tables(q, k, k, doc=doc, sink=SINK)
    for sink in (SINK + 1.0, SINK.bfloat16()):
        shared = kernel(q, k, k, tables=tables, doc=doc, sink=sink)
        assert torch.equal(shared, kernel(q, k, k, doc=doc, sink=sink))

"""Tiles, storage and the parameters of a kernel: from a choice of numbers to places."""

from typing import Any

from attngen.dtypes import F32
from attngen.expr import KeyRange, extremes, name
from attngen.lower.choice import Choice
from attngen.lower.decision import Decision
from attngen.lower.features import Features
from attngen.lower.rounding import round_up
from attngen.plan import Buffer, Cursor, KeyBlocks, RegTile, RegVec, Rows, Tensor
from attngen.schedules import Places


def tile_places(q: Buffer, k: Buffer, v: Buffer, out: Buffer, decided: Decision) -> dict[str, Any]:
    """The fields of `TilePlaces`: registers and tensors have the sizes and formats of the buffers."""
    inputs, m, n = q.dtype, q.rows, k.rows
    head_dim_v = out.valid_cols
    return dict(
        pairs=decided.pairs,
        ahead=(),
        by_tanh=decided.by_tanh,
        bounded_scores=decided.bounded_scores,
        integer_maxima=decided.integer_maxima,
        q=q,
        k=k,
        v=v,
        out=out,
        acc_s=RegTile("acc_s", F32, m, n, n, "accumulator"),
        p=RegTile("p", inputs, m, n, n, "a_fragment"),
        acc_o=RegTile("acc_o", F32, m, out.cols, head_dim_v, "accumulator"),
        row_max=RegVec("row_max", m),
        reference=RegVec("reference", m, is_counted=False),
        exponent_scale=RegVec("exponent_scale", m, groups=1, is_counted=False),
        row_sum=RegVec("row_sum", m, partial=True),
        alpha=RegVec("alpha", m),
        total=RegVec("total", m),
        inv_sum=RegVec("inv_sum", m),
        row_lse=RegVec("row_lse", m),
        q_in=Tensor("q", inputs, q.valid_cols, "q", "q"),
        k_in=Tensor("k", inputs, k.valid_cols, "k", "kv"),
        v_in=Tensor("v", inputs, head_dim_v, "k", "kv", transposed=v.transposed),
        result=Tensor("out", out.dtype, head_dim_v, "q", "q"),
        lse=Rows("lse", optional=True),
        scales=decided.scales,
    )


def places(choice: Choice, features: Features, decided: Decision) -> Places:
    """Every place a schedule may name, at its offset in shared memory.

    `out` lies over q (and over k and v where it is larger): the schedules stage it after their last use of those.
    """
    inputs, output, arch = features.inputs, features.output, features.arch
    qk, v = features.head_dim_qk, features.head_dim_v
    qk_cols, v_cols = (round_up(dim, arch.mma.k) for dim in (qk, v))
    m, n, stages = choice.block_m, choice.block_n, choice.stages
    q_buffer = Buffer("q", inputs, m, qk_cols, qk)
    k_buffer = Buffer("k", inputs, n, qk_cols, qk, stages, q_buffer.size_bytes)
    v_buffer = Buffer("v", inputs, n, v_cols, v, stages, k_buffer.offset + k_buffer.size_bytes)
    out = Buffer("out", output, m, v_cols, v, overlays="q")
    return Places(
        **tile_places(q_buffer, k_buffer, v_buffer, out, decided),
        stages=stages,
        score_unroll=choice.score_unroll,
        load_at=Cursor("load_at", stages),
        read_at=Cursor("read_at", stages),
        o_acc=Tensor("o_acc", F32, v, "q", "q", workspace=True),
        saved_max=Rows("saved_max", workspace=True),
        saved_sum=Rows("saved_sum", workspace=True),
    )


def key_blocks(visible: KeyRange | None, last_is_masked: bool) -> KeyBlocks | None:
    """The bounds of a block of rows from those of one row: their extremes over q_idx.first .. q_idx.last."""
    if visible is None:
        return None
    first, last = name("q_idx.first"), name("q_idx.last")
    lower = [extremes(key, "q_idx", first, last) for key in visible.lower]
    upper = [extremes(key, "q_idx", first, last) for key in visible.upper]
    return KeyBlocks(
        first_any=tuple(lo for lo, _ in lower),
        first_all=tuple(hi for _, hi in lower),
        end_any=tuple(hi for _, hi in upper),
        end_all=tuple(lo for lo, _ in upper),
        last_is_masked=last_is_masked,
    )

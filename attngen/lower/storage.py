"""Tiles, storage and the parameters of a kernel: from a choice of numbers to places."""

from dataclasses import replace
from typing import Any

from attngen.dtypes import E4M3, F32, DType
from attngen.expr import Expr
from attngen.lower.cache_places import cache_scales
from attngen.lower.choice import Choice
from attngen.lower.decision import Decision
from attngen.lower.features import Features
from attngen.lower.rounding import round_up
from attngen.plan import (
    ROWS_OF_K,
    ROWS_OF_O,
    ROWS_OF_Q,
    ROWS_OF_V,
    SCORES,
    Buffer,
    Cursor,
    NamedBarriers,
    PartRows,
    RegTile,
    RegVec,
    Rows,
    Tensor,
)
from attngen.schedules import KeyLoop, KeyParts, OnlineSoftmax, Places, Scores, WarpShares


def tile_places(
    q: Buffer,
    k: Buffer,
    v: Buffer,
    acc_o: RegTile,
    output: DType,
    out: Buffer | None,
    decided: Decision,
    ahead: tuple[tuple[Expr, RegTile], ...] = (),
    packs: bool = False,
    over_keys: int = 1,
    parts: KeyParts | None = None,
) -> dict[str, Any]:
    """The fields of `TilePlaces`: registers and tensors have the sizes and formats of the buffers and of O.

    Where so many warps lie `over_keys`, each has all rows and its own keys: registers have the rows of all of them.
    """
    inputs, m, n = q.dtype, q.rows * over_keys, k.rows // over_keys
    head_dim_v = acc_o.valid_cols
    scores = Scores(
        RegTile("acc_s", F32, SCORES, m, n, n, "accumulator"),
        decided.pairs,
        ahead,
        decided.by_tanh,
        decided.scales,
    )
    softmax = OnlineSoftmax(
        scores,
        p=RegTile("p", inputs, SCORES, m, n, n, "a_fragment"),
        row_max=RegVec("row_max", "queries", m),
        reference=RegVec("reference", "queries", m, is_counted=False),
        exponent_scale=RegVec("exponent_scale", "queries", m, groups=1, is_counted=False),
        row_sum=RegVec("row_sum", "queries", m, partial=True),
        alpha=RegVec("alpha", "queries", m),
        total=RegVec("total", "queries", m),
        inv_sum=RegVec("inv_sum", "queries", m),
        row_lse=RegVec("row_lse", "queries", m),
        bounded_scores=decided.bounded_scores,
        integer_maxima=decided.integer_maxima,
        sink=RegVec("sink", "queries", m, is_counted=False) if decided.has_sink else None,
    )
    return dict(
        keys=KeyLoop(decided.pairs.visible),
        scores=scores,
        softmax=softmax,
        acc_o=acc_o,
        q=q,
        k=k,
        v=v,
        out=out,
        q_in=Tensor("q", inputs, q.axes, q.valid_cols, "q", is_packed=packs),
        k_in=Tensor("k", inputs, k.axes, k.valid_cols, "kv"),
        v_in=Tensor("v", inputs, v.axes, head_dim_v, "kv"),
        result=Tensor("out", output, acc_o.axes, head_dim_v, "q", is_packed=packs),
        lse=Rows("lse", "queries", optional=True, is_packed=packs),
        parts=parts,
    )


def is_staged(inputs: DType, output: DType) -> bool:
    """Whether O goes through shared memory: not in f32 where tiles are shorter, for it is twice as large as they."""
    return output is not F32 or inputs is F32


def places(choice: Choice, features: Features, decided: Decision) -> Places:
    """Every place a schedule may name, at its offset in shared memory.

    `out` lies over q (and over k and v where it is larger): the schedules stage it after their last use of those.
    """
    inputs, output, arch = features.inputs, features.output, features.arch
    qk, v = features.head_dim_qk, features.head_dim_v
    qk_cols, v_cols = (round_up(dim, arch.mma.k) for dim in (qk, v))
    m, n, stages = choice.block_m, choice.block_n, choice.stages
    over_keys = choice.warps if features.splits else 1
    q_buffer = Buffer("q", features.multiplied, ROWS_OF_Q, m, qk_cols, qk)
    stored = E4M3 if features.cache else inputs
    k_buffer = Buffer("k", stored, ROWS_OF_K, n, qk_cols, qk, stages, q_buffer.size_bytes)
    v_buffer = Buffer("v", stored, ROWS_OF_V, n, v_cols, v, stages, k_buffer.offset + k_buffer.size_bytes)
    acc_o = RegTile("acc_o", F32, ROWS_OF_O, m * over_keys, v_cols, v, "accumulator")
    stages_out = is_staged(inputs, output) and not features.splits
    out = Buffer("out", output, ROWS_OF_O, m, v_cols, v, overlays="q") if stages_out else None
    of_tile = tile_places(
        q_buffer,
        k_buffer,
        v_buffer,
        acc_o,
        output,
        out,
        decided,
        packs=features.packs_group,
        over_keys=over_keys,
        parts=key_parts(acc_o, decided) if features.splits else None,
    )
    if cache := cache_scales(features, decided, choice, v_buffer.offset + v_buffer.size_bytes):
        scores = replace(of_tile["scores"], cache=cache)
        of_tile |= {"scores": scores, "softmax": replace(of_tile["softmax"], scores=scores)}
        of_tile |= {"q_in": replace(of_tile["q_in"], dtype=inputs)}
        of_tile |= {name: replace(of_tile[name], dtype=stored) for name in ("k_in", "v_in")}
    return Places(
        **of_tile,
        stages=stages,
        score_unroll=choice.score_unroll,
        load_at=Cursor("load_at", stages),
        read_at=Cursor("read_at", stages),
        o_acc=Tensor("o_acc", F32, ROWS_OF_O, v, "q", workspace=True),
        saved_max=Rows("saved_max", "queries", workspace=True),
        saved_sum=Rows("saved_sum", "queries", workspace=True),
        shares=_warp_shares(acc_o, over_keys, features) if features.splits else None,
    )


NUMBERS_OF_SHARE = 4
"""Columns of f32 beside O in a warp's share: a row's maximum, what exponents refer to, and its sum; 16 bytes."""


def key_parts(acc_o: RegTile, decided: Decision, meet: NamedBarriers | None = None) -> KeyParts:
    """Where tiles leave what their part of the keys has come to, and where those meet that count it."""
    return KeyParts(
        out=PartRows("part_out", acc_o.valid_cols),
        row_sum=PartRows("part_sum"),
        row_max=None if decided.bounded_scores else PartRows("part_max"),
        reference=None if decided.bounded_scores else PartRows("part_reference"),
        meet=meet,
    )


def _warp_shares(acc_o: RegTile, warps: int, features: Features) -> WarpShares:
    """Where warps leave what their keys have come to, over all else that shared memory held."""
    step = 8 if features.fits_instructions else 1  # columns of a matrix instruction
    own_cols = round_up(-(-acc_o.cols // warps), step)
    share_cols = acc_o.cols + NUMBERS_OF_SHARE
    return WarpShares(
        left=Buffer("shares", F32, ROWS_OF_O, acc_o.rows, share_cols, acc_o.valid_cols, overlays="q"),
        joined=RegTile("joined", F32, ROWS_OF_O, acc_o.rows, own_cols, own_cols, "accumulator"),
    )

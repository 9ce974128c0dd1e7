"""Scales of 8-bit operands: which rows share one, and where a warpgroup keeps it."""

from math import gcd
from typing import Literal

from attngen.dtypes import F32
from attngen.lower.rounding import round_up
from attngen.plan import Buffer, Descales, Param, RegVec
from attngen.quantize import KEY_BLOCK, P_LIFT, Q_BLOCK, ScaleKind
from attngen.schedules import Scales


def scales(kind: ScaleKind, block_m: int, block_n: int, stages: int) -> Scales:
    """The scales of a kind, for tiles of some size. A tensor's scale is a head's that all heads share.

    Where the producer stages them is not decided here.
    """
    q, k, v = {
        "per_tensor": (None, None, None),
        "per_head": (None, None, None),
        "per_block": (Q_BLOCK, KEY_BLOCK, KEY_BLOCK),
        "per_token": (1, 1, KEY_BLOCK),
    }[kind]
    groups = block_n // gcd(block_n, KEY_BLOCK)  # of columns in which no other granule begins
    of_rows = RegVec("row_scale", "queries", block_m, groups=1)
    staged = block_n + round_up(groups, 4) if k == 1 else 2 * groups  # two keys' are read at once
    return Scales(
        q=Descales("q_descale", "queries", "kv" if q is None else "q", q),
        k=Descales("k_descale", "keys", "kv", k),
        v=Descales("v_descale", "keys", "kv", v),
        of_rows=of_rows,
        of_scores=RegVec("score_scale", "queries", block_m, groups=groups) if k == KEY_BLOCK else of_rows,
        top=RegVec("top_scale", "queries", block_m),
        weight=RegVec("value_weight", "queries", block_m, groups=groups) if v else None,
        staged=Buffer("scales", F32, ("keys",), 1, staged, staged, stages) if v else None,
        groups=groups,
        lift=P_LIFT,
    )


def scale_params(of: Scales) -> tuple[Param, ...]:
    """The fields of the parameter struct: addresses, and strides in elements."""
    return tuple(
        Param(field, ctype, f"{each.name}.{value}")
        for each in (of.q, of.k, of.v)
        for field, ctype, value in _fields(each)
    )


def _fields(of: Descales) -> tuple[tuple[str, Literal["pointer", "i64"], str], ...]:
    return (
        (of.name, "pointer", "ptr"),
        *((f"{of.name}_stride_{axis}", "i64", f"stride_{i}") for i, axis in enumerate(of.dimensions)),
    )

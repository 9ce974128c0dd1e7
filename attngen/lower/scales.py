"""Scales of 8-bit operands: which rows share one, and where a warpgroup keeps it."""

from typing import Literal

from attngen.plan import Descales, Param, RegVec
from attngen.schedules import Scales

ScaleKind = Literal["per_tensor", "per_head", "per_block", "per_token"]
QUERY_GRANULE, KEY_GRANULE = 64, 128
"""Rows of Q, and of K and V, that share a scale where blocks have their own, whatever the tile. Source: Shah et al.,
"FlashAttention-3", arXiv 2407.08608, section 3.3."""
LIFT = 8
"""P lies in 0 .. 2^8, for e4m3 ends at 448 and its smallest normal number is 2^-6."""


def scales(kind: ScaleKind, block_m: int) -> Scales:
    """The scales of a kind. A tensor's scale is a head's that all heads share."""
    q, k, v = {
        "per_tensor": (None, None, None),
        "per_head": (None, None, None),
        "per_block": (QUERY_GRANULE, KEY_GRANULE, KEY_GRANULE),
        "per_token": (1, 1, KEY_GRANULE),
    }[kind]
    of_rows = RegVec("row_scale", block_m)
    return Scales(
        kind=kind,
        q=Descales("q_descale", "q", "kv" if q is None else "q", q),
        k=Descales("k_descale", "k", "kv", k),
        v=Descales("v_descale", "k", "kv", v),
        of_rows=of_rows,
        of_scores=RegVec("score_scale", block_m) if k == KEY_GRANULE else of_rows,
        top=RegVec("top_scale", block_m),
        weight=RegVec("value_weight", block_m) if v else None,
        lift=LIFT,
    )


def scale_params(of: Scales) -> tuple[Param, ...]:
    """The fields of the parameter struct: addresses, and strides in elements."""
    return tuple(
        Param(field, ctype, f"tensor.{each.name}.{value}")
        for each in (of.q, of.k, of.v)
        for field, ctype, value in _fields(each)
    )


def _fields(of: Descales) -> tuple[tuple[str, Literal["pointer", "i64"], str], ...]:
    return (
        (of.name, "pointer", "ptr"),
        *((f"{of.name}_stride_{axis}", "i64", f"stride_{i}") for i, axis in enumerate(of.axes)),
    )

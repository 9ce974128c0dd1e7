"""A cache in e4m3: its descales, where they are kept, and the fields of the parameter struct."""

from attngen.dtypes import BF16, F32
from attngen.lower.choice import AnyChoice, owners
from attngen.lower.decision import Decision
from attngen.lower.features import Features
from attngen.lower.rounding import round_up
from attngen.plan import Buffer, CacheDescales, Cursor, Param, RegVec
from attngen.plan.places import CHUNK_BYTES
from attngen.schedules import CacheScales, StagedDescales


def cache_scales(features: Features, decided: Decision, choice: AnyChoice, offset: int) -> CacheScales | None:
    """The descales of a cache in e4m3, for a choice; None where there is no such cache.

    Args:
        features: of the spec.
        decided: what follows from both.
        choice: of numbers.
        offset: where shared memory is free.
    """
    if features.cache is None:
        return None
    warps = owners(choice) if features.splits else 1  # that share out keys, and have each all rows
    k, v = (CacheDescales(name, features.cache, features.lengths) for name in ("k_descale", "v_descale"))
    of_scores, of_values, raised = (
        RegVec(name, "queries", choice.block_m * warps, is_counted=False)
        for name in ("score_scale", "value_scale", "raised")
    )
    return CacheScales(
        k=k,
        v=v,
        fits_q=features.inputs is BF16,
        pending=max(0, choice.stages - 2),
        of_scores=of_scores,
        of_values=of_values,
        raised=raised,
        staged=_staged(choice, warps, offset) if k.is_by_key else None,
        shown=decided.pairs.shown,
    )


def _staged(choice: AnyChoice, warps: int, offset: int) -> StagedDescales:
    """Places for the descales of the keys of as many blocks as K and V have stages, behind these."""
    keys, stages = choice.block_n // warps, choice.stages
    offset = round_up(offset, CHUNK_BYTES)
    k = Buffer("k_scales", F32, ("keys",), warps, keys, keys, stages, offset)
    v = Buffer("v_scales", F32, ("keys",), warps, keys, keys, stages, offset + k.size_bytes)
    return StagedDescales(k, v, Cursor("read_at", stages), of_warps=warps > 1)


def cache_params(of: CacheScales) -> tuple[Param, ...]:
    """The fields of the parameter struct: addresses, and strides in elements."""
    return tuple(
        param
        for each in (of.k, of.v)
        for param in (
            Param(each.name, "pointer", f"{each.name}.ptr"),
            *(
                Param(f"{each.name}_stride_{axis}", "i64", f"{each.name}.stride_{axis}")
                for axis in range(len(each.shape))
            ),
        )
    )

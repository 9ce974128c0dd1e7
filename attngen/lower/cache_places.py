"""A cache in e4m3: its descales, where they are kept, and the fields of the parameter struct."""

from attngen.dtypes import BF16
from attngen.lower.choice import AnyChoice
from attngen.lower.features import Features
from attngen.plan import CacheDescales, Param, RegVec
from attngen.schedules import CacheScales


def cache_scales(features: Features, choice: AnyChoice) -> CacheScales | None:
    """The descales of a cache in e4m3, for a choice; None where there is no such cache."""
    if features.cache is None:
        return None
    k, v = (CacheDescales(name, features.cache, features.lengths) for name in ("k_descale", "v_descale"))
    rows = choice.block_m
    return CacheScales(
        k=k,
        v=v,
        of_scores=RegVec("score_scale", "queries", rows, is_counted=False),
        of_values=RegVec("value_scale", "queries", rows, is_counted=False),
        fits_q=features.inputs is BF16,
        pending=max(0, choice.stages - 2),
    )


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

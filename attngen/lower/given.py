"""Candidates: what the tables offer, with what the spec says in its place. Whether they are legal is not asked here."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from attngen.arch import Arch
from attngen.dtypes import dtype
from attngen.lower.pairs import adds_a_bias, can_seed, two_steps_by_tanh
from attngen.lower.tiles import (
    Choice,
    Demands,
    Row,
    WarpgroupChoice,
    choices,
    warpgroup_choices,
    warpgroup_table,
)
from attngen.lower.tiles_8bit import table_8bit
from attngen.quantize import ScaleKind
from attngen.scaling import needs_no_maximum
from attngen.schedules import WARPGROUP_SCHEDULES, Pairs
from attngen.schedules.pairs import loads_by_key
from attngen.spec import Spec

KNOBS = {
    "tile.block_m": "block_m",
    "tile.block_n": "block_n",
    "schedule.stages": "stages",
    "schedule.warps": "warps",
    "schedule.warpgroups": "warpgroups",
}
"""The numbers of a choice that a spec may say, by their paths in it."""
WARP_FIELDS = ("warps",)
WARPGROUP_FIELDS = ("warpgroups", "overlap", "persistent")


def candidates(
    spec: Spec, arch: Arch, schedule: str, instead: Mapping[str, int] = MappingProxyType({})
) -> tuple[Choice | WarpgroupChoice, ...]:
    """What the tables offer, best first, with what the spec says, or would say with other numbers `instead`."""
    head_dim = spec.problem.head_dim
    offers: tuple[Choice | WarpgroupChoice, ...]
    if schedule in WARPGROUP_SCHEDULES:
        offers = warpgroup_choices(table(spec)[-1].choice, arch)
    else:
        offers = choices(schedule, max(head_dim.qk, head_dim.v), demands(spec), arch)
    return tuple(_with_given(offer, spec, arch, instead) for offer in offers)


def table(spec: Spec) -> tuple[Row, ...]:
    """What measurement says is best for a spec's head dims and demands on sm_90a, the shortest sequences first."""
    dims = spec.problem.head_dim
    if (kind := scale_kind(spec)) is None:
        return warpgroup_table(dims.qk, dims.v, demands(spec, for_wgmma=True))
    return table_8bit(dims.qk, dims.v, demands(spec), kind, spec.precision.promote)


def scale_kind(spec: Spec) -> ScaleKind | None:
    """What shares a scale of e4m3 inputs; None for others."""
    if spec.precision.inputs != "e4m3":
        return None
    return "per_block" if spec.precision.scales == "auto" else spec.precision.scales


def given(spec: Spec, *fields: str) -> dict[str, Any]:
    """The fields of a choice that the spec says, of those asked for."""
    values = {**spec.tile.__dict__, **spec.schedule.__dict__}
    return {field: values[field] for field in fields if field in values and values[field] != "auto"}


def _with_given(
    offer: Choice | WarpgroupChoice, spec: Spec, arch: Arch, instead: Mapping[str, int]
) -> Choice | WarpgroupChoice:
    fields = WARPGROUP_FIELDS if isinstance(offer, WarpgroupChoice) else WARP_FIELDS
    values = given(spec, "block_m", "block_n", "stages", *fields) | dict(instead)
    if isinstance(offer, WarpgroupChoice):
        values = _with_rows_of_warpgroups(values, arch)
        if spec.schedule.order != "auto":
            values["longest_first"] = spec.schedule.order == "heads"
    else:
        values["longest_first"] = _longest_first(spec)
    return replace(offer, **values)


def _with_rows_of_warpgroups(values: dict[str, Any], arch: Arch) -> dict[str, Any]:
    """Of block_m and warpgroups one follows from the other where that alone is said."""
    if not arch.emits or arch.wgmma is None:
        return values
    if "block_m" in values and "warpgroups" not in values:
        return values | {"warpgroups": max(1, values["block_m"] // arch.wgmma.m)}
    if "warpgroups" in values and "block_m" not in values:
        return values | {"block_m": values["warpgroups"] * arch.wgmma.m}
    return values


def demands(spec: Spec, for_wgmma: bool = False) -> Demands:
    """What the spec's mask and score ask of a tile; `for_wgmma`: of one of 16-bit inputs for warpgroups."""
    whole, inputs = Pairs.of(spec.mask_expr, spec.score_expr), dtype(spec.precision.inputs)
    pairs = whole.seeded() if for_wgmma and can_seed(inputs, spec.problem.head_dim.qk) else whole
    visible = pairs.visible
    has_exponents = for_wgmma and needs_no_maximum(pairs.magnitude, inputs.max_finite)
    return Demands(
        bounded=visible is not None and bool(visible.upper),
        lower=visible is not None and bool(visible.lower),
        walks=visible is None,
        modified=pairs.modifies_scores,
        by_tanh=two_steps_by_tanh(pairs, spec.problem.head_dim.v, 2) is not None,
        mask_loads=visible is None and bool(loads_by_key(pairs.mask)),
        seeded=pairs.added is not None,
        capped=has_exponents and two_steps_by_tanh(pairs, spec.problem.head_dim.v, 3) is not None,
        score_loads=bool(loads_by_key(whole.score)),
        adds_a_bias=adds_a_bias(whole.score, spec.declarations),
    )


def _longest_first(spec: Spec) -> bool:
    """Whether the rows that see the most keys start first, unless the spec says.

    Then the last blocks to run are short: +6 to 10 % for fa2 on an H200 at 4k and more, head_dim 64 and 128, causal
    (benchmarks/results/tune_fa2.json). Without such a bound neighbours share K and V in L2 instead.
    """
    if spec.schedule.order != "auto":
        return spec.schedule.order == "heads"
    return demands(spec).bounded

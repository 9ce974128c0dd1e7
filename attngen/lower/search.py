"""Search: the rest of what a spec says, tried until a plan passes every rule.

What a table offers comes first, with what the spec says in its place. Where none of that is legal, the numbers that are
left open are tried by how near they are to the table's. A rule about a cost is kept by every smaller tile, ring and
part, so a few choices tell whether anything is legal at all: those of the least cost (tests/lower/test_search.py).
The schedule is not searched: another is never taken in silence.
"""

from dataclasses import replace
from itertools import product
from math import log2
from typing import Any

from attngen.lower.choice import AnyChoice, WarpgroupChoice, fields_of, owners
from attngen.lower.features import Features
from attngen.lower.table import PARTS, offers, slice_of
from attngen.plan.hardware_rules import MOST_WARPGROUPS

Share = tuple[int, int]
"""Rows of a tile, and how many warps or warpgroups share them."""
STEP_OF_THRIFT = 0.25
"""How far a flag that costs less is from the table's, where half or twice of a number is 1 away."""


def candidates(features: Features, schedule: str) -> tuple[AnyChoice, ...]:
    """What the table offers, best first, with what the spec says in its place."""
    return tuple(_with_said(offer, features) for offer in offers(features, schedule))


def cheapest(features: Features, schedule: str) -> tuple[AnyChoice, ...]:
    """Choices of the rest that cost the least: where none of them is legal, none is. Reported is the last of them."""
    best, said = candidates(features, schedule)[0], features.given
    thrifty = _by_thrift(best, features)[-1]
    step, stages = features.arch.k_step(features.inputs), said.get("stages", 1)
    shares = _shares(best, features)
    if isinstance(best, WarpgroupChoice):
        shares = shares[::-1]
    else:  # fewer rows cost less; with more warps each has fewer of them, and may hold fewer registers
        least = min(rows for rows, _ in shares)
        shares = [share for share in shares if share[0] == least]
    shares_keys = features.splits and not isinstance(
        best, WarpgroupChoice
    )  # each warp then has a step of its own
    widths = (said.get("block_n", step * count if shares_keys else step) for _, count in shares)
    return tuple(
        _with_numbers(thrifty, share, width, stages) for share, width in zip(shares, widths, strict=True)
    )


def nearest_first(features: Features, schedule: str) -> tuple[AnyChoice, ...]:
    """Choices of the rest, those first that differ least from what the table offers."""
    best, said = candidates(features, schedule)[0], features.given
    step = features.arch.k_step(features.inputs)
    widths = range(best.block_n // step * step, 0, -step) if features.fits_instructions else [best.block_n]
    rest = product(
        enumerate(_by_thrift(best, features)),
        _shares(best, features),
        [said["block_n"]] if "block_n" in said else widths,
        [said["stages"]] if "stages" in said else range(best.stages, 0, -1),
    )
    found = [(steps, _with_numbers(thrifty, *numbers)) for (steps, thrifty), *numbers in rest]
    found.sort(key=lambda each: _distance(best, each[1]) + each[0] * STEP_OF_THRIFT)
    return (*(choice for _, choice in found), *cheapest(features, schedule))


def _with_said(offer: AnyChoice, features: Features) -> AnyChoice:
    """An offer, with what is said; of block_m and warpgroups one follows from the other where that alone is said."""
    known = ("block_m", "block_n", "stages", "longest_first", *fields_of(offer))
    said, wgmma = features.given, features.arch.wgmma
    values = {field: value for field, value in said.items() if field in known}
    if isinstance(offer, WarpgroupChoice) and features.fits_instructions and wgmma:
        if "block_m" in said and "warpgroups" not in said:
            values["warpgroups"] = max(1, said["block_m"] // wgmma.m)
        if "warpgroups" in said and "block_m" not in said:
            values["block_m"] = said["warpgroups"] * wgmma.m
    return replace(offer, **values)


def _shares(best: AnyChoice, features: Features) -> list[Share]:
    """The rows of a tile and how many share them, as far as that is open; never none, though rules may refuse it."""
    of_warpgroups, arch, said = isinstance(best, WarpgroupChoice), features.arch, features.given
    most = MOST_WARPGROUPS if of_warpgroups else arch.threads_per_block // 32
    counts = [owners(best)] if fields_of(best)[0] in said else range(1, most + 1)
    if of_warpgroups and features.fits_instructions and arch.wgmma:  # each has the rows of one instruction
        if "block_m" in said or "warpgroups" in said:
            return [(best.block_m, owners(best))]
        return [(count * arch.wgmma.m, count) for count in counts]
    rows = arch.mma.m
    if features.splits:  # each warp has all of them
        sizes = [best.block_m] if "block_m" in said else range(rows, best.block_m + 1, rows)
        return [(size, count) for count in counts for size in sizes]
    if "block_m" in said:
        found = [(best.block_m, count) for count in counts if best.block_m % (rows * count) == 0]
        return found or [(best.block_m, counts[0])]
    most_rows = max(best.block_m, rows * counts[0])
    steps = [(rows * count, count) for count in counts]
    return [(size, count) for step, count in steps for size in range(step, most_rows + 1, step)]


def _by_thrift(best: AnyChoice, features: Features) -> list[AnyChoice]:
    """A choice with its flags, then with those that cost less and less and may cost speed."""
    if not isinstance(best, WarpgroupChoice):
        return [best]
    found = [best, replace(best, q_stages=1, out_over_q=True)]
    if best.part_cols:
        found.append(replace(found[-1], part_cols=slice_of(features.head_dim_v, max(PARTS.values()))))
    if "persistent" not in features.given:
        found.append(replace(found[-1], persistent=False))
    return list(dict.fromkeys(found))


def _with_numbers(choice: AnyChoice, share: Share, block_n: int, stages: int) -> AnyChoice:
    rows, count = share
    numbers: dict[str, Any] = {fields_of(choice)[0]: count, "block_n": block_n, "stages": stages}
    return replace(choice, block_m=rows, **numbers)


def _distance(best: AnyChoice, other: AnyChoice) -> float:
    """How far numbers are from the table's, in octaves."""
    return (
        abs(log2(other.block_m / best.block_m))
        + abs(log2(owners(other) / owners(best))) / 2
        + abs(log2(other.block_n / best.block_n))
        + abs(log2(other.stages / best.stages))
    )

"""The timeline of one SM: who uses the copy engine, the tensor core and the exponential unit, when, in cycles.

The simulator's own Steps run, without values. Before a Step its work is queued at the units it needs; roles ask for
units in the order of their times. `predict` makes of that how long a whole launch takes. The units are in `units.py`,
what Steps cost on them in `charges.py`, blocks in the slots of an SM in `multiprocessor.py`. What all of them leave
out: bank conflicts, instruction caches, power, other SMs.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from heapq import heapify, heapreplace
from typing import Any

from attngen.plan import KernelPlan, Step
from attngen.simulate.costs import Costs, costs_of
from attngen.simulate.multiprocessor import Multiprocessor
from attngen.simulate.roles import StepFunction
from attngen.simulate.tile_lists import call_sizes
from attngen.simulate.tile_source import Tile, tiles
from attngen.simulate.units import Interval, Unit
from attngen.simulate.visits import (
    Member,
    Sizes,
    all_blocks,
    block_bounds,
    visited_blocks,
)
from attngen.torch_state import torch_defaults

MOST_PAIRS = 256
"""Pairs of blocks in a tile up to which a whole head is simulated; a longer one is scaled from a shorter."""
SAMPLES = 3
"""Kinds of tiles that a prediction simulates; times of the others lie on lines between them."""


@dataclass(frozen=True)
class Timeline:
    """What happened on one SM.

    Attributes:
        name: of the plan.
        costs: the table it was worked out with.
        slots: blocks of threads that share the SM.
        tiles: that were worked on, by all of them.
        roles: their names, in the order of the plan.
        intervals: in no order; of one unit, or of one role without a unit, no two overlap.
        cycles: when the last of them ended.
    """

    name: str
    costs: Costs
    slots: int
    tiles: int
    roles: tuple[str, ...]
    intervals: tuple[Interval, ...]

    @cached_property
    def cycles(self) -> int:
        """When everything had ended."""
        return max((interval.end for interval in self.intervals), default=0)

    def busy(self, unit: Unit) -> int:
        """Cycles for which a unit was at work."""
        return sum(interval.end - interval.begin for interval in self.intervals if interval.unit == unit)

    def share(self, unit: Unit) -> float:
        """The part of the whole time for which a unit was at work."""
        return self.busy(unit) / max(1, self.cycles)


@dataclass(frozen=True)
class Prediction:
    """How long a launch would take.

    Attributes:
        tile_cycles: what one more tile costs an SM, of the longest kind.
        cycles: of the whole launch, from its first block to its last.
        seconds: the same by the table's clock.
    """

    tile_cycles: float
    cycles: float
    seconds: float


@torch_defaults()
def timeline(
    plan: KernelPlan,
    seqlen_q: int,
    seqlen_k: int,
    batch: int = 1,
    heads: int = 1,
    heads_kv: int | None = None,
    *,
    costs: Costs | None = None,
    slots: int | None = None,
    steps: Mapping[type[Step], StepFunction] | None = None,
    declared: Mapping[str, Any] | None = None,
    tokens: tuple[int, int] = (0, 0),
) -> Timeline:
    """The first tile of a launch on one SM, and where blocks are persistent the same once more.

    Args:
        plan: what runs.
        seqlen_q: of the call; like seqlen_k, batch, heads and heads_kv.
        seqlen_k: see seqlen_q.
        batch: see seqlen_q.
        heads: see seqlen_q.
        heads_kv: as many as heads where None.
        costs: the table to use; that of the plan's target where None.
        slots: blocks of threads that share the SM; as many as the plan asks for where None.
        steps: as of `simulate`.
        declared: as of `simulate`; blocks of keys that depend on what it does not hold are all visited. With lengths.
        tokens: of ragged queries and keys.

    Raises:
        ToolchainError: there is no table for the target.
        SimulationFault: a program broke a rule, or no role can go on.
    """
    sizes = call_sizes(plan, seqlen_q, seqlen_k, batch, heads, heads_kv, declared, tokens)
    first = next(tiles(plan, sizes, 1), None)
    rounds = 2 if plan.scheduler.persistent else 1
    costs, slots = costs or costs_of(plan.arch), slots or plan.blocks_per_sm
    work = [] if first is None else [first] * rounds * slots
    return _on_one_sm(plan, sizes, work, costs, slots, steps)


def _on_one_sm(
    plan: KernelPlan,
    sizes: Sizes,
    work: list[Tile],
    costs: Costs,
    slots: int,
    steps: Mapping[type[Step], StepFunction] | None = None,
) -> Timeline:
    sm = Multiprocessor(plan, sizes, costs, slots, steps)
    sm.run(work)
    return Timeline(plan.name, costs, slots, len(work), sm.units.role_names, sm.units.intervals)


@torch_defaults()
def predict(
    plan: KernelPlan,
    seqlen_q: int,
    seqlen_k: int,
    batch: int = 1,
    heads: int = 1,
    heads_kv: int | None = None,
    *,
    costs: Costs | None = None,
    slots: int | None = None,
    declared: Mapping[str, Any] | None = None,
    tokens: tuple[int, int] = (0, 0),
) -> Prediction:
    """How long a whole launch takes; arguments as of `timeline`.

    What one more tile costs is the time of two rounds less that of one, for up to `SAMPLES` kinds of tiles by their
    pairs of blocks. Tiles go in the launch's order to whoever is free first.
    """
    sizes = call_sizes(plan, seqlen_q, seqlen_k, batch, heads, heads_kv, declared, tokens)
    costs, slots = costs or costs_of(plan.arch), slots or plan.blocks_per_sm
    pairs_of = _pairs_of(plan, sizes)
    launch = [(tile, pairs_of(tile)) for tile in tiles(plan, sizes, max(1, batch * heads))]
    kinds = {pairs: tile for tile, pairs in launch}
    if not kinds:
        return Prediction(0, 0, 0)
    known = sorted(kinds)
    sampled = sorted({known[i * (len(known) - 1) // (SAMPLES - 1)] for i in range(SAMPLES)})
    timed = [_tile_cycles(plan, sizes, kinds[pairs], costs, slots) for pairs in sampled]
    one_more = {pairs: _between(pairs, sampled, [more for more, _ in timed]) for pairs in known}
    ends = [0.0] * (costs.num_sms * slots)
    heapify(ends)
    for tile, pairs in launch:
        for _ in tile.members:
            heapreplace(ends, ends[0] + one_more[pairs] * slots)
    cycles = max(ends) + timed[-1][1]
    return Prediction(one_more[known[-1]], cycles, cycles / costs.clock_hz)


def _tile_cycles(plan: KernelPlan, sizes: Sizes, tile: Tile, costs: Costs, slots: int) -> tuple[float, float]:
    """What one more such tile costs, and how much longer the first takes."""
    scale = 1.0
    if plan.scheduler.kind == "heads":  # a shorter one, so that it does not take minutes
        pairs_of = _pairs_of(plan, sizes)
        pairs = pairs_of(tile)
        while pairs_of(tile) > MOST_PAIRS:
            lengths = {"seqlen_q": max(1, tile.seqlen_q // 2), "seqlen_k": max(1, tile.seqlen_k // 2)}
            tile = replace(tile, members=(tile.members[0]._replace(**lengths),))
        scale = pairs / max(1, pairs_of(tile))
    one = replace(tile, members=tile.members[:1])
    once, twice = (
        _on_one_sm(plan, sizes, [one] * slots * rounds, costs, slots).cycles * scale for rounds in (1, 2)
    )
    return (twice - once) / slots, max(0.0, 2 * once - twice)


def _pairs_of(plan: KernelPlan, sizes: Sizes) -> Callable[[Tile], int]:
    """Counts the pairs of a block of queries and a block of keys that a tile is made of."""

    @cache
    def visited(head: Member) -> list[tuple[int, ...]]:
        return visited_blocks(plan, sizes, all_blocks(plan, sizes, head), head)

    def of_keys(block: int, head: Member) -> int:
        if plan.key_blocks is None:
            return sum(block in keys for keys in visited(head))
        (seen,) = block_bounds(plan, sizes, [block], head)
        return seen.n_max - seen.n_min

    def pairs_of(tile: Tile) -> int:
        if tile.n_block is not None:
            heads = (tile.of_group(place).members[0] for place in range(sizes.group))
            return sum(of_keys(tile.n_block, head) for head in heads)
        return tile.visits if tile.m_block is not None else sum(map(len, visited(tile.members[0])))

    return pairs_of


def _between(x: int, xs: list[int], ys: list[float]) -> float:
    """Where the lines through the points have x, which lies among the xs."""
    i = bisect_left(xs, x)
    if xs[i] == x:
        return ys[i]
    share = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
    return ys[i - 1] + share * (ys[i] - ys[i - 1])

"""Which blocks of keys a block of rows visits: the plan's expressions of tiles and blocks, evaluated for a call.

A tile's lengths and where its rows begin are read from its `Member`; `Sizes` are for whoever decodes it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import compress
from typing import Any, NamedTuple, Self, TypeVar

import torch

from attngen.expr import (
    LARGEST_LENGTH,
    Expr,
    evaluate,
    fill_tables,
    find_boundaries,
    free_names,
    tensor_names,
)
from attngen.plan import (
    KEYS,
    PART_NAMES,
    QUERIES,
    RUNTIME_SIZES,
    Definitions,
    KernelPlan,
    Scheduler,
    SequenceAxis,
    entry_field,
)

_Found = TypeVar("_Found")

SIMULATED_SMS = 2
"""Multiprocessors of the simulated GPU: enough for blocks to draw tiles from one another."""


@dataclass(frozen=True)
class Declared:
    """What a call passes for the scalars and tensors of the spec, and the tables and boundaries made of the tensors."""

    scalars: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """The sizes of one call, its scale, whether it adds to gradients, and what it declares.

    Heads of Q are a multiple of heads of K and V.
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads_q: int
    num_heads_kv: int
    num_sms: int = SIMULATED_SMS
    tokens_q: int = 0
    tokens_k: int = 0
    pages: int = 0
    page_size: int = 0
    max_pages: int = 0
    table_rows: int = 0
    declared: Declared = Declared()
    softmax_scale: float = 1.0
    accumulates: bool = False

    @classmethod
    def of(cls, sizes: Mapping[str, int], declared: Declared) -> Self:
        """The sizes of a call that has been bound."""
        known: dict[str, Any] = {
            name: sizes[name] for name in RUNTIME_SIZES if name != "group" and name in sizes
        }
        return cls(**known, declared=declared)

    def with_tensors(self, more: Mapping[str, torch.Tensor]) -> Self:
        """The sizes of a call in which more tensors are found: tables, and lists of tiles."""
        return replace(self, declared=Declared(self.declared.scalars, {**self.declared.tensors, **more}))

    @property
    def has_no_output(self) -> bool:
        """Whether there are no rows of queries."""
        return (self.batch * self.seqlen_q + self.tokens_q) * self.num_heads_q == 0

    @property
    def group(self) -> int:
        """Query heads that share a head of K and V."""
        return self.num_heads_q // max(1, self.num_heads_kv)

    @property
    def values(self) -> dict[str, int]:
        """What a formula of the plan may name."""
        return {name: getattr(self, name) for name in RUNTIME_SIZES}


def declared_values(plan: KernelPlan, sizes: Sizes, passed: Mapping[str, Any]) -> Declared:
    """What a call passes by name, with the defaults of scalars, and the tables and boundaries that the plan reads.

    Tensors that are not passed are unknown: nothing is read of them, and what depends on them is not classed.
    """
    scalars = {scalar.name: scalar.default for scalar in plan.declarations.scalars.values()}
    scalars |= {name: value for name, value in passed.items() if name in scalars}
    tensors = {name: passed[name] for name in plan.declarations.tensors if name in passed}
    are_known = len(tensors) == len(plan.declarations.tensors) and sizes.seqlen_q and sizes.seqlen_k
    if plan.tables and are_known:
        tensors |= fill_tables(plan.tables, sizes.values, scalars, tensors, plan.block_m, plan.block_n)
    if plan.boundaries and are_known:
        tensors |= find_boundaries(plan.boundaries, sizes.values, scalars, tensors)
    return Declared(scalars, tensors)


class Member(NamedTuple):
    """One head of one sequence: its lengths, and where it starts among the rows and keys of the tensors.

    Where keys are cut into parts, those of blocks n_begin .. n_end - 1, which are the part-th of so many.
    """

    batch: int
    head: int
    head_kv: int
    seqlen_q: int
    seqlen_k: int
    q_start: int = 0
    k_start: int = 0
    n_begin: int = 0
    n_end: int = LARGEST_LENGTH
    part: int = 0
    parts: int = 1

    @property
    def rows(self) -> tuple[int, ...]:
        """Lengths, starts and the part of the keys, in which the heads of one simulated block agree."""
        return tuple(self[3:])


DECODED = ("b", "h", "h_kv", "seqlen_q", "seqlen_k", "q_idx.start", "kv_idx.start", *PART_NAMES)
"""The fields of a `Member`, as a tile's decoding has them; those of parts where keys are cut."""


class BlockBounds(NamedTuple):
    """Which blocks of keys a block of rows visits.

    n_min .. n_max - 1 are visited, of which n_full_begin .. n_full_end - 1 need no mask.
    """

    n_min: int
    n_full_begin: int
    n_full_end: int
    n_max: int


class Visited(NamedTuple):
    """A block of keys, or of queries, that a walk comes to, and whether some pair of it is hidden."""

    n: int
    is_partial: bool


def ceil_div(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def evaluated(
    definitions: Definitions, names: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None
) -> dict[str, Any]:
    """The names, and those that are defined by them and by one another."""
    found = dict(names)
    for each, value in definitions.items():
        found[each] = evaluate(value, found, tensors)
    return found


Blocks = int | tuple[int, int] | None
"""The block of rows or of keys that a tile works on, one of each, or None for all of a head's."""


def decoded(plan: KernelPlan, sizes: Sizes) -> tuple[tuple[Blocks, Member], ...]:
    """The block or blocks and the head that each tile works on, by its number."""
    call = tuple((f"call.{size}", value) for size, value in sizes.values.items())
    listed: tuple[tuple[int, ...], ...] = ()
    if plan.scheduler.is_listed:
        entries = sizes.declared.tensors[plan.tile_list]
        listed = tuple(map(tuple, entries[1 : 1 + int(entries[0, 0])].tolist()))
    return _decoded(plan.scheduler, (*call, *_block_sizes(plan).items()), listed)


@lru_cache(maxsize=8)
def _decoded(
    scheduler: Scheduler, sizes: tuple[tuple[str, int], ...], listed: tuple[tuple[int, ...], ...]
) -> tuple[tuple[Blocks, Member], ...]:
    names = {**dict(sizes), "tiles.count": len(listed)}
    count = int(evaluate(scheduler.count, names))
    if not count:
        return ()
    columns = zip(*listed, strict=True)
    tensors = {
        entry_field(field): torch.tensor(of, dtype=torch.int64)
        for field, of in zip(scheduler.entry_fields, columns, strict=False)
    }
    tile = evaluated(scheduler.decoding, names | {"tile.index": torch.arange(count)}, tensors)
    found = [_listed(tile[axis.tile.name], count) for axis in (QUERIES, KEYS) if axis.tile.name in tile]
    blocks: Iterable[Blocks] = (
        zip(*found, strict=True) if len(found) > 1 else found[0] if found else [None] * count
    )
    said = DECODED if scheduler.is_split else DECODED[: -len(PART_NAMES)]
    return tuple(zip(blocks, map(Member, *(_listed(tile[field], count) for field in said)), strict=True))


def first_head(plan: KernelPlan, sizes: Sizes) -> Member:
    """The head that the first tile of a launch works on."""
    return decoded(plan, sizes)[0][1]


def block_bounds(
    plan: KernelPlan, sizes: Sizes, m_blocks: Sequence[int], member: Member
) -> list[BlockBounds]:
    """The blocks of keys that each block of rows visits, and those that it need not mask, in closed form.

    Where the call does not say what a bound depends on, it bounds nothing, and no block is free of a mask.
    """
    assert plan.key_blocks is not None
    numbers = m_blocks[0] if len(m_blocks) == 1 else torch.tensor(m_blocks, dtype=torch.int64)
    rows = plan.queries if plan.key_blocks.axis is KEYS else KEYS
    names = _names(plan, sizes, member, rows, numbers)
    seen = plan.key_blocks.where_known(lambda bound: _is_known(bound, names, sizes))
    found = evaluated(seen.definitions, names, sizes.declared.tensors)
    ends = (found[f"seen.{end.removeprefix('n_')}"] for end in BlockBounds._fields)
    return list(map(BlockBounds, *(_listed(end, len(m_blocks)) for end in ends)))


def walk_of(plan: KernelPlan, sizes: Sizes, m_block: int, member: Member) -> tuple[Visited, ...]:
    """The blocks of keys that a block of rows visits, from right to left, each classed by itself.

    Where the call does not say what the classes depend on, all blocks are visited and none is full.
    """
    numbers = torch.arange(ceil_div(member.seqlen_k, plan.block_n))
    names = _names(plan, sizes, member, plan.queries, m_block) | _names(plan, sizes, member, KEYS, numbers)
    visited = reversed(_visited(plan, sizes, names, numbers, member))
    return tuple(each for each in visited if member.n_begin <= each.n < member.n_end)


def walk_of_keys(plan: KernelPlan, sizes: Sizes, n_block: int, member: Member) -> tuple[Visited, ...]:
    """The blocks of queries that see a block of keys, in their order, each classed by itself; else as `walk_of`."""
    numbers = torch.arange(ceil_div(member.seqlen_q, plan.block_m))
    names = _names(plan, sizes, member, QUERIES, numbers) | _names(plan, sizes, member, KEYS, n_block)
    queries_exist = evaluate(QUERIES.whole_span[QUERIES.last.name], names) < member.seqlen_q
    return _visited(plan, sizes, names, numbers, member, queries_exist)


def _visited(
    plan: KernelPlan,
    sizes: Sizes,
    names: Mapping[str, Any],
    numbers: torch.Tensor,
    member: Member,
    exist: torch.Tensor | bool = True,
) -> tuple[Visited, ...]:
    """Those of the numbered blocks that are visited; full are some whose keys are there, and that `exist`."""
    may, must = _classes(plan, sizes, names, len(numbers))
    full = must & exist & (evaluate(KEYS.whole_span[KEYS.last.name], names) < member.seqlen_k)
    return tuple(Visited(n, not full[n].item()) for n in numbers[may].tolist())


def _classes(
    plan: KernelPlan, sizes: Sizes, names: Mapping[str, Any], count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each of so many pairs of blocks may show a pair, and whether it must show all."""
    assert plan.tile_classes is not None

    def hold(condition: Expr, otherwise: bool) -> torch.Tensor:
        known = _is_known(condition, names, sizes)
        found = evaluate(condition, names, sizes.declared.tensors) if known else otherwise
        return torch.as_tensor(found).expand(count)

    return hold(plan.tile_classes.may, True), hold(plan.tile_classes.must, False)


def visiting_blocks(plan: KernelPlan, sizes: Sizes, n_block: int, member: Member) -> tuple[int, ...]:
    """The numbers of the blocks of rows that visit a block of keys, in a plan whose tiles are such."""
    if plan.key_blocks is not None:
        (seen,) = block_bounds(plan, sizes, [n_block], member)
        return tuple(range(seen.n_min, seen.n_max))
    return tuple(block.n for block in walk_of_keys(plan, sizes, n_block, member))


def visited_blocks(
    plan: KernelPlan, sizes: Sizes, m_blocks: Sequence[int], member: Member
) -> list[tuple[int, ...]]:
    """The numbers of the blocks of keys that each block of rows visits."""
    if plan.key_blocks is None:
        return [tuple(block.n for block in walk_of(plan, sizes, m, member)) for m in m_blocks]
    return [tuple(range(each.n_min, each.n_max)) for each in block_bounds(plan, sizes, m_blocks, member)]


def rank_of(rank: Expr, plan: KernelPlan, sizes: Sizes, m_block: int, n_block: int, member: Member) -> int:
    """The rank of a block of keys of a head among those that see a block of rows."""
    names = _names(plan, sizes, member, QUERIES, m_block) | {KEYS.tile.name: n_block}
    return int(evaluate(rank, names, sizes.declared.tensors))


def rows_of(plan: KernelPlan, sizes: Sizes, member: Member) -> int:
    """How many rows the tiles of a head's sequence have, those of its group where they are packed."""
    return member.seqlen_q * heads_in_rows(plan, sizes)


def heads_in_rows(plan: KernelPlan, sizes: Sizes) -> int:
    """How many heads have their rows in one tile."""
    return sizes.group if plan.scheduler.packs_group else 1


def all_blocks(plan: KernelPlan, sizes: Sizes, member: Member) -> range:
    """The numbers of a head's blocks of rows."""
    return range(ceil_div(rows_of(plan, sizes, member), plan.block_m))


def what_tells_apart(plan: KernelPlan) -> Callable[[Member], tuple[int, ...]]:
    """Of a head that in which others must agree to visit the same blocks of keys."""
    asked = asks_for(plan)
    return lambda member: (*member.rows, *compress(member, asked))


def heads_alike(plan: KernelPlan, sizes: Sizes) -> tuple[tuple[Member, ...], ...]:
    """All heads of a call; those together that the mask does not tell apart, which visit the same blocks of keys."""
    telling = what_tells_apart(plan)
    alike: dict[tuple[int, ...], list[Member]] = {}
    for member in dict.fromkeys(member for _, member in decoded(plan, sizes)):
        alike.setdefault(telling(member), []).append(member)
    return tuple(map(tuple, alike.values()))


class Visits:
    """Which blocks of rows and of keys visit each other in a launch, found once for heads that are alike."""

    def __init__(self, plan: KernelPlan, sizes: Sizes) -> None:
        self._of_launch = plan, sizes
        self._tells_apart = what_tells_apart(plan)
        self._found: dict[tuple[Any, ...], Any] = {}

    def keys_of(self, m_block: int, member: Member) -> tuple[int, ...]:
        """The blocks of keys that a block of rows visits."""
        return self._once(
            "keys", m_block, member, lambda: visited_blocks(*self._of_launch, [m_block], member)[0]
        )

    def rows_of(self, n_block: int, member: Member) -> tuple[int, ...]:
        """The blocks of rows that visit a block of keys."""
        return self._once("rows", n_block, member, lambda: visiting_blocks(*self._of_launch, n_block, member))

    def walk_of_keys(self, n_block: int, member: Member) -> tuple[Visited, ...]:
        """As the function of this name."""
        return self._once("walk", n_block, member, lambda: walk_of_keys(*self._of_launch, n_block, member))

    def bounds_of(self, block: int, member: Member) -> BlockBounds:
        """As `block_bounds` of one block."""
        return self._once("bounds", block, member, lambda: block_bounds(*self._of_launch, [block], member)[0])

    def _once(self, what: str, block: int, member: Member, find: Callable[[], _Found]) -> _Found:
        about = (what, block, self._tells_apart(member))
        if about not in self._found:
            self._found[about] = find()
        found: _Found = self._found[about]
        return found


def asks_for(plan: KernelPlan) -> tuple[bool, ...]:
    """Whether the blocks of keys that a row visits depend on the first fields of a `Member`: batch, head, head_kv."""
    keys, classes = plan.key_blocks, plan.tile_classes
    conditions = keys.bounds if keys else (classes.may, classes.must) if classes else ()
    return tuple(any(name in free_names(each) for each in conditions) for name in DECODED[:3])


def _is_known(expr: Expr, names: Mapping[str, Any], sizes: Sizes) -> bool:
    """Whether the call says all that an expression reads."""
    read = {name.removesuffix(".any").removesuffix(".all") for name in tensor_names(expr)}
    has_tensors = read <= sizes.declared.tensors.keys()
    return has_tensors and None not in (names[name] for name in free_names(expr))


def _names(
    plan: KernelPlan, sizes: Sizes, member: Member, axis: SequenceAxis, block: int | torch.Tensor
) -> dict[str, Any]:
    """What a condition on a block of rows or keys of a head may name, its number among them."""
    head = dict(zip(DECODED, member, strict=True))
    names = {**head, **_block_sizes(plan), **sizes.declared.scalars, axis.tile.name: block}
    names["call.group"] = sizes.group
    return evaluated(axis.span, names)


def _block_sizes(plan: KernelPlan) -> dict[str, int]:
    return {QUERIES.block: plan.block_m, KEYS.block: plan.block_n}


def _listed(value: int | torch.Tensor, count: int) -> list[int]:
    """A number for each of so many tiles or blocks, of which it may be one for all."""
    return [value] * count if isinstance(value, int) else list(value.expand(count).tolist())

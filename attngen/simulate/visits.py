"""Which blocks of keys a block of rows visits: by bounds in closed form, or classed one by one as a walk does."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, NamedTuple, Self

import torch

from attngen.expr import Expr, evaluate, fill_tables, free_names, tensor_names
from attngen.plan import KernelPlan

SIMULATED_SMS = 2
"""Multiprocessors of the simulated GPU: enough for blocks to draw tiles from one another."""


@dataclass(frozen=True)
class Declared:
    """What a call passes for the scalars and tensors of the spec, and the tables of extremes made of the tensors."""

    scalars: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """The sizes of one call, and what it declares. Heads of Q are a multiple of heads of K and V."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads_q: int
    num_heads_kv: int
    num_sms: int = SIMULATED_SMS
    declared: Declared = Declared()

    @classmethod
    def of(cls, sizes: Mapping[str, int], declared: Declared) -> Self:
        """The sizes of a call that has been bound."""
        names = ("batch", "seqlen_q", "seqlen_k", "num_heads_q", "num_heads_kv", "num_sms")
        batch, seqlen_q, seqlen_k, num_heads_q, num_heads_kv, num_sms = (sizes[name] for name in names)
        return cls(batch, seqlen_q, seqlen_k, num_heads_q, num_heads_kv, num_sms, declared)

    @property
    def has_no_output(self) -> bool:
        """Whether there are no rows of queries."""
        return self.batch * self.seqlen_q * self.num_heads_q == 0

    @property
    def group(self) -> int:
        """Query heads that share a head of K and V."""
        return self.num_heads_q // max(1, self.num_heads_kv)

    @property
    def values(self) -> dict[str, int]:
        """What a formula of the plan may name."""
        names = ("batch", "seqlen_q", "seqlen_k", "num_heads_q", "num_heads_kv", "num_sms", "group")
        return {name: getattr(self, name) for name in names}


def declared_values(plan: KernelPlan, sizes: Sizes, passed: Mapping[str, Any]) -> Declared:
    """What a call passes by name, with the defaults of scalars and the tables that the plan's table kernel fills.

    Tensors that are not passed are unknown: nothing is read of them, and what depends on them is not classed.
    """
    scalars = {scalar.name: scalar.default for scalar in plan.declarations.scalars.values()}
    scalars |= {name: value for name, value in passed.items() if name in scalars}
    tensors = {name: passed[name] for name in plan.declarations.tensors if name in passed}
    are_known = len(tensors) == len(plan.declarations.tensors) and sizes.seqlen_q and sizes.seqlen_k
    if plan.tables and are_known:
        tensors |= fill_tables(plan.tables, sizes.values, scalars, tensors, plan.block_m, plan.block_n)
    return Declared(scalars, tensors)


class Member(NamedTuple):
    """One head of one element of the batch."""

    batch: int
    head: int
    head_kv: int


ANY_HEAD = Member(0, 0, 0)
"""For masks that do not ask for the head."""


class BlockBounds(NamedTuple):
    """Which blocks of keys a block of rows visits.

    n_min .. n_max - 1 are visited, of which n_full_begin .. n_full_end - 1 need no mask.
    """

    n_min: int
    n_full_begin: int
    n_full_end: int
    n_max: int


class Visited(NamedTuple):
    """A block of keys that a walk comes to, and whether some pair of it is hidden."""

    n: int
    is_partial: bool


def ceil_div(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def clamp(x: int, low: int, high: int) -> int:
    """The number between low and high that is nearest to x."""
    return max(low, min(x, high))


def block_bounds(plan: KernelPlan, sizes: Sizes, m_block: int, member: Member = ANY_HEAD) -> BlockBounds:
    """The blocks of keys that block `m_block` of rows visits, and those that it need not mask, in closed form.

    Where the call does not say what a bound depends on, it bounds nothing, and no block is free of a mask.
    """
    block_n, keys = plan.block_n, plan.key_blocks
    assert keys is not None
    names = _names_of_tile(plan, sizes, m_block, member)

    def values(bounds: tuple[Expr, ...], unknown: int) -> tuple[int, ...]:
        return tuple(
            int(evaluate(bound, names, sizes.declared.tensors)) if _is_known(bound, names, sizes) else unknown
            for bound in bounds
        )

    n_max = ceil_div(max(0, min((sizes.seqlen_k, *values(keys.end_any, sizes.seqlen_k)))), block_n)
    n_min = min(max((0, *values(keys.first_any, 0))) // block_n, n_max)
    n_last = max(n_max - 1, n_min) if keys.last_is_masked else n_max
    n_full_begin = clamp(ceil_div(max((0, *values(keys.first_all, sizes.seqlen_k))), block_n), n_min, n_last)
    end_full = max(0, min((sizes.seqlen_k, *values(keys.end_all, 0)))) // block_n
    return BlockBounds(n_min, n_full_begin, clamp(end_full, n_full_begin, n_last), n_max)


def walk_of(plan: KernelPlan, sizes: Sizes, m_block: int, member: Member = ANY_HEAD) -> tuple[Visited, ...]:
    """The blocks of keys that block `m_block` of rows visits, from right to left, each classed by itself.

    Where the call does not say what the classes depend on, all blocks are visited and none is full.
    """
    classes = plan.tile_classes
    assert classes is not None
    numbers = torch.arange(ceil_div(sizes.seqlen_k, plan.block_n))
    first = numbers * plan.block_n
    names = _names_of_tile(plan, sizes, m_block, member) | {
        "kv_idx.tile": numbers,
        "kv_idx.first": first,
        "kv_idx.last": (first + plan.block_n).clamp(max=sizes.seqlen_k) - 1,
    }
    tensors = sizes.declared.tensors

    def hold(condition: Expr, otherwise: bool) -> torch.Tensor:
        known = _is_known(condition, names, sizes)
        found = evaluate(condition, names, tensors) if known else otherwise
        return torch.as_tensor(found).expand(len(numbers))

    may = hold(classes.may, True)
    full = hold(classes.must, False) & (first + plan.block_n <= sizes.seqlen_k)
    return tuple(Visited(n, not full[n].item()) for n in reversed(numbers[may].tolist()))


def visited_blocks(
    plan: KernelPlan, sizes: Sizes, m_block: int, member: Member = ANY_HEAD
) -> tuple[int, ...]:
    """The numbers of the blocks of keys that block `m_block` of rows visits."""
    if plan.key_blocks is None:
        return tuple(block.n for block in walk_of(plan, sizes, m_block, member))
    bounds = block_bounds(plan, sizes, m_block, member)
    return tuple(range(bounds.n_min, bounds.n_max))


def heads_differ(plan: KernelPlan) -> bool:
    """Whether the blocks of keys that a row visits depend on its head or its place in the batch."""
    return bool(_names_of_heads(plan))


def heads_alike(plan: KernelPlan, sizes: Sizes) -> tuple[tuple[Member, ...], ...]:
    """All heads of a call; those together that the mask does not tell apart, which visit the same blocks of keys."""
    named = [name in _names_of_heads(plan) for name in ("b", "h", "h_kv")]  # in the order of a Member
    alike: dict[tuple[int, ...], list[Member]] = {}
    for b in range(sizes.batch):
        for h in range(sizes.num_heads_q):
            member = Member(b, h, h // sizes.group)
            alike.setdefault(tuple(compress(member, named)), []).append(member)
    return tuple(map(tuple, alike.values()))


def _names_of_heads(plan: KernelPlan) -> frozenset[str]:
    """By which names the blocks of keys that a row visits ask for its head and its place in the batch."""
    keys, classes = plan.key_blocks, plan.tile_classes
    if keys is not None:
        conditions = (*keys.first_any, *keys.first_all, *keys.end_any, *keys.end_all)
    else:
        assert classes is not None
        conditions = (classes.may, classes.must)
    return frozenset[str]().union(*map(free_names, conditions)) & {"b", "h", "h_kv"}


def _is_known(expr: Expr, names: Mapping[str, Any], sizes: Sizes) -> bool:
    """Whether the call says all that an expression reads."""
    has_tensors = tensor_names(expr) <= sizes.declared.tensors.keys()
    return has_tensors and None not in (names[name] for name in free_names(expr))


def _names_of_tile(plan: KernelPlan, sizes: Sizes, m_block: int, member: Member) -> dict[str, Any]:
    """What a condition on a block of rows may name."""
    return {
        "q_idx.tile": m_block,
        "q_idx.first": m_block * plan.block_m,
        "q_idx.last": min((m_block + 1) * plan.block_m, sizes.seqlen_q) - 1,
        "seqlen_q": sizes.seqlen_q,
        "seqlen_k": sizes.seqlen_k,
        "b": member.batch,
        "h": member.head,
        "h_kv": member.head_kv,
        **sizes.declared.scalars,
    }

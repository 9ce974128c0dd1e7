"""What the sums of a gradient were made of: every visit, a pair of blocks that a pass comes to, must count once.

A copy leaves in its cells which block of which head it took. A product that contracts queries or keys adds that block
to its accumulator, so that a stage read a round too late, or for another head, counts as what it holds. A skipped or
doubled visit then is a fault where the sum is staged, be it too small for any tolerance to tell.
"""

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from attngen.plan import LENGTHS, RegTile, Tensor, View
from attngen.plan.steps import Product
from attngen.simulate.tile_source import Tile

if TYPE_CHECKING:
    from attngen.simulate.roles import RoleRun
    from attngen.simulate.shared_memory import Cell


class Source(NamedTuple):
    """A block of queries or of keys, and the head that it is of; in a tile of several heads that of the first."""

    head: int
    block: int

    @staticmethod
    def of(tensor: Tensor, tile: Tile, block: int) -> "Source":
        """What a copy of a block takes."""
        member = tile.members[0]
        return Source(member.head_kv if tensor.heads == "kv" else member.head, block)


def add_contribution(step: Product, role: "RoleRun") -> None:
    """Note what a product adds to a gradient."""
    if role.call.plan.direction != "backward" or step.contracted not in LENGTHS:
        return
    if step.starts_at_zero:
        role.contributions[step.acc.name] = Counter()
    cells = [cell for view in (step.a, step.b) if isinstance(view, View) for cell in role.cells(view)]
    if isinstance(step.a, View):
        role.made_for[step.acc.name] = set().union(*(cell.queries or {None} for cell in role.cells(step.a)))
    role.contributions[step.acc.name][next((cell.source for cell in cells if cell.source), None)] += 1


def check_contributions(gradient: RegTile, role: "RoleRun") -> None:
    """See that a gradient about to be staged is the sum over all visits of its tile.

    Raises:
        SimulationFault: a visit does not count once.
    """
    if role.call.plan.direction != "backward" or gradient.name not in role.contributions:
        return
    found, expected = role.contributions[gradient.name], _visits(role)
    for source in found.keys() | expected:
        wanted = int(source in expected)
        if found[source] != wanted:
            what = f"block {source.block} of head {source.head}" if source else "what no copy brought"
            message = f"{what} counts {found[source]} times in {gradient}, and should {wanted} times"
            raise role.fault("not once", message, gradient.name)


def check_product(cell: "Cell", queries: Source, keys: Source, role: "RoleRun") -> None:
    """See that what is about to be added to the sums of a block of queries is the product for it and the tile's keys.

    Raises:
        SimulationFault: it is for other queries, or of other keys, or not once.
    """
    if cell.queries != {queries} or cell.made_of != {keys: 1}:
        of = ", ".join(f"block {source.block}" for source in cell.queries if source) or "nothing"
        made = ", ".join(f"{n} times block {source.block}" for source, n in cell.made_of.items() if source)
        wanted = f"queries of block {queries.block}, keys of block {keys.block}"
        message = f"{cell.name} is for queries of {of}, of keys {made}, and is added for {wanted}"
        raise role.fault("not once", message, cell.name)


def _visits(role: "RoleRun") -> set[Source | None]:
    """The blocks that the gradient of the present tile is a sum over."""
    visits, tile = role.call.visits, role.tile
    if tile.n_block is None:
        assert tile.m_block is not None
        first = tile.members[0]
        return {Source(first.head_kv, n) for n in visits.keys_of(tile.m_block, first)}
    group = (tile.of_group(place).members[0] for place in range(role.call.sizes.group))
    return {Source(each.head, m) for each in group for m in visits.rows_of(tile.n_block, each)}

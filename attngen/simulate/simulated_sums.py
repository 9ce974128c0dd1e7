"""What the Steps do by which a block of keys adds to sums of queries.

In which order the elements of a tile stand is for the registers of a lane, which are not simulated. Who adds first
matters to nothing but rounding: where sums have no ranks the simulator's own order, a block of threads after another,
stands for any. Where they have, who adds must be at its rank.
"""

import torch

from attngen.plan.steps import (
    AddSums,
    ClearTile,
    PassRank,
    StageSums,
    StageTransposed,
    TakeRank,
    WaitAdded,
)
from attngen.simulate.contributions import Source, check_product
from attngen.simulate.device_memory import Addition
from attngen.simulate.roles import RoleRun, Run, Wait
from attngen.simulate.simulated_gemms import own_part
from attngen.simulate.visits import rank_of


def clear_tile(step: ClearTile, role: RoleRun) -> None:
    """Zeros, for no queries."""
    buffer, heads = step.dst.buffer, len(role.tile.members)
    by_columns = buffer.shared_by == "columns"
    rows = range(buffer.rows) if by_columns else role.own_rows(buffer.rows)
    cols = role.own_rows(buffer.cols) if by_columns else range(buffer.cols)
    role.write_shared(step.dst, lambda: torch.zeros(heads, len(rows), len(cols), dtype=torch.float32))
    for cell in role.cells(step.dst):
        cell.queries, cell.valid_rows = set(), 0


def stage_transposed(step: StageTransposed, role: RoleRun) -> None:
    """Rows of keys become columns; who reads them is told which queries they are for."""
    rows = role.read(step.src)
    role.write_shared(step.dst, lambda: rows.transpose(1, 2))
    block, (_, seqlen_q) = role.index(step.rows), role.tile.sequence("queries")
    for cell in role.cells(step.dst):
        cell.queries = {Source(role.tile.members[0].head, block)}
        cell.valid_rows = max(0, min(step.dst.buffer.rows, seqlen_q - block * step.dst.buffer.rows))


def stage_sums(step: StageSums, role: RoleRun) -> None:
    """A warpgroup's part of a product, with what it is made of."""
    role.write_shared(step.dst, lambda: role.read(step.src))
    for cell in role.cells(step.dst):
        cell.queries = role.made_for[step.src.name]
        cell.made_of = role.contributions[step.src.name].copy()


def add_sums(step: AddSums, role: RoleRun) -> None:
    """Add a warpgroup's part of a product to the rows that it is for, and to no others."""
    (cell,), tile, m = role.cells(step.src), role.tile, role.index(step.block)
    first = tile.members[0]
    check_product(cell, Source(first.head, m), Source(first.head_kv, tile.n_block or 0), role)
    if step.dst.ranks:
        role.start_adding(step.dst.ranks, m)
    values = role.read_by_store(step.src)
    rows, cols = own_part(step.of, role)
    role.device.add(step.dst, tile, (m * step.dst.block_m + rows.start, cols.start), values)
    for member in tile.members:
        role.device.added[Addition(member.batch, member.head, m, tile.n_block or 0, role.warpgroup)] += 1


def take_rank(step: TakeRank, role: RoleRun) -> Run:
    """Wait until as many blocks have added as come before this one; without values no other block is waited for.

    Sequences whose lengths lie may share counts, and then there are more.
    """
    ranks, m = step.ranks, role.index(step.block)
    sizes, n = role.call.sizes, role.tile.n_block or 0
    expected = torch.tensor(
        [rank_of(step.rank, role.call.plan, sizes, m, n, member) for member in role.tile.members],
        dtype=torch.int64,
    )

    def added() -> torch.Tensor:
        return role.device.ranks(ranks, role.tile, m, role.warpgroup)

    def has_come() -> bool:
        return not role.device.holds_values or bool((added() >= expected).all())

    if not has_come():
        what = f"{ranks}[{m}] of warpgroup {role.warpgroup} to be {expected[0]}"
        yield Wait(lambda: f"{what}, it is {added()[0]}", has_come)
    role.rank = (ranks.name, m)


def wait_added(step: WaitAdded, role: RoleRun) -> None:
    """What has been added stands there."""
    role.sums_in_flight = False


def pass_rank(step: PassRank, role: RoleRun) -> None:
    """Count this block among those that have added."""
    m = role.index(step.block)
    role.pass_rank(step.ranks, m)
    if role.device.holds_values:
        role.device.count_up(step.ranks, role.tile, m, role.warpgroup)

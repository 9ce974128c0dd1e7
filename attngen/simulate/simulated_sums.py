"""What the Steps do by which a block of keys adds to sums of queries.

In which order the elements of a tile stand is for the registers of a lane, which are not simulated. Who adds first
matters to nothing but rounding, so that the simulator's own order, a block of threads after another, stands for any.
"""

import torch

from attngen.plan.steps import AddSums, ClearTile, StageSums, StageTransposed
from attngen.simulate.contributions import Source, check_product
from attngen.simulate.device_memory import Addition
from attngen.simulate.roles import RoleRun
from attngen.simulate.simulated_gemms import own_part


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
    values = role.read_by_store(step.src)
    rows, cols = own_part(step.of, role)
    role.device.add(step.dst, tile, (m * step.dst.block_m + rows.start, cols.start), values)
    for member in tile.members:
        role.device.added[Addition(member.batch, member.head, m, tile.n_block or 0, role.warpgroup)] += 1

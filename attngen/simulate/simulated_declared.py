"""What the Steps of gradients of what a spec declares do."""

import torch

from attngen.plan import PrivateTable
from attngen.plan.steps import (
    AddPairs,
    AddToElements,
    AddToTable,
    ClearTable,
    ForSummed,
    GradientOfPairs,
    StorePairs,
    StoreTable,
    SumPairs,
)
from attngen.simulate.roles import RoleRun, Run
from attngen.simulate.simulated_gradients import TilePairs


def for_summed(step: ForSummed, role: RoleRun) -> Run:
    """Run the body for every batch and head that the elements of the tile are sums over."""
    tile, sizes, scheduler = role.tile, role.call.sizes, role.call.plan.scheduler
    heads = {"own": 1, "group": sizes.group, "all": sizes.num_heads_q}[scheduler.sums_heads]
    for batch in range(sizes.batch if scheduler.sums_batch else 1):
        for place in range(heads):
            role.tile = tile.of_summed(batch, place, sizes.group)
            yield from role.run(step.body)
    role.tile = tile


def add_pairs(step: AddPairs, role: RoleRun) -> None:
    """Add the gradients of pairs to an accumulator."""
    role.write(step.acc, torch.add, role.read(step.acc), _gradients_of_pairs(step, role))


def sum_pairs(step: SumPairs, role: RoleRun) -> None:
    """Add the gradients of pairs up by rows."""
    found = _gradients_of_pairs(step, role)
    role.write(step.part, lambda part: part + found.sum(-1), role.read(step.part, partial=True))


def store_pairs(step: StorePairs, role: RoleRun) -> None:
    """Write an accumulator to a tensor with an element for each pair."""
    rows, keys = (
        range(block * extent, (block + 1) * extent)
        for block, extent in ((role.index(step.rows), step.src.rows), (role.index(step.block), step.src.cols))
    )
    role.device.write_pairs(step.dst, role.tile, rows, keys, role.read(step.src))


def clear_table(step: ClearTable, role: RoleRun) -> None:
    """Fill a table; the simulator keeps only the sum of those of all threads."""
    table, members = step.dst, len(role.tile.members)
    role.registers[table.name] = torch.zeros(members, table.entries, dtype=torch.float32)
    role.block.rows_written[table.name, 0] = role.now


def add_to_table(step: AddToTable, role: RoleRun) -> None:
    """Add the gradients of pairs to the entries that they read."""
    found = _gradients_of_pairs(step, role)
    role.block.rows_written[step.table.name, 0] = role.now
    if role.device.holds_values:
        entries = TilePairs(step.s, step.rows, step.block, role).value(step.entry)
        at = entries.to(torch.int64).expand_as(found).flatten(1)
        total = _table(step.table, role)
        role.registers[step.table.name] = total.scatter_add(1, at, found.flatten(1))


def store_table(step: StoreTable, role: RoleRun) -> None:
    """Write what all threads have added up, after they have met."""
    name, values = step.src.name, _table(step.src, role)
    if not role.clock.knows(role.block.rows_written[name, 0]):
        raise role.fault("race", f"{name} is added up, and threads wrote it since they last met", name)
    role.device.write_table(step.dst, role.tile, role.index(step.rows), values)


def add_to_elements(step: AddToElements, role: RoleRun) -> None:
    """Add the gradients of pairs to the elements that they read."""
    found = _gradients_of_pairs(step, role)
    if role.device.holds_values:
        pairs, target = TilePairs(step.s, step.rows, step.block, role), role.device.tensors[step.dst.name]
        at = tuple(
            pairs.value(index).to(torch.int64).clamp(0, size - 1).expand_as(found)
            for index, size in zip(step.read.args, target.shape, strict=True)
        )
        target.index_put_(at, found, accumulate=True)


def _gradients_of_pairs(step: GradientOfPairs, role: RoleRun) -> torch.Tensor:
    """What a step's `s` (`dp` - `delta`) is for each pair."""
    s, dp = role.read(step.s), role.read(step.dp)
    delta = TilePairs(step.s, step.rows, step.rows, role).of_queries(step.delta)
    return s * (dp - delta) if role.device.holds_values else s


def _table(table: PrivateTable, role: RoleRun) -> torch.Tensor:
    """What all threads have in their tables, added up: (members, entries)."""
    if table.name not in role.registers:
        raise role.fault("uninitialised read", f"{table} was never cleared", table.name)
    return role.registers[table.name]

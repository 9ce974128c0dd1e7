"""What the Steps of control and synchronisation do."""

from attngen.plan import BlockIndex
from attngen.plan.steps import Advance, ForBlocks, ForTiles, Note, ReadTile, SyncThreads, When, WhenBlock
from attngen.simulate.roles import RoleRun, Run, Wait


def for_tiles(step: ForTiles, role: RoleRun) -> Run:
    """Run the body for every tile of the block."""
    for tile in role.block.tiles:
        role.start_tile(tile)
        yield from role.run(step.body)


def for_blocks(step: ForBlocks, role: RoleRun) -> Run:
    """Run the body for every block of the range, in its order."""
    blocks = range(role.index(step.range.lo), role.index(step.range.hi))
    if step.index in role.variables:
        raise role.fault("undefined index", f"{step.index} is already the index of an outer loop", step.index)
    role.loops.append(step.index)
    for block in reversed(blocks) if step.range.descending else blocks:
        role.variables[step.index] = block
        yield from role.run(step.body)
    role.loops.pop()
    role.variables.pop(step.index, None)


def when(step: When, role: RoleRun) -> Run:
    """Run the body where the condition holds, as it does for all threads of the block or for none."""
    if _holds(step, role):
        yield from role.run(step.body)


def _holds(step: When, role: RoleRun) -> bool:
    if step.condition == "scale is negative":
        return role.call.scale_is_negative
    if step.condition == "tile has blocks":
        if role.tile.bounds is None:
            raise role.fault("undefined index", "a tile of a whole head has no blocks of keys of its own")
        return role.tile.bounds.n_max > role.tile.bounds.n_min
    bounds = role.bounds(role.index(BlockIndex("m")))
    return bounds.n_min <= role.index(BlockIndex("n")) < bounds.n_max


def when_block(step: WhenBlock, role: RoleRun) -> Run:
    """Run the body where the block exists."""
    if role.index(step.block) >= role.index(step.first):
        yield from role.run(step.body)


def sync_threads(step: SyncThreads, role: RoleRun) -> Run | None:
    """Meet all warps of the block; what they wrote before is visible after."""
    barrier = role.block.barrier
    epoch = barrier.epoch
    barrier.arrive()
    return None if barrier.epoch > epoch else _wait_at(role, epoch)


def _wait_at(role: RoleRun, epoch: int) -> Run:
    barrier = role.block.barrier
    what = f"all roles at SyncThreads, {barrier.arrived} of {barrier.parties} there"
    yield Wait(what, lambda: barrier.epoch > epoch)


def advance(step: Advance, role: RoleRun) -> None:
    """Move the cursor on, round its ring."""
    role.cursors[step.cursor] = (role.cursors.get(step.cursor, 0) + 1) % step.cursor.stages


def read_tile(step: ReadTile, role: RoleRun) -> None:
    """Nothing: the simulated tile is always at hand."""


def note(step: Note, role: RoleRun) -> None:
    """Nothing."""

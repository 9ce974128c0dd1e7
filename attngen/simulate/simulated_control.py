"""What the Steps of control and of the scheduler do."""

from collections import deque

from attngen.plan import BlockIndex, Walk
from attngen.plan.steps import (
    DrawTile,
    ForBlocks,
    ForTiles,
    ForVisited,
    Note,
    ReadTile,
    StartWalk,
    TakeTile,
    When,
    WhenAtEnd,
    WhenBlock,
    WhenNext,
    WhenPartial,
    WhenVisited,
)
from attngen.simulate.roles import RoleRun, Run


def for_tiles(step: ForTiles, role: RoleRun) -> Run:
    """Run the body for every tile of the block."""
    tiles = role.block.tiles
    while (tile := tiles.tile(role.tile_number)) is not None:
        role.start_tile(tile)
        yield from role.run(step.body)
        if not tiles.is_drawn_from:
            return


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
    """Run the body where the condition holds, as it does for all threads of the role or for none."""
    if _holds(step, role):
        yield from role.run(step.body)


def _holds(step: When, role: RoleRun) -> bool:
    if step.condition == "scale is negative":
        return bool(role.call.scale["scale_is_negative"])
    if step.condition == "first warp":
        return role.warpgroup == 0
    if step.condition == "last warpgroup":
        return role.warpgroup == role.warpgroups - 1
    if step.condition == "all parts are there":
        return role.block.is_last_part
    if step.condition in ("tile is whole", "tile is a part"):
        return (role.tile.members[0].parts == 1) == (step.condition == "tile is whole")
    if step.condition == "tile has blocks":
        if role.tile.bounds is None:
            raise role.fault("undefined index", "a tile of a whole head has no blocks of keys of its own")
        return role.tile.visits > 0
    m, n = role.tile.m_block, role.tile.n_block
    if m is None or n is None:  # else it is a tile of pairs
        m, n = role.index(BlockIndex("m")), role.index(BlockIndex("n"))
    return role.visits(m, n)


def start_walk(step: StartWalk, role: RoleRun) -> None:
    """Stand before the first block."""
    if role.tile.walk is None:
        raise role.fault("undefined index", "the blocks of this tile are no walk", step.walk.name)
    role.walks[step.walk.name] = deque(role.tile.walk)
    role.variables[step.walk.n.base] = -1


def _goes_on(walk: Walk, role: RoleRun) -> bool:
    """Go to the next block, if there is one."""
    if walk.name not in role.walks:
        raise role.fault("undefined index", f"{walk} has not been started", walk.name)
    if not role.walks[walk.name]:
        return False
    block = role.walks[walk.name].popleft()
    role.variables[f"{walk}.before"] = role.variables[walk.n.base]
    role.variables[walk.n.base] = block.n
    role.is_partial[walk.name] = block.is_partial
    return True


def when_next(step: WhenNext, role: RoleRun) -> Run:
    """Go on, and run the body if there was a next block."""
    if _goes_on(step.walk, role):
        yield from role.run(step.body)


def for_visited(step: ForVisited, role: RoleRun) -> Run:
    """Run the body for every block that is left."""
    while _goes_on(step.walk, role):
        yield from role.run(step.body)


def when_visited(step: WhenVisited, role: RoleRun) -> Run:
    """Run the body where the walk has come to a block."""
    if role.index(step.walk.n) >= 0:
        yield from role.run(step.body)


def when_partial(step: WhenPartial, role: RoleRun) -> Run:
    """Run the body where the block is not full."""
    if role.is_partial[step.walk.name]:
        yield from role.run(step.body)


def when_block(step: WhenBlock, role: RoleRun) -> Run:
    """Run the body where the block exists."""
    if role.index(step.block) >= role.index(step.first):
        yield from role.run(step.body)


def when_at_end(step: WhenAtEnd, role: RoleRun) -> Run:
    """Run the body where not all of the block is the sequence's."""
    size = role.call.plan.block_m if step.axis == "queries" else role.call.plan.block_n
    if (role.index(step.block) + 1) * size > role.tile.sequence(step.axis)[1]:
        yield from role.run(step.body)


def draw_tile(step: DrawTile, role: RoleRun) -> None:
    """Draw the next tile's number, write it to the slot and arrive at the ring's `full`."""
    role.tile_number = role.block.tiles.draw()
    barriers = role.stage_barriers(step.cursor)
    role.publish_tile(takers=barriers.empty.parties)
    barriers.full.arrive(role.clock)


def take_tile(step: TakeTile, role: RoleRun) -> None:
    """Read the number of the next tile."""
    role.take_tile()


def read_tile(step: ReadTile, role: RoleRun) -> None:
    """Nothing: the simulated tile is always at hand."""


def note(step: Note, role: RoleRun) -> None:
    """Nothing."""

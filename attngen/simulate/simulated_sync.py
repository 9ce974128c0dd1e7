"""What the Steps of synchronisation do: who meets whom, who waits for what, who then knows what."""

from attngen.plan import NamedBarriers
from attngen.plan.steps import (
    Advance,
    FenceAsync,
    PassTurn,
    Publish,
    Release,
    SyncThreads,
    SyncWarpgroup,
    SyncWarpgroups,
    TakeTurn,
    WaitEmpty,
    WaitFull,
)
from attngen.simulate.barriers import Mbarrier, NamedBarrier
from attngen.simulate.roles import RoleRun, Run, Wait


def sync_threads(step: SyncThreads, role: RoleRun) -> Run:
    """Meet all threads of the block; what they wrote before is visible after."""
    barrier = role.block.barrier
    phase = barrier.completed
    role.meet()
    barrier.arrive(role.clock)
    if barrier.completed == phase:
        yield Wait(
            lambda: f"all roles at SyncThreads, {barrier.arrived} of {barrier.parties} there",
            lambda: barrier.completed > phase,
        )
    role.clock.join(barrier.clock)


def sync_warpgroup(step: SyncWarpgroup, role: RoleRun) -> None:
    """Meet the threads of the warpgroup, which the simulator runs as one."""
    role.meet()


def sync_warpgroups(step: SyncWarpgroups, role: RoleRun) -> Run:
    """Meet the role's other warpgroups."""
    yield from _meet_at(_barrier(step.barriers, role, 0), role, "the other warpgroups")


def fence_async(step: FenceAsync, role: RoleRun) -> None:
    """Let asynchronous reads see what was stored."""
    role.fence_stores()


# ---- rings ----------------------------------------------------------------------------------------------------------
def wait_full(step: WaitFull, role: RoleRun) -> Run:
    """Wait for the phase in which the producer fills the stage."""
    barrier = role.stage_barriers(step.cursor).full

    yield from _wait_for_phase(
        role, barrier, role.position(step.cursor).phase, f"{barrier.name} to be filled"
    )
    role.see_full(step.cursor)


def wait_empty(step: WaitEmpty, role: RoleRun) -> Run:
    """Wait for the phase in which every consumer releases the stage."""
    barrier = role.stage_barriers(step.cursor).empty
    yield from _wait_for_phase(
        role, barrier, role.position(step.cursor).phase, f"{barrier.name} to be released"
    )


def _wait_for_phase(role: RoleRun, barrier: Mbarrier, parity: int, what: str) -> Run:
    """What a wait on parity does: it passes while the last complete phase has that parity; before the first, if 1."""

    def has_come() -> bool:
        if barrier.completed % 2 == parity:
            barrier.land()
        return barrier.completed % 2 != parity

    if not has_come():
        yield Wait(lambda: f"{what}, {barrier.arrived} of {barrier.parties} have arrived", has_come)
    role.clock.join(barrier.clock)


def release(step: Release, role: RoleRun) -> None:
    """One thread says that the warpgroup is done with the stage, or one of each of its warps, which run as one here."""
    empty = role.stage_barriers(step.cursor).empty
    assert step.cursor.ring is not None
    if step.cursor.ring.read_by_threads:
        empty.arrive(role.leave())
    else:
        role.check_seen_by_all(step.cursor)
        empty.arrive(role.leaders_clock)


def publish(step: Publish, role: RoleRun) -> None:
    """Each warp says that it has stored its part of the stage; they run as one here."""
    role.stage_barriers(step.cursor).full.arrive(role.leave())


def advance(step: Advance, role: RoleRun) -> None:
    """Move the cursor on, round its ring; a new round is a new phase."""
    position = role.position(step.cursor)
    position.stage += 1
    if position.stage == step.cursor.stages:
        position.stage, position.phase = 0, 1 - position.phase


# ---- turns ----------------------------------------------------------------------------------------------------------
def take_turn(step: TakeTurn, role: RoleRun) -> Run:
    """Wait at this warpgroup's barrier until the one before it has passed the turn."""
    yield from _meet_at(_barrier(step.turn, role, role.warpgroup), role, "its turn")


def _meet_at(barrier: NamedBarrier, role: RoleRun, what: str) -> Run:
    phase = barrier.completed
    role.meet()
    barrier.waiting += 1
    barrier.arrive(role.clock)
    if barrier.completed == phase:
        yield Wait(lambda: what, lambda: barrier.completed > phase)
    role.clock.join(barrier.clock)


def pass_turn(step: PassTurn, role: RoleRun) -> None:
    """Count as arrived at the next warpgroup's barrier."""
    following = (role.warpgroup + 1) % role.warpgroups
    barrier = _barrier(step.turn, role, following)
    if barrier.wakes_nobody:
        message = f"the turn is passed to warpgroup {following} twice before it has taken it"
        raise role.fault("deadlock", message, step.turn.name)
    barrier.arrive(role.clock)


def _barrier(barriers: NamedBarriers, role: RoleRun, warpgroup: int) -> NamedBarrier:
    return role.block.named.setdefault((barriers.name, warpgroup), NamedBarrier(barriers.parties))

"""What each Step costs on which unit: a charge for every Step that takes time.

Rates and latencies are those of `costs.py`; a charge says which of them a Step pays, and for how much work. A GEMM
lasts from its issue to its WaitGemm, a copy until its bytes are there. No charge computes a value.
"""

import math
from collections.abc import Callable, Generator
from typing import Any

from attngen.plan import PartRows, RegTile, RegVec, Rows, Step, Tensor
from attngen.plan.steps import (
    AddSums,
    Clear,
    ClearTile,
    CommitCopies,
    ConvertP,
    DrawTile,
    Exponentiate,
    FinishRows,
    FitRows,
    Gemm,
    HidePairs,
    IssueGemm,
    JoinShares,
    LeaveShare,
    LoadDescales,
    LoadRegisters,
    LoadTile,
    LookUp,
    MaskScores,
    MaskScoresEach,
    ModifyScores,
    NegateTile,
    OrderColumns,
    Promote,
    RecoverP,
    ReduceRows,
    RowMax,
    ScaleColumns,
    ScaleGradient,
    ScaleKeys,
    ScaleRows,
    ScoreGradient,
    SeedScores,
    StageSums,
    StageTile,
    StageTransposed,
    StoreColumns,
    StoreGradient,
    StoreRegisters,
    StoreTile,
    SyncThreads,
    SyncWarp,
    SyncWarpgroup,
    SyncWarpgroups,
    TakeRank,
    TakeTurn,
    TmaLoad,
    TmaLoadRows,
    TmaStore,
    TmaStoreOwn,
    WaitAdded,
    WaitCopies,
    WaitEmpty,
    WaitFull,
    WaitGemm,
    WaitStores,
)
from attngen.simulate.roles import RoleRun, Wait
from attngen.simulate.simulated_gemms import depth_of
from attngen.simulate.units import TIME, Unit, Units, now, when_due

Paid = Generator[Wait, None, int | None]
Charge = Callable[[Units, Any, RoleRun], Paid | int | None]
"""Queues the work of a Step and leaves the role's time where the Step takes effect; a generator where other roles may
have to go first. Returns when the role goes on; None where that is when the Step has been done."""

SCHEDULERS = 4
"""Warp schedulers of an SM. Source: CUDA C++ Programming Guide, "Compute Capability 9.0", "Architecture"."""


def _scheduler_share(role: RoleRun) -> float:
    """The share of the SM's schedulers on which the role has a warp."""
    return min(SCHEDULERS, role.warps) / SCHEDULERS


def _elements(place: RegTile | RegVec, role: RoleRun) -> int:
    """Of a place, those that the role's own rows have."""
    return place.rows // role.warpgroups * (place.cols if isinstance(place, RegTile) else 1)


def _transfer_cycles(units: Units, size_bytes: int) -> float:
    """Cycles in which so much passes between L2 and shared memory or registers."""
    return size_bytes / units.costs.copy_bytes


def _take_done(ends: list[int], pending: int) -> list[int]:
    """Remove and return all but the `pending` newest."""
    done = ends[: max(0, len(ends) - pending)]
    del ends[: len(done)]
    return done


# ---- registers ------------------------------------------------------------------------------------------------------
_OPERAND: dict[type[Step], str] = {
    Clear: "dst",
    MaskScores: "s",
    MaskScoresEach: "s",
    ModifyScores: "s",
    SeedScores: "s",
    RowMax: "s",
    Exponentiate: "s",
    ConvertP: "s",
    ScaleRows: "o",
    OrderColumns: "o",
    ScaleKeys: "s",
    ScaleColumns: "s",
    Promote: "o",
    ReduceRows: "part",
    FinishRows: "row_sum",
    ScaleGradient: "acc",
    HidePairs: "s",
}
"""The operand whose elements a Step on registers works through."""


def _work_on_registers(units: Units, step: Any, role: RoleRun) -> Paid:
    """Slots of the schedulers, for exponentials the unit beside."""
    place: RegTile | RegVec = getattr(step, _OPERAND[type(step)])
    costs, elements, share = units.costs, _elements(place, role), _scheduler_share(role)
    work: dict[Unit, float] = {
        "arithmetic": elements * costs.lane_slots.get(type(step), 1) / (costs.lanes * share)
    }
    if isinstance(step, Exponentiate):
        work["exponential unit"] = elements / (costs.exponentials * share)
    yield from units.queue_in_slices(work, step, role)
    latency = costs.reduction_latency if isinstance(step, RowMax | ReduceRows) else costs.step_latency
    return now(role) + (latency if not isinstance(step, Clear) else 0)


def _load_rows(units: Units, step: RecoverP | ScoreGradient, role: RoleRun) -> Paid:
    """The numbers of the queries of a tile of pairs; ptxas loads them under the products before (NVRTC 13.0.88)."""
    numbers = step.lse if isinstance(step, RecoverP) else step.delta
    if not isinstance(numbers, Rows):  # they have come before
        return None
    yield when_due(role)
    rows = dict(zip(step.s.axes, (step.s.rows, step.s.cols), strict=True))["queries"]
    units.queue("copy engine", _transfer_cycles(units, 4 * rows), step, role)
    return None


def _recover_p(units: Units, step: RecoverP, role: RoleRun) -> Paid:
    """lse comes from device memory; exponentials, and what score, slope, mask and rounding take beside."""
    yield from _load_rows(units, step, role)
    costs, elements, share = units.costs, _elements(step.s, role), _scheduler_share(role)
    besides: dict[type[Step], int] = {
        ConvertP: step.p is not None,
        ModifyScores: (step.score is not None) + (step.slope is not None),
        MaskScoresEach: step.mask is not None,
    }
    slots = costs.lane_slots[RecoverP] + sum(costs.lane_slots[kind] * n for kind, n in besides.items())
    work: dict[Unit, float] = {
        "arithmetic": elements * slots / (costs.lanes * share),
        "exponential unit": elements / (costs.exponentials * share),
    }
    yield from units.queue_in_slices(work, step, role)
    return now(role) + costs.step_latency


def _score_gradient(units: Units, step: ScoreGradient, role: RoleRun) -> Paid:
    """delta comes from device memory."""
    yield from _load_rows(units, step, role)
    costs, share = units.costs, _scheduler_share(role)
    slots = _elements(step.s, role) * costs.lane_slots[ScoreGradient]
    yield from units.queue_in_slices({"arithmetic": slots / (costs.lanes * share)}, step, role)
    return now(role) + costs.step_latency


# ---- GEMMs ----------------------------------------------------------------------------------------------------------
def _gemm_cycles(units: Units, step: Any, role: RoleRun) -> float:
    flops: int = 2 * _elements(step.acc, role) * depth_of(step, role)
    bits: int = max(step.b.buffer.dtype.bits, 16 if isinstance(step, Gemm) else 0)  # e4m3 becomes f16
    return flops * bits / (16 * units.costs.flops_of_16_bit)


def _issue_gemm(units: Units, step: Any, role: RoleRun) -> Paid:
    yield when_due(role)
    end = units.queue("tensor core", _gemm_cycles(units, step, role), step, role)
    units.in_flight[role].gemms.append(end)
    return now(role) + units.costs.gemm_issue


def _wait_gemm(units: Units, step: WaitGemm, role: RoleRun) -> int:
    done = _take_done(units.in_flight[role].gemms, step.pending)
    return max([now(role), *(end + units.costs.gemm_latency for end in done)])


def _synchronous_gemm(units: Units, step: Any, role: RoleRun) -> Paid:
    cycles = _gemm_cycles(units, step, role) / (units.costs.mma_share * _scheduler_share(role))
    yield from units.queue_in_slices({"tensor core": cycles}, step, role)
    return now(role) + units.costs.gemm_latency


# ---- copies between device and shared memory ------------------------------------------------------------------------
def _tma_load(units: Units, step: TmaLoad, role: RoleRun) -> Paid:
    """The role arrives at `full` on behalf of the bytes: with the time when they are there."""
    yield when_due(role)
    goes_on = now(role) + units.costs.copy_issue
    end = units.queue("copy engine", _transfer_cycles(units, step.dst.buffer.stage_bytes), step, role)
    role.clock[TIME] = end + units.costs.copy_latency
    return goes_on


def _tma_load_rows(units: Units, step: TmaLoadRows, role: RoleRun) -> Paid:
    yield when_due(role)
    units.queue("copy engine", _transfer_cycles(units, step.dst.buffer.stage_bytes), step, role)
    return now(role) + units.costs.copy_issue


def _load_tile(units: Units, step: LoadTile | LoadDescales, role: RoleRun) -> Paid:
    size_bytes = step.dst.buffer.stage_bytes // (role.warpgroups if step.dst.own_rows else 1)
    chunks = size_bytes / (16 if isinstance(step, LoadTile) else 4)
    slots = chunks * units.costs.chunk_slots
    cycles = slots / (units.costs.lanes * _scheduler_share(role))
    yield from units.queue_in_slices({"arithmetic": cycles}, step, role)
    yield when_due(role)
    end = units.queue("copy engine", _transfer_cycles(units, size_bytes), step, role)
    units.in_flight[role].copies.append(end + units.costs.copy_latency)
    return None


def _commit_copies(units: Units, step: CommitCopies, role: RoleRun) -> None:
    in_flight = units.in_flight[role]
    in_flight.groups.append(max([now(role), *in_flight.copies]))
    in_flight.copies.clear()


def _wait_copies(units: Units, step: WaitCopies, role: RoleRun) -> int:
    return max([now(role), *_take_done(units.in_flight[role].groups, step.pending)])


def _tma_store(units: Units, step: TmaStore | TmaStoreOwn, role: RoleRun) -> Paid:
    yield when_due(role)
    cycles = _transfer_cycles(units, step.src.buffer.stage_bytes // role.warpgroups)
    units.in_flight[role].stores.append(units.queue("copy engine", cycles, step, role))
    return now(role) + units.costs.copy_issue


def _add_sums(units: Units, step: AddSums, role: RoleRun) -> Paid:
    """As much as the warpgroup's part of the tile passes to L2, which adds."""
    yield when_due(role)
    cycles = _transfer_cycles(units, step.src.buffer.stage_bytes // role.warpgroups)
    units.in_flight[role].stores.append(units.queue("copy engine", cycles, step, role))
    return now(role) + units.costs.copy_issue


def _reach_memory(units: Units, step: TakeRank | WaitAdded, role: RoleRun) -> int:
    """There and back; what other blocks do is not known here."""
    return now(role) + units.costs.memory_latency


def _wait_stores(units: Units, step: WaitStores, role: RoleRun) -> int:
    return max([now(role), *_take_done(units.in_flight[role].stores, 0)])


# ---- loads and stores of the threads --------------------------------------------------------------------------------
def _write_shared(
    units: Units,
    step: StageTile | NegateTile | StageTransposed | StageSums | ClearTile | LeaveShare | FitRows,
    role: RoleRun,
) -> int:
    """Shared memory has no lane of its own."""
    view = step.tile if isinstance(step, NegateTile | FitRows) else step.dst
    share = role.warpgroups if view.own_rows else 1
    cycles = math.ceil(view.buffer.stage_bytes / share / units.costs.shared_bytes)
    return now(role) + cycles + units.costs.step_latency


def _join_shares(units: Units, step: JoinShares, role: RoleRun) -> int:
    """A warp reads its columns of what all have left."""
    cycles = math.ceil(step.src.buffer.stage_bytes / role.warpgroups / units.costs.shared_bytes)
    return now(role) + cycles + units.costs.step_latency


def _access_device(units: Units, size_bytes: int, waits: bool, step: Step, role: RoleRun) -> Paid:
    """Threads load from or store to device memory; nobody waits for a store."""
    yield when_due(role)
    end = units.queue("copy engine", _transfer_cycles(units, size_bytes), step, role)
    return end + (units.costs.memory_latency if waits else 0)


def _registers(
    units: Units, step: LoadRegisters | StoreRegisters | StoreColumns, role: RoleRun
) -> Paid | None:
    registers: RegTile | RegVec
    place: Tensor | Rows | PartRows
    if isinstance(step, LoadRegisters):
        registers, place, waits = step.dst, step.src, True
    else:
        registers, place, waits = step.src, step.dst, False
    if isinstance(place, Rows) and not role.device.wants(place):
        return None
    return _access_device(units, 4 * _elements(registers, role), waits, step, role)


def _look_up(units: Units, step: LookUp, role: RoleRun) -> Paid:
    return _access_device(units, step.dst.dtype.bits // 8 * _elements(step.dst, role), False, step, role)


def _store_tile(units: Units, step: StoreTile, role: RoleRun) -> Paid:
    return _access_device(units, step.src.buffer.stage_bytes, False, step, role)


def _store_gradient(units: Units, step: StoreGradient, role: RoleRun) -> Paid:
    wanted = sum(place.dtype.bytes for place in filter(role.device.wants, step.places))
    share = role.warpgroups if step.src.own_rows else 1
    elements = step.src.buffer.rows * step.src.buffer.cols // share
    return _access_device(units, elements * wanted, role.call.accumulates, step, role)


def _draw_tile(units: Units, step: DrawTile, role: RoleRun) -> None:
    role.clock[TIME] = now(role) + units.costs.memory_latency


# ---- meetings -------------------------------------------------------------------------------------------------------
MEETINGS = (WaitFull, WaitEmpty, TakeTurn, SyncThreads, SyncWarp, SyncWarpgroup, SyncWarpgroups)
"""Steps that end at the later of two times: the role's, and that of those it waits for."""


def _meet(units: Units, step: Step, role: RoleRun) -> None:
    """Nothing before they meet; the barrier's latency is added where the Step ends."""


CHARGES: dict[type[Step], Charge] = {
    **dict.fromkeys(_OPERAND, _work_on_registers),
    IssueGemm: _issue_gemm,
    Gemm: _synchronous_gemm,
    **dict.fromkeys(MEETINGS, _meet),
    **dict.fromkeys(
        (StageTile, NegateTile, StageTransposed, StageSums, ClearTile, LeaveShare, FitRows), _write_shared
    ),
    JoinShares: _join_shares,
    **dict.fromkeys((LoadRegisters, StoreRegisters, StoreColumns), _registers),
    RecoverP: _recover_p,
    ScoreGradient: _score_gradient,
    LookUp: _look_up,
    WaitGemm: _wait_gemm,
    TmaLoad: _tma_load,
    TmaLoadRows: _tma_load_rows,
    **dict.fromkeys((LoadTile, LoadDescales), _load_tile),
    CommitCopies: _commit_copies,
    WaitCopies: _wait_copies,
    **dict.fromkeys((TmaStore, TmaStoreOwn), _tma_store),
    AddSums: _add_sums,
    WaitStores: _wait_stores,
    **dict.fromkeys((TakeRank, WaitAdded), _reach_memory),
    StoreTile: _store_tile,
    StoreGradient: _store_gradient,
    DrawTile: _draw_tile,
}
"""What each Step costs; those that are missing (control, Release, Advance, ...) cost nothing."""

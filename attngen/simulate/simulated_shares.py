"""What the Steps do by which those that have each keys of their own bring together what these have come to."""

from functools import reduce
from typing import NamedTuple

import torch

from attngen.plan import PartRows, RegTile, RegVec
from attngen.plan.steps import (
    CountPart,
    JoinShares,
    LeaveShare,
    MergeParts,
    StoreColumns,
    SyncThreads,
    SyncWarp,
    SyncWarpgroups,
)
from attngen.simulate.device_memory import NOTHING
from attngen.simulate.roles import RoleRun, Run
from attngen.simulate.simulated_softmax import (
    inverse_sum,
    joined,
    log_sum_exp_of,
    rescale_factor,
    scale_rows_of,
    sinks_of,
)
from attngen.simulate.simulated_sync import sync_threads, sync_warpgroups

NUMBERS = 3
"""Columns of what a warp leaves behind O: the maximum of a row, what exponents refer to, and its sum."""


def sync_warp(step: SyncWarp, role: RoleRun) -> None:
    """Meet the threads of the warp, which has a run of the program to itself."""
    if role.warps != 1:
        raise role.fault("race", f"{role.warps} warps run the program, and the threads of one meet")
    role.meet()


def leave_share(step: LeaveShare, role: RoleRun) -> None:
    """Write O and the numbers of its rows to the warp's own rows."""
    o, total = role.read(step.o), role.read(step.total)
    maxima = [role.read(vector) for vector in (step.row_max, step.reference) if vector]

    def share() -> torch.Tensor:
        none = torch.zeros_like(total)
        numbers = (*(maxima or (none, none)), total)
        room = step.dst.buffer.cols - step.o.cols - NUMBERS
        return torch.cat((o, *(x.unsqueeze(-1) for x in (*numbers, *[none] * room))), -1)

    role.write_shared(step.dst, share)


def join_shares(step: JoinShares, role: RoleRun) -> None:
    """Add up what all have left: the sums of rows, and of O the warp's columns."""
    left, rows = role.read_shared(step.src), role.block_rows(step.o.rows)
    found = None
    if role.device.holds_values:
        by_warp = left.view(len(left), -1, rows, left.shape[-1])
        cols = step.src.buffer.cols - 1 - NUMBERS
        row_max, reference, total = by_warp[..., cols:-1].unbind(-1)
        found = _joined(_columns(by_warp[..., :cols], role.own_columns(step.o)), total, row_max, reference)
    _write(role, found, step.o, step.total, step.row_max, step.reference)


class _Joined(NamedTuple):
    o: torch.Tensor
    total: torch.Tensor
    row_max: torch.Tensor
    reference: torch.Tensor


def _joined(o: torch.Tensor, total: torch.Tensor, row_max: torch.Tensor, reference: torch.Tensor) -> _Joined:
    """What (members, those who have left something, rows, ...) come to, added up in their order."""
    top, of_top = row_max.max(1, keepdim=True)
    refers_to = reference.gather(1, of_top)
    weight = rescale_factor(reference, refers_to)
    all_o, all_of_total = (
        reduce(torch.add, terms.unbind(1)) for terms in (weight.unsqueeze(-1) * o, weight * total)
    )
    return _Joined(all_o, all_of_total, top.squeeze(1), refers_to.squeeze(1))


def _write(role: RoleRun, joined: _Joined | None, *places: RegTile | RegVec | None) -> None:
    """Write what was joined to registers, in the order of its fields; None where nothing holds values."""
    for place, values in zip(places, joined or (NOTHING,) * len(places), strict=True):
        if place is not None:
            role.write(place, lambda values=values: values)


def _columns(o: torch.Tensor, own: range) -> torch.Tensor:
    """Some columns, zeros where there are none."""
    found = o[..., own.start : own.stop]
    return torch.nn.functional.pad(found, (0, len(own) - found.shape[-1]))


def store_columns(step: StoreColumns, role: RoleRun) -> None:
    """Write the warp's columns of all rows."""
    values, own = role.read(step.src), role.own_columns(step.src)
    if isinstance(step.dst, PartRows):
        valid = range(role.valid_extent("queries"))
        role.device.write_part(step.dst, role.tile, role.tile_numbers, valid, values, own)
        return
    rows = role.block_rows(step.src.rows)
    role.device.write(step.dst, role.tile, role.index(step.block) * rows, values, (rows, len(own)), own.start)


def count_part(step: CountPart, role: RoleRun) -> Run:
    """Meet, let one count the tile of each head among the parts of its rows, and meet again to hear."""
    yield from _meet(step, role)
    if role.warpgroup == 0:
        role.block.is_last_part = role.count_part()
    yield from _meet(step, role)


def _meet(step: CountPart, role: RoleRun) -> Run:
    if step.meet:
        yield from sync_warpgroups(SyncWarpgroups(step.meet), role)
    else:
        yield from sync_threads(SyncThreads(), role)


def merge_parts(step: MergeParts, role: RoleRun) -> None:
    """Make a result of all parts; warps have rows in turn, which the simulator gives to the first."""
    if role.warpgroup != 0:
        return
    device, parts = role.device, role.parts_of_tile
    places, rows = (step.out, step.row_sum, step.row_max, step.reference), role.valid_rows_of_tile
    for place in filter(None, places):
        if (
            missing := device.part_not_left(place, rows, (number for of in parts for number in of))
        ) is not None:
            raise role.fault("uninitialised read", f"tile {missing} has left no part in {place}", place.name)
    out = lse = NOTHING
    if device.holds_values:
        numbers = torch.tensor(parts, dtype=torch.int64)
        left = [device.tensors[place.name][numbers, :rows] for place in filter(None, places)]
        none = torch.zeros_like(left[1])
        merged = _joined(left[0], left[1], *(left[2:] or (none, none)))
        by = inverse_sum(merged.total)
        lse = log_sum_exp_of(step.finish, role, merged.row_max if step.row_max else None, merged.total)
        if step.has_sink:
            by, lse = joined(by, lse, sinks_of(role, range(rows)))
        out = scale_rows_of(merged.o, by)
    size = role.call.plan.block_m
    first = role.index(step.block) * size
    device.write(step.result, role.tile, first, out, (size, step.result.cols))
    if device.wants(step.lse):
        device.write(step.lse, role.tile, first, lse, (size,))

"""What the Steps that move tiles do."""

from collections.abc import Callable

import torch

from attngen.dtypes import E4M3, DType, torch_dtype
from attngen.expr import evaluate
from attngen.plan import BlockIndex, PartRows, RegTile, RegVec, Rows, Tensor
from attngen.plan.steps import (
    CommitCopies,
    FindPages,
    LoadRegisters,
    LoadTile,
    StageTile,
    StoreRegisters,
    StoreTile,
    TmaLoad,
    TmaLoadRows,
    TmaStore,
    TmaStoreOwn,
    WaitCopies,
    WaitStores,
    ZeroHidden,
    ZeroTail,
)
from attngen.simulate.barriers import Mbarrier, copies_into
from attngen.simulate.clocks import Stamp
from attngen.simulate.contributions import Source, check_contributions
from attngen.simulate.roles import RoleRun
from attngen.simulate.shared_memory import Cell


def rounded(values: torch.Tensor, dtype: DType) -> torch.Tensor:
    """The nearest numbers of a format, kept as f32; e4m3, which has no infinity, ends at its largest."""
    if dtype is E4M3:
        values = values.clamp(-E4M3.max_finite, E4M3.max_finite)
    return values.to(torch_dtype(dtype)).float()


def _first_row(role: RoleRun, place: Tensor | Rows, block: BlockIndex, rows: int) -> int:
    first = role.index(block) * rows
    if first < 0:
        raise role.fault("out of bounds", f"block {first // rows} of {place} does not exist", place.name)
    return first


def load_tile(step: LoadTile, role: RoleRun) -> None:
    """Start copying rows of the tile's head; without `pads` all of them must exist."""
    buffer = step.dst.buffer
    own = role.own_rows(buffer.rows) if step.dst.own_rows else range(buffer.rows)
    first = _first_row(role, step.src, step.block, buffer.rows)
    valid = role.device.valid_rows(step.src, role.tile, first, buffer.rows)
    if not step.pads and valid < buffer.rows:
        length = role.device.rows_of(step.src, role.tile)
        message = (
            f"rows {first} .. {first + buffer.rows - 1} of {step.src}, which has {length}, without a bound"
        )
        raise role.fault("out of bounds", message, step.src.name)
    values = role.device.read(step.src, role.tile, first + own.start, (len(own), buffer.cols))
    source = Source.of(step.src, role.tile, role.index(step.block))
    role.started += role.start_copy(step.dst, values, valid, source)
    if step.src.dtype is not buffer.dtype:
        for cell in role.cells(step.dst):
            cell.copied_as = step.src.dtype


def tma_load(step: TmaLoad, role: RoleRun) -> None:
    """Have the copy engine fill a stage; `full` completes when the bytes have landed, which is as late as may be.

    It knows the ends of tensors, not of sequences.
    """
    buffer = step.dst.buffer
    extent = buffer.sequence_extent
    first = _first_row(role, step.src, step.block, extent)
    if role.call.plan.lengths.is_paged(step.src.axis) and role.pages_found != (role.tile, first):
        raise role.fault(
            "uninitialised read", f"nobody has found the pages of rows {first} ..", step.src.name
        )
    values = role.device.read(step.src, role.tile, first, (buffer.rows, buffer.cols), past_end=True)
    valid = role.device.valid_rows(step.src, role.tile, first, extent)
    source = Source.of(step.src, role.tile, role.index(step.block))
    full = _full(step, role)
    full.expect(_landing(role.start_copy(step.dst, values, valid, source), full), role.leaders_clock)


def find_pages(step: FindPages, role: RoleRun) -> None:
    """Each lane looks a piece up."""
    role.pages_found = role.tile, role.index(step.block) * role.call.plan.block_n


def tma_load_rows(step: TmaLoadRows, role: RoleRun) -> None:
    """Have the copy engine bring one number of each row beside the tile whose bytes `full` waits for."""
    rows = step.dst.buffer.cols
    first = _first_row(role, step.src, step.block, rows)
    values = role.device.read(step.src, role.tile, first, (rows,))
    full = _full(step, role)
    row = values.unsqueeze(-2) if role.device.holds_values else values
    full.announce(_landing(role.start_copy(step.dst, row, rows, None), full))


def _full(step: TmaLoad | TmaLoadRows, role: RoleRun) -> Mbarrier:
    assert step.dst.cursor is not None
    return role.stage_barriers(step.dst.cursor).full


def _landing(parts: list[tuple[Cell, torch.Tensor]], full: Mbarrier) -> Callable[[], None]:
    def land() -> None:
        for cell, rows in parts:
            cell.fill(rows, Stamp(copies_into(full.name), full.completed))

    return land


def commit_copies(step: CommitCopies, role: RoleRun) -> None:
    """Close the group of copies started since the last commit."""
    role.groups.append(role.started)
    role.started = []


def wait_copies(step: WaitCopies, role: RoleRun) -> None:
    """Let all groups land but the newest `pending`."""
    role.land_copies(step.pending)


def stage_tile(step: StageTile, role: RoleRun) -> None:
    """Round an accumulator and write it to shared memory; of a gradient every visit must be in it, once."""
    check_contributions(step.src, role)
    dtype = step.dst.buffer.dtype
    role.write_shared(step.dst, lambda src: rounded(src, dtype), role.read(step.src))


def store_tile(step: StoreTile, role: RoleRun) -> None:
    """Write a buffer to rows of the tile's head; rows past the sequence are dropped."""
    buffer = step.src.buffer
    own = role.own_rows(buffer.rows) if step.src.own_rows else range(buffer.rows)
    first = _first_row(role, step.dst, step.block, buffer.rows) + own.start
    role.device.write(step.dst, role.tile, first, role.read_shared(step.src), (len(own), buffer.cols))


def tma_store(step: TmaStore, role: RoleRun) -> None:
    """Have the copy engine write the warpgroup's own rows; rows past the tensor are dropped."""
    first, rows, valid = _own_share(step, role)
    if valid < rows and role.call.plan.lengths.has_neighbours(step.dst.axis):
        message = (
            f"rows {first} .. {first + rows - 1} of {step.dst} are written, of which the sequence has {valid}"
        )
        raise role.fault("out of bounds", message, step.dst.name)
    values = role.read_by_store(step.src)
    role.device.write(step.dst, role.tile, first, values, (rows, step.src.buffer.cols))


def tma_store_own(step: TmaStoreOwn, role: RoleRun) -> None:
    """Write the warpgroup's own rows, by the copy engine where all are the sequence's, else by its threads."""
    first, rows, valid = _own_share(step, role)
    values = role.read_by_store(step.src) if valid == rows else role.read_shared(step.src)
    role.device.write(step.dst, role.tile, first, values, (rows, step.src.buffer.cols))


def _own_share(step: TmaStore | TmaStoreOwn, role: RoleRun) -> tuple[int, int, int]:
    """The first of the rows that a warpgroup stores, how many they are, and how many of these exist."""
    rows = step.src.buffer.rows
    own = role.own_rows(rows)
    first = _first_row(role, step.dst, step.block, rows) + own.start
    return first, len(own), role.device.valid_rows(step.dst, role.tile, first, len(own))


def zero_tail(step: ZeroTail, role: RoleRun) -> None:
    """Write zeros over what follows the sequence."""
    rows = step.tile.buffer.rows
    _, length = role.tile.sequence(step.tile.axes[0])
    first = role.index(step.block) * rows
    role.zero_rows(step.tile, torch.arange(first, first + rows).unsqueeze(0) >= length)


def zero_hidden(step: ZeroHidden, role: RoleRun) -> None:
    """Write zeros over keys that the mask hides from every query."""
    if not role.device.holds_values:
        return
    rows, tile = step.tile.buffer.rows, role.tile
    kv_idx = torch.arange(rows).view(1, -1) + role.index(step.block) * rows
    hidden = torch.ones(len(tile.members), rows, dtype=torch.bool)
    for of_head in map(tile.of_group, range(role.call.sizes.group)) if step.by_group else (tile,):
        role.tile = of_head
        names = role.names(dimensions=2) | {"kv_idx": kv_idx}
        hidden &= ~torch.as_tensor(evaluate(step.shown, names, role.call.sizes.declared.tensors))
    role.tile = tile
    role.zero_rows(step.tile, hidden)


def wait_stores(step: WaitStores, role: RoleRun) -> None:
    """The first thread waits until its stores have read shared memory."""
    role.land_stores()


def load_registers(step: LoadRegisters, role: RoleRun) -> None:
    """Read the warpgroup's rows.

    What this block wrote each thread reads its own of an accumulator, and any lane of rows, after a SyncThreads.
    """
    registers, place = step.dst, step.src
    own = role.own_rows(registers.rows)
    first = _first_row(role, place, step.block, registers.rows)
    block = first // registers.rows
    if place not in role.call.plan.read_rows:
        if (place.name, block) not in role.block.rows_written:
            message = f"{place}[{block}] was never written by this block"
            raise role.fault("uninitialised read", message, place.name)
        is_known = role.clock.knows(role.block.rows_written[place.name, block])
        if isinstance(registers, RegVec) and not is_known:
            message = f"{place}[{block}] is read, and another lane wrote it since the last SyncThreads"
            raise role.fault("race", message, place.name)
    values = role.device.read(place, role.tile, first + own.start, _shape(registers, len(own)))
    role.write(registers, lambda: values)


def store_registers(step: StoreRegisters, role: RoleRun) -> None:
    """Write the warpgroup's rows of an accumulator, or of a value per row; nothing of what the user did not ask for."""
    registers, place = step.src, step.dst
    values = role.read(registers)
    if isinstance(place, PartRows):
        first = role.rows_in_block(registers.rows).start
        rows = range(first, first + role.valid_extent("queries"))
        of_columns = values if isinstance(registers, RegTile) else values.unsqueeze(-1)
        columns = range(registers.cols if isinstance(registers, RegTile) else 1)
        role.device.write_part(place, role.tile, role.tile_numbers, rows, of_columns, columns)
        return
    if isinstance(place, Rows) and not role.device.wants(place):
        return
    own = role.rows_in_block(registers.rows)
    first = _first_row(role, place, step.block, role.block_rows(registers.rows)) + own.start
    role.device.write(place, role.tile, first, values, _shape(registers, len(own)))
    role.block.rows_written[place.name, first // registers.rows] = role.now


def _shape(registers: RegTile | RegVec, rows: int) -> tuple[int, ...]:
    return (rows, registers.cols) if isinstance(registers, RegTile) else (rows,)

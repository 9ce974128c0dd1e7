"""What the Steps that move tiles do."""

import torch

from attngen.dtypes import E4M3, DType, torch_dtype
from attngen.plan import Tensor
from attngen.plan.places import BlockIndex, Rows
from attngen.plan.steps import (
    CommitCopies,
    CopyTile,
    LoadFragment,
    LoadRows,
    LoadTile,
    StageTile,
    StoreFragment,
    StoreRows,
    StoreTile,
    TmaLoad,
    TmaStore,
    WaitCopies,
    WaitStores,
)
from attngen.simulate.barriers import copies_into
from attngen.simulate.clocks import Stamp
from attngen.simulate.roles import RoleRun


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
    """Start copying rows of the tile's head; without `bounded` all of them must exist."""
    buffer = step.dst.buffer
    first = _first_row(role, step.src, step.block, buffer.rows)
    valid = role.device.valid_rows(step.src, role.tile, first, buffer.rows)
    if not step.bounded and valid < buffer.rows:
        _, length = role.device.rows(step.src, role.tile)
        message = (
            f"rows {first} .. {first + buffer.rows - 1} of {step.src}, which has {length}, without a bound"
        )
        raise role.fault("out of bounds", message, step.src.name)
    values = role.device.read(step.src, role.tile, first, (buffer.rows, buffer.cols))
    role.started += role.start_copy(step.dst, values, valid)


def tma_load(step: TmaLoad, role: RoleRun) -> None:
    """Have the copy engine fill a stage; `full` completes when the bytes have landed, which is as late as may be."""
    buffer = step.dst.buffer
    rows = buffer.cols if buffer.transposed else buffer.rows
    first = _first_row(role, step.src, step.block, rows)
    values = role.device.read(step.src, role.tile, first, (buffer.rows, buffer.cols))
    parts = role.start_copy(step.dst, values, role.device.valid_rows(step.src, role.tile, first, rows))
    assert step.dst.cursor is not None
    full = role.stage_barriers(step.dst.cursor).full

    def land() -> None:
        for cell, rows in parts:
            cell.fill(rows, Stamp(copies_into(full.name), full.completed))

    full.expect(land, role.leaders_clock)


def commit_copies(step: CommitCopies, role: RoleRun) -> None:
    """Close the group of copies started since the last commit."""
    role.groups.append(role.started)
    role.started = []


def wait_copies(step: WaitCopies, role: RoleRun) -> None:
    """Let all groups land but the newest `pending`."""
    role.land_copies(step.pending)


def copy_tile(step: CopyTile | StageTile, role: RoleRun) -> None:
    """Round an accumulator and write it to shared memory."""
    dtype = step.dst.buffer.dtype
    role.write_shared(step.dst, lambda src: rounded(src, dtype), role.read(step.src))


def stage_tile(step: StageTile, role: RoleRun) -> None:
    """As CopyTile: the layouts they write differ on the GPU alone, and the View knows whose rows it means."""
    copy_tile(step, role)


def store_tile(step: StoreTile, role: RoleRun) -> None:
    """Write a buffer to rows of the tile's head; rows past the sequence are dropped."""
    buffer = step.src.buffer
    first = _first_row(role, step.dst, step.block, buffer.rows)
    role.device.write(step.dst, role.tile, first, role.read_shared(step.src), (buffer.rows, buffer.cols))


def tma_store(step: TmaStore, role: RoleRun) -> None:
    """Have the copy engine write the warpgroup's own rows; rows past the sequence are dropped."""
    buffer = step.src.buffer
    own = role.own_rows(buffer.rows)
    first = _first_row(role, step.dst, step.block, buffer.rows) + own.start
    role.device.write(step.dst, role.tile, first, role.read_by_store(step.src), (len(own), buffer.cols))


def wait_stores(step: WaitStores, role: RoleRun) -> None:
    """The first thread waits until its stores have read shared memory."""
    role.land_stores()


def load_fragment(step: LoadFragment, role: RoleRun) -> None:
    """Read an accumulator from a workspace; each thread reads what it wrote itself."""
    first = _first_row(role, step.src, step.block, step.dst.rows)
    _expect_written(role, step.src, first // step.dst.rows)
    values = role.device.read(step.src, role.tile, first, (step.dst.rows, step.dst.cols))
    role.write(step.dst, lambda: values)


def store_fragment(step: StoreFragment, role: RoleRun) -> None:
    """Write an accumulator to a workspace."""
    shape = (step.src.rows, step.src.cols)
    first = _first_row(role, step.dst, step.block, step.src.rows)
    role.device.write(step.dst, role.tile, first, role.read(step.src), shape)
    role.block.rows_written[step.dst.name, first // step.src.rows] = role.now


def load_rows(step: LoadRows, role: RoleRun) -> None:
    """Read one value per row; another lane may have written it, so a SyncThreads must stand between."""
    first = _first_row(role, step.src, step.block, step.dst.rows)
    block = first // step.dst.rows
    _expect_written(role, step.src, block)
    if not role.clock.knows(role.block.rows_written[step.src.name, block]):
        message = f"{step.src}[{block}] is read, and another lane wrote it since the last SyncThreads"
        raise role.fault("race", message, step.src.name)
    values = role.device.read(step.src, role.tile, first, (step.dst.rows,))
    role.write(step.dst, lambda: values)


def store_rows(step: StoreRows, role: RoleRun) -> None:
    """Write one value per row; nothing where the user did not ask for it."""
    values = role.read(step.src)
    if not role.device.wants(step.dst):
        return
    own = role.own_rows(step.src.rows)
    first = _first_row(role, step.dst, step.block, step.src.rows) + own.start
    role.device.write(step.dst, role.tile, first, values, (len(own),))
    role.block.rows_written[step.dst.name, first // step.src.rows] = role.now


def _expect_written(role: RoleRun, place: Tensor | Rows, block: int) -> None:
    if (place.name, block) not in role.block.rows_written:
        raise role.fault(
            "uninitialised read", f"{place}[{block}] was never written by this block", place.name
        )

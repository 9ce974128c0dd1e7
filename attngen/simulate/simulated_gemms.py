"""What the Steps of the GEMMs do: at once with mma.sync, in flight from an Issue to its WaitGemm with wgmma.

A GEMM in flight has its registers to itself: its accumulator, and its A operand if that is in registers. The
operands in shared memory are read until the wait. Its result is worked out when it is issued, which is the same, for
nobody may change an operand, and nobody sees it before it lands.
"""

import torch

from attngen.plan import LENGTHS, Axis, RegTile, View
from attngen.plan.steps import Gemm, IssueGemm, KeepColumns, Product, WaitGemm
from attngen.simulate.contributions import add_contribution
from attngen.simulate.roles import RoleRun
from attngen.simulate.simulated_cache import even_columns_first


def gemm(step: Gemm, role: RoleRun) -> None:
    """Compute acc = A B or acc += A B, accumulated in f32 from operands of the input type."""
    for view in (place for place in (step.a, step.b) if isinstance(place, View)):
        for cell in role.cells(view):
            if cell.copied_as is not None:
                message = (
                    f"{cell.name} is multiplied as {view.buffer.dtype.name}, and holds {cell.copied_as.name}"
                )
                raise role.fault("another format", message, cell.name)
    a = role.read(step.a) if isinstance(step.a, RegTile) else role.read_shared(step.a)
    _multiply(step, a, role.read_shared(step.b), role)


def issue_gemm(step: IssueGemm, role: RoleRun) -> None:
    """Start acc = A B or acc += A B."""
    a = role.read(step.a) if isinstance(step.a, RegTile) else role.read_by_gemm(step.a)
    if step.kept is not None and (kept := role.read(step.kept)).numel():
        a = torch.cat((kept, a[..., step.kept.cols :]), dim=-1)
    _multiply(step, a, role.read_by_gemm(step.b), role)
    role.issue_gemm(step.acc, *((step.a,) if isinstance(step.a, RegTile) else ()))


def keep_columns(step: KeepColumns, role: RoleRun) -> None:
    """Read the first columns of the warpgroup's own rows of an operand."""
    rows = role.read_shared(step.src)
    role.write(step.dst, lambda: rows[..., : step.dst.cols].contiguous())


def wait_gemm(step: WaitGemm, role: RoleRun) -> None:
    """Give back the registers that are named, of all GEMMs but the newest `pending`."""
    role.land_gemms(step.pending, step.lands)


def _multiply(step: Product, a: torch.Tensor, b: torch.Tensor, role: RoleRun) -> None:
    own_rows, own_columns = own_part(step.acc, role)
    columns = slice(step.first_column + own_columns.start, step.first_column + own_columns.stop)

    def product() -> torch.Tensor:
        rows = a.transpose(1, 2) if step.a_is_transposed else a
        if rows.shape[1] > len(own_rows):  # A of all warpgroups
            rows = rows[:, own_rows.start : own_rows.stop]
        values = (b.transpose(1, 2) if step.b_is_transposed else b)[..., columns]
        if isinstance(step, Gemm) and step.leaves_even_columns_first:
            values = values[..., even_columns_first(values.shape[-1])]
        return torch.bmm(rows, values)

    if step.starts_at_zero:
        role.write(step.acc, product)
    else:
        role.write(step.acc, lambda acc: acc + product(), role.read(step.acc))
    add_contribution(step, role)
    if role.device.traffic:
        rows, cols = step.acc.axes
        role.device.traffic.count_gemm(
            len(role.tile.members),
            (len(own_rows), len(own_columns), depth_of(step, role)),
            (
                _valid(step, rows, role),
                _valid(step, cols, role) * len(own_columns) // step.acc.cols,
                _valid(step, step.contracted, role),
            ),
        )


def depth_of(step: Product, role: RoleRun) -> int:
    """How many elements of a row and a column are multiplied, where a warp has rows of its own of B that many."""
    has_own = step.b.own_rows and not step.b_is_transposed
    return step.depth // role.warpgroups if has_own else step.depth


def own_part(tile: RegTile, role: RoleRun) -> tuple[range, range]:
    """The rows and the columns of a tile in registers that the warpgroup has."""
    if tile.shared_by == "columns":
        return range(tile.rows), role.own_rows(tile.cols)
    return role.own_rows(tile.rows), range(tile.cols)


def _valid(step: Product, axis: Axis, role: RoleRun) -> int:
    """How much of an axis of a product exists, of rows of accumulators the warpgroup's own."""
    views = [place for place in (step.a, step.b) if isinstance(place, View) and axis in place.axes]
    if axis in LENGTHS and views:
        (view, *_) = [view for view in views if view.axes[0] == axis] or views
        own = own_part(step.acc, role)[0]
        is_shared = view is step.a and not view.own_rows and axis == step.acc.axes[0]
        valid = role.valid_rows(view)
        return max(0, min(len(own), valid - own.start)) if is_shared else valid
    if axis in LENGTHS:
        return role.valid_extent(axis)
    return step.acc.valid_cols if axis in step.acc.axes else views[0].buffer.valid_cols

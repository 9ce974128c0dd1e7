"""What the Steps of the GEMMs do: at once with mma.sync, in flight from an Issue to its WaitGemm with wgmma.

A GEMM in flight has its registers to itself: its accumulator, and its A operand if that is in registers. The
operands in shared memory are read until the wait. Its result is worked out when it is issued, which is the same, for
nobody may change an operand, and nobody sees it before it lands.
"""

import torch

from attngen.plan import LENGTHS, Axis, RegTile, View
from attngen.plan.steps import Gemm, IssueGemm, Product, WaitGemm
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
    _multiply(step, a, role.read_by_gemm(step.b), role)
    role.issue_gemm(step.acc, *((step.a,) if isinstance(step.a, RegTile) else ()))


def wait_gemm(step: WaitGemm, role: RoleRun) -> None:
    """Give back the registers that are named, of all GEMMs but the newest `pending`."""
    role.land_gemms(step.pending, step.lands)


def _multiply(step: Product, a: torch.Tensor, b: torch.Tensor, role: RoleRun) -> None:
    columns = slice(step.first_column, step.first_column + step.acc.cols)

    def product() -> torch.Tensor:
        rows = a.transpose(1, 2) if step.a_is_transposed else a
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
            (step.acc.rows // role.warpgroups, step.acc.cols, step.depth),
            (_valid(step, rows, role), _valid(step, cols, role), _valid(step, step.contracted, role)),
        )


def _valid(step: Product, axis: Axis, role: RoleRun) -> int:
    """How much of an axis of a product exists, of rows of accumulators the warpgroup's own."""
    views = [place for place in (step.a, step.b) if isinstance(place, View) and axis in place.axes]
    if axis in LENGTHS:
        return role.valid_rows(views[0]) if views else role.valid_extent(axis)
    return step.acc.valid_cols if axis in step.acc.axes else views[0].buffer.valid_cols

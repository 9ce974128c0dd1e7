"""What the Steps of the GEMMs do: at once with mma.sync, in flight from an Issue to its WaitGemm with wgmma.

A GEMM in flight has its registers to itself: its accumulator, and its A operand if that is in registers. The
operands in shared memory are read until the wait. Its result is worked out when it is issued, which is the same, for
nobody may change an operand, and nobody sees it before it lands.
"""

import torch

from attngen.plan import View
from attngen.plan.steps import IssueOutputGemm, IssueScoreGemm, OutputGemm, ScoreGemm, WaitGemm
from attngen.simulate.roles import RoleRun


def score_gemm(step: ScoreGemm, role: RoleRun) -> None:
    """Compute acc = a bᵀ, accumulated in f32 from operands of the input type."""
    a, b = role.read_shared(step.a), role.read_shared(step.b)
    role.write(step.acc, _with_transposed, a, b)
    _count_scores(step, role)


def output_gemm(step: OutputGemm, role: RoleRun) -> None:
    """Compute acc += a b, accumulated in f32 from operands of the input type."""
    acc, a, b = role.read(step.acc), role.read(step.a), role.read_shared(step.b)
    role.write(step.acc, torch.baddbmm, acc, a, b)
    _count_output(step, role)


def issue_score_gemm(step: IssueScoreGemm, role: RoleRun) -> None:
    """Start acc = a bᵀ, or acc += a bᵀ."""
    a, b = role.read_by_gemm(step.a), role.read_by_gemm(step.b)
    if step.starts_at_zero:
        role.write(step.acc, _with_transposed, a, b)
    else:
        role.write(step.acc, lambda acc: acc + _with_transposed(a, b), role.read(step.acc))
    role.issue_gemm(step.acc)
    _count_scores(step, role)


def issue_output_gemm(step: IssueOutputGemm, role: RoleRun) -> None:
    """Start acc += a b."""
    a, b = role.read(step.a), role.read_by_gemm(step.b)
    if step.b.buffer.transposed and role.device.holds_values:
        b = b[:, step.first_column : step.first_column + step.acc.cols]
    product = _with_transposed if step.b.buffer.transposed else torch.bmm
    if step.starts_at_zero:
        role.write(step.acc, product, a, b)
    else:
        acc = role.read(step.acc)
        role.write(step.acc, lambda: acc + product(a, b))
    role.issue_gemm(step.acc, step.a)
    _count_output(step, role)


def wait_gemm(step: WaitGemm, role: RoleRun) -> None:
    """Give back the registers that are named, of all GEMMs but the newest `pending`."""
    role.land_gemms(step.pending, step.lands)


def _with_transposed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.bmm(a, b.transpose(1, 2))


def _count_scores(step: ScoreGemm | IssueScoreGemm, role: RoleRun) -> None:
    _count(
        role, (step.acc.rows, step.acc.cols, step.a.buffer.cols), (step.a, step.b, step.a.buffer.valid_cols)
    )


def _count_output(step: OutputGemm | IssueOutputGemm, role: RoleRun) -> None:
    _count(role, (step.acc.rows, step.acc.cols, step.a.cols), (None, step.b, step.acc.valid_cols))


def _count(role: RoleRun, padded: tuple[int, int, int], useful: tuple[View | None, View, int]) -> None:
    """Count a product of rows x cols, contracted over k; useful are the rows, keys and columns that exist."""
    if role.device.traffic:
        rows, cols, depth = padded
        a, b, valid_cols = useful
        valid_rows = role.valid_rows(a) if a else role.valid_query_rows
        role.device.traffic.count_gemm(
            len(role.tile.members),
            (rows // role.warpgroups, cols, depth),
            (valid_rows, role.valid_rows(b), valid_cols),
        )

"""A kernel plan -> one readable .cu file: the device library as far as it is used, then templates/entry.cuh.j2."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from attngen.emit import tile_text
from attngen.emit.device import names_in, used_by
from attngen.emit.environment import Templates, first_barrier, macros
from attngen.emit.lookups import table_texts
from attngen.emit.pair_functions import pair_functions
from attngen.emit.sheet_text import (
    emit_blocks,
    emit_boundaries,
    emit_finish,
    emit_list,
    emit_quantizing,
    emit_rows,
    emit_sink,
    emit_sums,
    sheet_text,
)
from attngen.errors import InternalError
from attngen.plan import (
    FillTables,
    FindBoundaries,
    FinishSums,
    KernelPlan,
    ListTiles,
    MapBlocks,
    PrepareRows,
    RegTile,
    Sheet,
    SumRows,
    SumSink,
    walk,
)
from attngen.plan.steps import IssueGemm, LeaveShare
from attngen.version import __version__


class Constant(NamedTuple):
    """A `constexpr int` of the emitted file and the field it comes from."""

    name: str
    value: int
    origin: str


def emit_module(kernels: Sequence[KernelPlan | Sheet]) -> str:
    """The CUDA C++ text of the kernels of one module of a call."""
    plan = next((kernel for kernel in kernels if isinstance(kernel, KernelPlan)), None)
    if plan is not None:
        return emit(plan)
    sheets = [kernel for kernel in kernels if isinstance(kernel, Sheet)]
    if isinstance(sheets[0], SumRows):
        return emit_sums(sheets[0])
    if isinstance(sheets[0], MapBlocks):
        return emit_blocks(sheets[0])
    if isinstance(sheets[0], SumSink):
        return emit_sink(sheets[0])
    if isinstance(sheets[0], FinishSums):
        return emit_finish(sheets[0])
    if isinstance(sheets[0], FindBoundaries):
        return emit_boundaries(sheets[0])
    return emit_rows(sheets[0]) if isinstance(sheets[0], PrepareRows) else emit_quantizing(sheets)


def emit(plan: KernelPlan) -> str:
    """The CUDA C++ text of a plan, and of the kernels that fill its tables and list its tiles.

    The same plan gives the same bytes.

    Raises:
        InternalError: the plan's arch runs on the simulator only.
    """
    if not plan.arch.emits:
        raise InternalError(f"nothing is emitted for {plan.arch.name}")
    templates, scheduler = Templates(plan), macros("scheduler.cuh.j2")
    body = templates.render(
        "entry.cuh.j2",
        tile=str(scheduler.tile(plan.scheduler, tile_text.fields(plan.scheduler))).strip("\n"),
        decoding=str(
            scheduler.decode(
                plan.scheduler,
                tile_text.count(plan.scheduler),
                tile_text.decoding(plan.scheduler),
                tile_text.fields(plan.scheduler),
                list(plan.scheduler.entry_fields),
                is_for_warps=bool(plan.tensor_maps) or plan.shares_keys,
            )
        ).strip("\n"),
        pair_functions=pair_functions(plan),
        kernels_beside=[*filter(None, (table_kernel(plan), list_kernel(plan)))],
    )
    names = names_in(body)
    return templates.render(
        "kernel.cu.j2",
        version=__version__,
        library=used_by(body, _wgmmas(plan)),
        constants=[constant for constant in _constants(plan) if constant.name in names],
        body=body,
    )


def table_kernel(plan: KernelPlan) -> str:
    """The kernel that fills the tables of a plan; nothing where it has none."""
    return sheet_text(FillTables(plan), tables=table_texts(plan)) if plan.tables else ""


def list_kernel(plan: KernelPlan) -> str:
    """The kernel that lists the tiles of a plan; nothing where their numbers say which they are."""
    return emit_list(ListTiles(plan)) if plan.scheduler.is_listed else ""


def _constants(plan: KernelPlan) -> tuple[Constant, ...]:
    worker = plan.worker
    is_specialised = len(plan.roles) > 1
    if is_specialised:
        padding = (f"padded to {plan.arch.k_step(plan.inputs)}, the k of wgmma", "columns of O")
        producers = sum(role.warps for role in plan.roles[1:])
        threads = f"{worker.warpgroups} consumer warpgroups of 128, and the producer's {producers} warps"
    else:
        padding = (f"padded to {plan.arch.mma.k}, the k of mma.sync", "padded likewise")
        threads = f"schedule.warps = {plan.warps}"
    rows = (
        "16-row tiles that each warp owns" if not plan.shares_keys else "16-row tiles, which every warp has"
    )
    return (
        Constant("kBlockM", plan.block_m, "tile.block_m: query rows of a block"),
        Constant("kBlockN", plan.block_n, "tile.block_n: keys of a block"),
        Constant("kHeadDimQk", plan.head_dim_qk, "problem.head_dim.qk"),
        Constant("kHeadDimV", plan.head_dim_v, "problem.head_dim.v"),
        Constant("kQkCols", plan.qk_cols, padding[0]),
        Constant("kVCols", plan.v_cols, padding[1]),
        Constant("kStages", plan.stages, "schedule.stages: K and V blocks in shared memory"),
        Constant("kThreads", plan.threads, threads),
        Constant("kRowTiles", plan.row_tiles, rows),
        *(_of_parts(plan) if plan.parts else ()),
        *(_of_shares(plan) if plan.shares_keys else ()),
        *(
            Constant(
                first_barrier(barriers),
                barriers.first,
                "the named barrier at which consumers meet"
                if barriers.is_common
                else _BARRIERS[barriers.parties],
            )
            for barriers in plan.named_barriers
        ),
    )


FEW_ROWS, FEW_COLUMNS = 16, 128
"""Of a tile whose rows are merged by a warp each; and of heads whose rows eight lanes merge, else sixteen."""


def _of_parts(plan: KernelPlan) -> Iterator[Constant]:
    """Constants of kernels of parts of keys."""
    yield Constant("kWarps", plan.warps, "of those that have rows or keys of a tile")
    of_many = 8 if plan.v_cols <= FEW_COLUMNS else 16
    lanes = 32 if plan.block_m <= FEW_ROWS else of_many
    yield Constant("kMergingLanes", lanes, "of a warp that merge a row")


def _of_shares(plan: KernelPlan) -> Iterator[Constant]:
    """Constants of kernels whose warps share out keys."""
    (shares,) = (step.dst.buffer for step in walk(plan.worker.program) if isinstance(step, LeaveShare))
    yield Constant("kWarpKeys", plan.block_n // plan.warps, "keys of a block that a warp has")
    size = shares.stage_bytes // plan.warps
    yield Constant("kShareBytes", size, "what a warp's keys come to: O, and three numbers a row, in f32")


_BARRIERS = {
    1: "named barriers, one a warpgroup, at which its own threads meet",
    2: "named barriers, one a warpgroup, at which it waits for its turn",
}
"""By how many warpgroups meet at each."""


def _wgmmas(plan: KernelPlan) -> list[str]:
    """One function for every shape of wgmma that the plan's Steps issue."""
    of_wgmma = macros("wgmma.cuh.j2")
    found = {}
    for step in walk(plan.worker.program):
        if isinstance(step, IssueGemm):
            in_registers, cols = isinstance(step.a, RegTile), step.acc.cols
            macro = of_wgmma.registers_shared if in_registers else of_wgmma.shared_shared
            if not (in_registers or step.b_is_transposed):
                macro = of_wgmma.shared_shared_rows
            if step.acc.shared_by == "columns":
                cols //= plan.worker.warpgroups
            found[macro.name, cols] = macro(cols, plan.inputs)
            if step.kept is not None:
                found["kept", cols] = of_wgmma.registers_shared_columns(cols, plan.inputs)
    return [str(text).strip("\n") for text in found.values()]

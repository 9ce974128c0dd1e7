"""A kernel plan -> one readable .cu file: the frame of templates/kernel.cu.j2 around the programs of the roles."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2

from attngen.emit import tile
from attngen.emit.device import used_by
from attngen.emit.environment import emission_environment
from attngen.emit.pairs import pair_functions, table_texts
from attngen.emit.sheets import emit_quantizing, sheet_text
from attngen.errors import InternalError
from attngen.plan import FillTables, KernelPlan, Sheet, walk
from attngen.plan.steps import IssueOutputGemm, IssueScoreGemm
from attngen.version import __version__


class Constant(NamedTuple):
    """A `constexpr int` of the emitted file and the field it comes from."""

    name: str
    value: int
    origin: str


def emit_module(kernels: Sequence[KernelPlan | Sheet]) -> str:
    """The CUDA C++ text of the kernels of one module of a call."""
    plan = next((kernel for kernel in kernels if isinstance(kernel, KernelPlan)), None)
    sheets = [kernel for kernel in kernels if isinstance(kernel, Sheet)]
    return emit_quantizing(sheets) if plan is None else emit(plan)


def emit(plan: KernelPlan) -> str:
    """The CUDA C++ text of a plan, and of the kernel that fills its tables. The same plan gives the same bytes.

    Raises:
        InternalError: the plan's arch runs on the simulator only.
    """
    if not plan.arch.emits:
        raise InternalError(f"nothing is emitted for {plan.arch.name}")
    env = emission_environment(plan)
    scheduler: Any = env.get_template("scheduler.cuh.j2").module
    frame = env.get_template("kernel.cu.j2")
    body = frame.render(
        plan=plan,
        kernel=plan,
        version=__version__,
        constants=_constants(plan),
        tile=str(scheduler.tile(plan.scheduler, tile.fields(plan.scheduler))).strip("\n"),
        scheduler=str(
            scheduler.decode(plan.scheduler, tile.count(plan.scheduler), tile.decoding(plan.scheduler))
        ).strip("\n"),
        pair_functions=pair_functions(plan, env),
        table_kernel=table_kernel(plan, env),
    )
    head, _, rest = body.partition(_THIS_KERNEL)
    return head + "\n\n".join(used_by(rest, _wgmmas(plan, env))) + "\n\n" + _THIS_KERNEL + rest


def table_kernel(plan: KernelPlan, env: jinja2.Environment) -> str:
    """The kernel that fills the tables of a plan; nothing where it has none."""
    return sheet_text(env, FillTables(plan), tables=table_texts(plan)) if plan.tables else ""


_THIS_KERNEL = "// ---- this kernel"


def _constants(plan: KernelPlan) -> tuple[Constant, ...]:
    worker = plan.worker
    is_specialised = len(plan.roles) > 1
    if is_specialised:
        padding = (f"padded to {plan.arch.k_step(plan.inputs)}, the k of wgmma", "columns of O")
        producers = plan.roles[1].warps
        threads = f"{worker.warpgroups} consumer warpgroups of 128, and the producer's {producers} warps"
    else:
        padding = (f"padded to {plan.arch.mma.k}, the k of mma.sync", "padded likewise")
        threads = f"schedule.warps = {plan.warps}"
    return (
        Constant("kBlockM", plan.block_m, "tile.block_m: query rows of a block"),
        Constant("kBlockN", plan.block_n, "tile.block_n: keys of a block"),
        Constant("kHeadDimQk", plan.head_dim_qk, "problem.head_dim.qk"),
        Constant("kHeadDimV", plan.head_dim_v, "problem.head_dim.v"),
        Constant("kQkCols", plan.qk_cols, padding[0]),
        Constant("kVCols", plan.v_cols, padding[1]),
        Constant("kStages", plan.stages, "schedule.stages: K and V blocks in shared memory"),
        Constant("kThreads", plan.threads, threads),
        Constant("kRowTiles", plan.row_tiles, "16-row tiles that each warp owns"),
    )


def _wgmmas(plan: KernelPlan, env: jinja2.Environment) -> list[str]:
    """One function for every shape of wgmma that the plan's Steps issue."""
    macros: Any = env.get_template("wgmma.cuh.j2").module
    found = {}
    for step in walk(plan.worker.program):
        if isinstance(step, IssueScoreGemm):
            found["score", step.acc.cols] = macros.shared_shared(step.acc.cols, plan.inputs)
        elif isinstance(step, IssueOutputGemm):
            found["output", step.acc.cols] = macros.registers_shared(step.acc.cols, plan.inputs)
    return [str(text).strip("\n") for text in found.values()]

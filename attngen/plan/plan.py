"""The Plan: everything lowering decided, from which the kernel is emitted and simulated.

It holds one or more kernels, the workspaces between them and the launches in order. Sizes that change from call
to call appear as `Formula`s over the run-time values of `RUNTIME_SIZES`; all other numbers are final.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from attngen.arch import Arch
from attngen.dtypes import DType
from attngen.expr import Declarations, Expr, Table, TileClasses, name
from attngen.plan.places import Buffer, Cursor, Descales, RegTile, RegVec, Ring, Rows, Tensor
from attngen.plan.steps import Program

if TYPE_CHECKING:
    from attngen.plan.quantizer import Quantizer

Formula = int | str | dict[str, Any]
"""An integer, the name of a run-time value, or {"op": one of FORMULA_OPS, "args": [...]}."""

FORMULA_OPS: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "ceil_div": lambda a, b: -(-a // b),
    "max": max,
    "min": min,
}

RUNTIME_SIZES = ("batch", "seqlen_q", "seqlen_k", "num_heads_q", "num_heads_kv", "group", "num_sms")
"""Run-time values that a formula may name; group = num_heads_q // num_heads_kv, num_sms of the GPU at hand."""


def evaluate_formula(formula: Formula, values: Mapping[str, int]) -> int:
    """The value of a formula; operators take two or more arguments, from the left."""
    if isinstance(formula, int):
        return formula
    if isinstance(formula, str):
        return values[formula]
    first, *rest = (evaluate_formula(argument, values) for argument in formula["args"])
    for argument in rest:
        first = FORMULA_OPS[formula["op"]](first, argument)
    return first


def formula_text(formula: Formula) -> str:
    """A formula as people read it: ceil_div(seqlen_k, 128)."""
    if isinstance(formula, dict):
        return f"{formula['op']}({', '.join(map(formula_text, formula['args']))})"
    return str(formula)


def product(*factors: Formula) -> Formula:
    """The formula that multiplies its arguments."""
    return {"op": "mul", "args": list(factors)}


def total(*terms: Formula) -> Formula:
    """The formula that adds its arguments."""
    return {"op": "add", "args": list(terms)}


def minimum(*values: Formula) -> Formula:
    """The formula of the smallest of its arguments."""
    return {"op": "min", "args": list(values)}


def maximum(*values: Formula) -> Formula:
    """The formula of the largest of its arguments."""
    return {"op": "max", "args": list(values)}


def ceil_div(a: Formula, b: Formula) -> Formula:
    """The formula that divides and rounds up."""
    return {"op": "ceil_div", "args": [a, b]}


@dataclass(frozen=True)
class KeyBlocks:
    """Which keys a block of query rows may and must see: bounds over the rows q_idx.first .. q_idx.last, as trees.

    A key block is visited from `first_any` on and before `end_any`; it needs no mask from `first_all` on and
    before `end_all`. Each tuple holds keys of which the strictest counts; empty means no bound but 0 and seqlen_k.

    Attributes:
        last_is_masked: the program peels the last block off and masks it, so it is never counted as free of a mask.
    """

    first_any: tuple[Expr, ...] = ()
    first_all: tuple[Expr, ...] = ()
    end_any: tuple[Expr, ...] = ()
    end_all: tuple[Expr, ...] = ()
    last_is_masked: bool = False


@dataclass(frozen=True)
class Scheduler:
    """Which tiles a block works on.

    Attributes:
        kind: "query_blocks", one block of query rows of one head; "heads", one whole head.
        longest_first: blocks of rows that see the most keys (the last ones) start first.
        persistent: a block works on many tiles, each drawn from a counter in device memory when it is due.
    """

    kind: Literal["query_blocks", "heads"]
    longest_first: bool = False
    persistent: bool = False


@dataclass(frozen=True)
class Role:
    """Warps that run one program, and what is private to them.

    Attributes:
        warpgroups: how many groups of warps run the program, each on rows of its own; one where the warps do not
            divide the work by groups.
        registers: registers a thread holds after setmaxnreg, or None where the launch decides.
        single_thread: one thread runs the program, the others idle.
    """

    name: str
    warps: int
    program: Program
    reg_tiles: tuple[RegTile, ...] = ()
    reg_vecs: tuple[RegVec, ...] = ()
    cursors: tuple[Cursor, ...] = ()
    warpgroups: int = 1
    registers: int | None = None
    single_thread: bool = False

    @property
    def accumulator_registers(self) -> int:
        """32-bit registers that a thread's accumulators take."""
        tiles = (tile for tile in self.reg_tiles if tile.layout == "accumulator")
        return sum(tile.registers_per_thread(self.warps) for tile in tiles)

    @property
    def tile_registers(self) -> int:
        """32-bit registers a thread spends on tiles, where no two share a register."""
        return sum(tile.registers_per_thread(self.warps) for tile in self.reg_tiles)


@dataclass(frozen=True)
class Param:
    """A field of the kernel's parameter struct: its C type and the run-time value it carries."""

    name: str
    ctype: Literal["pointer", "i64", "i32", "f32", "tensor_map"]
    value: str


@dataclass(frozen=True)
class TensorMap:
    """How the copy engine sees a tensor: (cols, seqlen, heads, batch), fastest first, in boxes of one head's rows.

    Attributes:
        tensor: whose; `value` of the parameter that carries it is "map.<tensor>".
        box_rows, box_cols: of one copy; box_cols spans 128 bytes, which are swizzled.
    """

    tensor: Tensor
    box_rows: int
    box_cols: int


@dataclass(frozen=True)
class KernelPlan:
    """One kernel: places, roles and their programs."""

    name: str
    scheduler: Scheduler
    roles: tuple[Role, ...]
    buffers: tuple[Buffer, ...]
    params: tuple[Param, ...]
    blocks_per_sm: int
    smem_bytes: int
    rings: tuple[Ring, ...] = ()
    rings_offset: int = 0
    tensor_maps: tuple[TensorMap, ...] = ()

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * sum(role.warps for role in self.roles)

    @property
    def worker(self) -> Role:
        """The role that computes."""
        return self.roles[0]

    def ring_offset(self, ring: Ring) -> int:
        """Where in shared memory the mbarriers of a ring start: `full` of every stage, then `empty`."""
        before = self.rings[: self.rings.index(ring)]
        return self.rings_offset + sum(other.size_bytes for other in before)

    @property
    def tile_slot_offset(self) -> int:
        """Where in shared memory the number of the next tile stands, after the mbarriers."""
        return self.rings_offset + sum(ring.size_bytes for ring in self.rings)


@dataclass(frozen=True)
class Workspace:
    """Device memory that a call needs beside its outputs, f32, uninitialised."""

    name: str
    shape: tuple[Formula, ...]


@dataclass(frozen=True)
class Launch:
    """One kernel launch on a one-dimensional grid.

    Attributes:
        grid: blocks.
        tiles: what they work on, together.
    """

    kernel: str
    grid: Formula
    tiles: Formula


@dataclass(frozen=True)
class TableKernel:
    """The kernel that works out the extremes of lookups over each block of rows or keys, before the attention kernel.

    Block i of threads works on entry i of every table that has one.

    Attributes:
        params: those of the attention kernel.
        tables: what is worked out; each has two workspaces, `<name>_lo` and `<name>_hi`.
    """

    name: str
    params: tuple[Param, ...]
    tables: tuple[Table, ...]
    grid: Formula
    threads: int = 128


@dataclass(frozen=True)
class Plan:
    """What a spec became on an arch.

    Attributes:
        name: entry name of the attention kernel; facts first, digest last.
        spec_name, spec_digest, mask_text: of the spec it came from.
        mask, score: what is computed of each pair of query and key.
        score_factor: the constant factor of the score that is left to the exponentials.
        tile_classes: how blocks of keys are classed; None where `key_blocks` has them in closed form.
        key_blocks: see `tile_classes`.
        declarations: the spec's scalars and tensors that mask and score read.
        qk_cols, v_cols: head dims padded to the matrix instruction.
        row_tiles: how many instruction-high row tiles each warp owns.
        warps: of the role that computes.
        overlap: whether the scores of a block are computed under the output of the one before.
        scales: of e4m3 Q, K and V; empty for others.
        quantizer: the kernels that make e4m3 operands of 16-bit tensors.
        table_kernel: what fills the tables that `tile_classes` reads, if it reads any.
        up_to: most keys of the calls that this plan is for; None for any.
        shorter: plans for calls of fewer keys, the fewest first; the first whose `up_to` suffices takes the call.
    """

    name: str
    spec_name: str
    spec_digest: str
    arch: Arch
    inputs: DType
    output: DType
    head_dim_qk: int
    head_dim_v: int
    mask: Expr
    mask_text: str
    score: Expr
    score_factor: float
    tile_classes: TileClasses | None
    declarations: Declarations
    schedule: str
    block_m: int
    block_n: int
    stages: int
    warps: int
    qk_cols: int
    v_cols: int
    row_tiles: int
    overlap: bool
    key_blocks: KeyBlocks | None
    tensors: tuple[Tensor, ...]
    rows: tuple[Rows, ...]
    kernels: tuple[KernelPlan, ...]
    workspaces: tuple[Workspace, ...]
    launches: tuple[Launch, ...]
    scales: tuple[Descales, ...] = ()
    quantizer: "Quantizer | None" = None
    table_kernel: TableKernel | None = None
    up_to: int | None = None
    shorter: tuple["Plan", ...] = ()

    @property
    def has_score(self) -> bool:
        """Whether the spec's score is anything but the scaled product."""
        return self.score is not name("score")

    @property
    def kernel(self) -> KernelPlan:
        """The attention kernel itself."""
        return self.kernels[0]

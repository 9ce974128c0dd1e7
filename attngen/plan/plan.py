"""The Plan: everything lowering decided, from which the kernel is emitted and simulated.

It holds one or more kernels, the workspaces between them and the launches in order. Sizes that change from call
to call appear as `Formula`s over the run-time values of `RUNTIME_VALUES`; all other numbers are final.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from attngen.arch import Arch
from attngen.dtypes import DType
from attngen.expr import Expr
from attngen.plan.places import Buffer, Cursor, RegTile, RegVec, Rows, Tensor
from attngen.plan.steps import Program

Formula = int | str | dict[str, Any]
"""An integer, the name of a run-time value, or {"op": one of FORMULA_OPS, "args": [...]}."""

FORMULA_OPS: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "ceil_div": lambda a, b: -(-a // b),
    "max": max,
    "min": min,
}

RUNTIME_SIZES = ("batch", "seqlen_q", "seqlen_k", "num_heads_q", "num_heads_kv", "group")
"""Run-time values that a formula may name; group = num_heads_q // num_heads_kv."""


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


def product(*factors: Formula) -> Formula:
    """The formula that multiplies its arguments."""
    return {"op": "mul", "args": list(factors)}


def ceil_div(a: Formula, b: Formula) -> Formula:
    """The formula that divides and rounds up."""
    return {"op": "ceil_div", "args": [a, b]}


@dataclass(frozen=True)
class KeyBlocks:
    """Which keys a block of query rows may and must see: bounds over the rows q_first .. q_last, as trees.

    A key block is visited from `first_any` on and before `end_any`; it needs no mask from `first_all` on and
    before `end_all`. Each tuple holds keys of which the strictest counts; empty means no bound but 0 and seqlen_k.
    Without a closed form (`exact` False) every block of the sequence is visited and masked.
    """

    first_any: tuple[Expr, ...] = ()
    first_all: tuple[Expr, ...] = ()
    end_any: tuple[Expr, ...] = ()
    end_all: tuple[Expr, ...] = ()
    exact: bool = True


@dataclass(frozen=True)
class Scheduler:
    """Which tiles a block works on.

    Attributes:
        kind: "query_blocks", one block of query rows of one head; "heads", one whole head.
        longest_first: blocks of rows that see the most keys (the last ones) start first.
    """

    kind: Literal["query_blocks", "heads"]
    longest_first: bool = False


@dataclass(frozen=True)
class Role:
    """Warps that run one program."""

    name: str
    warps: int
    program: Program


@dataclass(frozen=True)
class Param:
    """A field of the kernel's parameter struct: its C type and the run-time value it carries."""

    name: str
    ctype: Literal["pointer", "i64", "i32", "f32"]
    value: str


@dataclass(frozen=True)
class KernelPlan:
    """One kernel: places, roles and their programs."""

    name: str
    scheduler: Scheduler
    roles: tuple[Role, ...]
    buffers: tuple[Buffer, ...]
    reg_tiles: tuple[RegTile, ...]
    reg_vecs: tuple[RegVec, ...]
    cursors: tuple[Cursor, ...]
    params: tuple[Param, ...]
    blocks_per_sm: int
    smem_bytes: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * sum(role.warps for role in self.roles)

    @property
    def accumulator_registers(self) -> int:
        """32-bit registers a thread spends on tiles, where no two share a register."""
        (role,) = self.roles
        return sum(tile.registers_per_thread(role.warps) for tile in self.reg_tiles)


@dataclass(frozen=True)
class Workspace:
    """Device memory that a call needs beside its outputs, f32, uninitialised."""

    name: str
    shape: tuple[Formula, ...]


@dataclass(frozen=True)
class Launch:
    """One kernel launch on a one-dimensional grid."""

    kernel: str
    grid: Formula


@dataclass(frozen=True)
class Plan:
    """What a spec became on an arch.

    Attributes:
        name: entry name of the attention kernel; facts first, digest last.
        spec_name, spec_digest, mask_text: of the spec it came from.
        qk_cols, v_cols: head dims padded to the matrix instruction.
        row_tiles: how many instruction-high row tiles each warp owns.
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
    schedule: str
    block_m: int
    block_n: int
    stages: int
    warps: int
    qk_cols: int
    v_cols: int
    row_tiles: int
    key_blocks: KeyBlocks
    tensors: tuple[Tensor, ...]
    rows: tuple[Rows, ...]
    kernels: tuple[KernelPlan, ...]
    workspaces: tuple[Workspace, ...]
    launches: tuple[Launch, ...]

    @property
    def kernel(self) -> KernelPlan:
        """The attention kernel itself."""
        return self.kernels[0]

"""The strict Jinja environment: undefined names, None and containers are errors, and the filters name things.

Templates decide which statements exist; the filters here turn places into the names and index expressions of the
emitted text. No algorithm lives here.
"""

import math
import textwrap
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any

import jinja2
from jinja2.bccache import Bucket

from attngen.emit import tile
from attngen.emit.pairs import score_terms
from attngen.errors import InternalError
from attngen.plan import (
    KEYS,
    ROWS,
    BlockIndex,
    Buffer,
    Cursor,
    KernelPlan,
    Param,
    Program,
    RegTile,
    Role,
    Rows,
    Tensor,
    View,
    walk,
)
from attngen.plan.steps import Exponentiate, FinishRows, ModifyScores, PassTurn, RowMax, SeedScores
from attngen.resources import templates_dir

_ELEMENTS = {"f16": "F16", "bf16": "Bf16", "e4m3": "E4m3"}
_PAIRS = {"f16": "F16Pair", "bf16": "Bf16Pair"}
"""Two neighbouring elements of a source that is quantised."""
_C_TYPES = {"i64": "i64", "i32": "int", "f32": "float", "tensor_map": "TensorMap"}
_POINTEES = {**dict.fromkeys(("q.ptr", "k.ptr", "v.ptr", "out.ptr"), "u16"), "counter.ptr": "u32"}
_TENSOR_POINTEES = {
    **dict.fromkeys(("bool", "u8"), "unsigned char"),
    **dict.fromkeys(("f16", "bf16"), "u16"),
    "i32": "int",
    "f32": "float",
}
_CONDITIONS = {
    "tile has blocks": "seen.n_max > seen.n_min",
    "scale is negative": "params.scale_is_negative",
    "last warpgroup": "next_warpgroup == 0",
}
_BLOCK_SIZES = {"q": "kBlockM", "k": "kBlockN"}
_INDEX_BASES = {
    "m": "m",
    "n": "n",
    "m_block": "tile.m_block",
    "zero": "0",
    "m_max": "m_max",
    "n_end": "n_end",
    "visit.n": "visit.n",
    "visit.before": "visit.before",
    "load.n": "load.n",
}


def finalize(value: Any) -> Any:
    """What may stand in emitted text: bool becomes true or false; None, nan and containers are refused."""
    if isinstance(value, bool):
        return "true" if value else "false"
    bad = value is None or isinstance(value, tuple | list | dict | set)
    if bad or (isinstance(value, float) and not math.isfinite(value)):
        raise InternalError(f"a template would print {value!r}")
    return value


class _CompiledTemplates(jinja2.BytecodeCache):
    """What templates were compiled to, for all environments of a process: each plan has one of its own."""

    def __init__(self) -> None:
        self._codes: dict[tuple[str, str], CodeType] = {}

    def load_bytecode(self, bucket: Bucket) -> None:
        """Fill the bucket of a template, if it is known as it now is."""
        bucket.code = self._codes.get((bucket.key, bucket.checksum))

    def dump_bytecode(self, bucket: Bucket) -> None:
        """Remember what is in a bucket."""
        if bucket.code is not None:
            self._codes[bucket.key, bucket.checksum] = bucket.code


_COMPILED = _CompiledTemplates()


def strict_environment() -> jinja2.Environment:
    """An environment over `templates/` in which nothing is forgiven."""
    env = jinja2.Environment(
        bytecode_cache=_COMPILED,
        loader=jinja2.FileSystemLoader(templates_dir()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=finalize,
    )
    env.filters["pair"] = _PAIRS.__getitem__
    return env


STEP_FILES = ("control", "sync", "copies", "gemm", "softmax", "scales", "warpgroups")


def step_macros(env: jinja2.Environment) -> dict[str, Callable[..., str]]:
    """The macro of every Step, by the Step's name."""
    modules = (env.get_template(f"steps/{file}.cuh.j2").module for file in STEP_FILES)
    return {name: macro for module in modules for name, macro in vars(module).items() if name[0].isupper()}


def emission_environment(plan: KernelPlan) -> jinja2.Environment:
    """The environment for one plan, with the filters that its templates use."""
    env = strict_environment()
    sees = "key_blocks(params, tile, m).visits(n)" if plan.key_blocks else "visits(params, tile, m, n)"
    pointees = _POINTEES | {
        f"tensor.{tensor.name}.ptr": _TENSOR_POINTEES[tensor.dtype]
        for tensor in plan.declarations.tensors.values()
    }
    pointees |= {
        f"{plan.table_values[end]}.ptr": "float" if table.lookup.type == "f32" else "int"
        for table in plan.tables
        for end in table.ends
    }
    conditions = _CONDITIONS | {"m sees n": sees}

    def program(steps: Program, indent: int = 2) -> str:
        text = "".join(str(macros[type(step).__name__](step=step)) for step in steps)
        return textwrap.indent(text, " " * indent).rstrip("\n")

    def role(of: Role) -> str:
        return str(getattr(env.get_template("role.cuh.j2").module, of.name)(of)).strip("\n")

    env.filters.update(
        program=program,
        role=role,
        reads_score_terms=lambda of: (
            bool(score_terms(plan.score))
            and any(isinstance(step, ModifyScores | SeedScores) for step in walk(of))
        ),
        reads_tanh=lambda of: any(isinstance(step, ModifyScores) and step.by_tanh for step in walk(of)),
        takes_turns=lambda of: any(isinstance(step, PassTurn) for step in walk(of.program)),
        element=lambda dtype: _ELEMENTS[dtype.name],
        score_scale=_score_scale,
        condition=lambda condition: conditions[condition],
        barrier=_barrier,
        tile_type=_tile_type,
        smem=_smem,
        index=_index,
        first_row=_first_row,
        head=_head,
        declaration=lambda place: _declaration(place, pointees),
        rows_name=_rows_name,
        cols_name=_cols_name,
        valid_name=lambda buffer: "kHeadDimQk" if buffer.name in ("q", "k") else "kHeadDimV",
    )
    env.globals.update(
        scheduler=plan.scheduler,
        m_blocks=tile.blocks(ROWS),
        n_blocks=tile.blocks(KEYS),
        walks=plan.tile_classes is not None,
        by_warp=any(role.name == "producer" and not role.single_thread for role in plan.roles),
        has_score_terms=bool(score_terms(plan.score)),
    )
    macros = step_macros(env)
    return env


def _score_scale(step: RowMax | Exponentiate | FinishRows) -> str:
    """What the softmax multiplies scores by."""
    if step.is_scaled:
        return "1.f"
    given = None if isinstance(step, FinishRows) else step.scale
    return given.name if given else "params.softmax_scale_log2"


def _tile_type(place: Buffer | View) -> str:
    buffer = place.buffer if isinstance(place, View) else place
    return f"{buffer.name.capitalize()}Tile"


def _rows_name(buffer: Buffer) -> str:
    if buffer.transposed:
        return "kVCols"
    return "kBlockN" if buffer.name in ("k", "v") else "kBlockM"


def _cols_name(buffer: Buffer) -> str:
    if buffer.transposed:
        return "kBlockN"
    return "kQkCols" if buffer.name in ("q", "k") else "kVCols"


def _smem(view: View) -> str:
    base = f"{view.buffer.name}_smem"
    if view.cursor is None or view.cursor.stages == 1:
        return base
    stage = f"{view.cursor.name}.stage" if view.cursor.ring else view.cursor.name
    is_tile = view.buffer.dtype.bits <= 16
    return f"{base} + {stage} * {f'{_tile_type(view)}::kBytes' if is_tile else view.buffer.stage_bytes}"


def _barrier(cursor: Cursor, which: str) -> str:
    """The mbarrier ("full" or "empty") of the stage that a cursor stands at."""
    assert cursor.ring is not None
    return f"{which}<{cursor.stages}>({cursor.ring.name}_ring, {cursor.name})"


def _index(block: BlockIndex) -> str:
    base = _INDEX_BASES.get(block.base, f"seen.{block.base}")
    return str(block).replace(block.base if block.base != "zero" else "0", base, 1)


def _first_row(block: BlockIndex, axis: str) -> str:
    index = _index(block)
    return f"({index}) * {_BLOCK_SIZES[axis]}" if block.offset else f"{index} * {_BLOCK_SIZES[axis]}"


def _head(place: Tensor | Rows) -> str:
    """Where the rows of this tile's head start."""
    if isinstance(place, Rows):
        return f"dense_head(params.{place.name}, params, tile)"
    if place.workspace:
        return f"dense_head(params.{place.name}, params, tile, kHeadDimV)"
    base = f"params.{place.name}"
    head = "tile.kv_head" if place.heads == "kv" else "tile.head"
    return f"head_of({base}, tile.batch, {base}_stride_batch, {head}, {base}_stride_head)"


def _declaration(place: Param | RegTile, pointees: Mapping[str, str]) -> str:
    if isinstance(place, RegTile):
        if place.layout == "a_fragment":
            return f"u32 {place.name}[kRowTiles][{place.cols * place.dtype.bits // 256}][4]"
        return f"float {place.name}[kRowTiles][{place.cols // 8}][4]"
    if place.ctype == "pointer":
        return f"{pointees.get(place.value, 'float')}* {place.name}"
    return f"{_C_TYPES[place.ctype]} {place.name}"

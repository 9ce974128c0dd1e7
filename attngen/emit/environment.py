"""The strict Jinja environment: undefined names, None and containers are errors, and the filters name things.

Templates decide which statements exist; the filters here turn places into the names and index expressions of the
emitted text. No algorithm lives here.
"""

import math
import textwrap
from functools import cache
from typing import Any

import jinja2
from jinja2.runtime import Context

from attngen.dtypes import E4M3
from attngen.emit import tile_text
from attngen.emit.terms import score_terms
from attngen.errors import InternalError
from attngen.plan import (
    COUNTER,
    KEYS,
    LENGTHS,
    PADDED_ROWS,
    QUERIES,
    SINK_FORMATS,
    SINK_VALUES,
    TICKETS,
    Axis,
    BlockIndex,
    Buffer,
    Cursor,
    KernelPlan,
    NamedBarriers,
    PairMatrix,
    Param,
    PartRows,
    Program,
    QuerySums,
    RegTile,
    RegVec,
    Rows,
    Step,
    Tensor,
    View,
    page_values,
    walk,
)
from attngen.plan.steps import (
    Condition,
    Exponentiate,
    FinishRows,
    ModifyScores,
    PassTurn,
    Product,
    RecoverP,
    RowMax,
    SeedScores,
)
from attngen.resources import templates_dir

ELEMENTS = {"f16": "F16", "bf16": "Bf16", "e4m3": "E4m3", "f32": "float"}
_PAIRS = {"f16": "F16Pair", "bf16": "Bf16Pair"}
"""Two neighbouring elements of a source that is quantised."""
_C_TYPES = {"i64": "i64", "i32": "int", "f32": "float", "tensor_map": "TensorMap"}
POINTEES = {
    **dict.fromkeys(("bool", "u8"), "unsigned char"),
    **dict.fromkeys(("f16", "bf16"), "u16"),
    "i32": "int",
    "f32": "float",
}
"""C types of elements of tensors in device memory."""
_CONDITIONS: dict[Condition, str] = {
    "tile has blocks": "seen.n_max > seen.n_min",
    "scale is negative": "params.scale_is_negative",
    "last warpgroup": "next_warpgroup == 0",
    "first warp": "warp == 0",
    "tile is whole": "tile.parts == 1",
    "tile is a part": "tile.parts > 1",
    "all parts are there": "is_last",
}
_EXTENTS: dict[Axis, str] = {
    "queries": "kBlockM",
    "keys": "kBlockN",
    "qk_columns": "kQkCols",
    "v_columns": "kVCols",
}
"""How much of an axis a tile has."""
_HEAD_DIMS: dict[Axis, str] = {"qk_columns": "kHeadDimQk", "v_columns": "kHeadDimV"}
STARTS: dict[Axis, str] = {each.axis: tile_text.FIELDS[f"{each.index}.start"] for each in (QUERIES, KEYS)}
"""Where a tile's sequence starts among the rows of a tensor."""
_INDEX_BASES = {
    "m": "m",
    "n": "n",
    "m_block": "tile.m_block",
    "n_block": "tile.n_block",
    "m_stop": "seen.m_max",
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


STEP_FILES = (
    *("control", "sync", "copies", "gemm", "softmax", "shares", "gradients", "declared", "sums", "scales"),
    "cache",
    "warpgroups",
)


class Templates:
    """The templates as they are for one plan.

    Attributes:
        context: what they may name.
        steps: the macro of every Step, by the Step's name.
    """

    def __init__(self, plan: KernelPlan) -> None:
        """Take what templates ask of a plan beside the Steps they print."""
        self.context = {
            "plan": plan,
            "scheduler": plan.scheduler,
            "m_blocks": tile_text.blocks(QUERIES),
            "n_blocks": tile_text.blocks(KEYS),
            "walks": plan.tile_classes is not None,
            "by_warp": any(not role.single_thread for role in plan.roles[1:]),
            "has_score_terms": bool(score_terms(plan)),
            "pointees": _pointees(plan),
            "padded_rows": PADDED_ROWS,
            "packs": plan.scheduler.packs_group,
            "tile_number": "tile_number" if plan.scheduler.in_turn else "blockIdx.x",
            "shares_keys": plan.shares_keys,
            "score_columns": "kWarpKeys" if plan.shares_keys else "kBlockN",
            "heads_of_tiles": "(params.num_heads_q / params.group)"
            if plan.scheduler.is_for_groups
            else "params.num_heads_q",
            "all_rows": ", 0" if plan.shares_keys else "",
            "templates": self,
        }
        self.steps = {
            name: macro
            for file in STEP_FILES
            for name, macro in vars(self.module(f"steps/{file}.cuh.j2")).items()
            if name[0].isupper()
        }

    def module(self, file: str) -> Any:
        """The macros of a template."""
        return environment().get_template(file).make_module(self.context)

    def render(self, file: str, **names: Any) -> str:
        """The text of a template."""
        return environment().get_template(file).render(self.context, **names)


def _pointees(plan: KernelPlan) -> dict[str, str]:
    """The C types of what parameters point to, by the values they carry; f32 is not among them."""
    tensors = (*plan.reads, *plan.outputs)
    found = {COUNTER: "u32", TICKETS: "u32", f"{plan.tile_list}.ptr": "int4"}
    found |= {f"{each.name}.ptr": "const int" for each in plan.lengths.arguments}
    found |= {f"{each.name}.ptr": "const int" for each in page_values(plan.lengths)}
    found |= {f"{each.name}.ptr": "u16" for each in tensors if each.dtype.bits <= 16}
    found |= {f"{each.name}.ptr": "u32" for each in plan.query_ranks}
    matrices = (place for place in plan.writes if isinstance(place, PairMatrix))
    found |= {f"{place.name}.ptr": POINTEES[place.dtype.name] for place in matrices}
    for tensor in plan.declarations.tensors.values():
        found[f"tensor.{tensor.name}.ptr"] = POINTEES[tensor.dtype]
    found |= {f"{name}.ptr": POINTEES[format] for name, format in zip(SINK_VALUES, SINK_FORMATS, strict=True)}
    for table in plan.tables:
        c_type = "float" if table.lookup.type == "f32" else "int"
        found |= {f"{plan.table_values[end]}.ptr": c_type for end in table.ends}
    found |= {f"{each.name}.ptr": "int" for each in plan.boundaries}
    return found


@jinja2.pass_context
def _program(context: Context, steps: Program, indent: int = 2) -> str:
    printers = context["templates"].steps
    text = "".join(str(printers[type(step).__name__](step=step)) for step in steps)
    return textwrap.indent(text, " " * indent).rstrip("\n")


@jinja2.pass_context
def _condition(context: Context, condition: Condition) -> str:
    if condition == "m sees n":
        is_pair = context["scheduler"].kind == "pair_blocks"
        m, n = ("tile.m_block", "tile.n_block") if is_pair else ("m", "n")
        walks = context["walks"]
        return f"visits(params, tile, {m}, {n})" if walks else f"key_blocks(params, tile, {m}).visits({n})"
    return _CONDITIONS[condition]


@cache
def environment() -> jinja2.Environment:
    """The environment over `templates/`, in which nothing is forgiven."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates_dir()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=finalize,
    )
    env.filters |= {
        "pair": _PAIRS.__getitem__,
        "program": _program,
        "condition": _condition,
        "reads_scores": lambda of: any(_reads_scores(step) for step in walk(of)),
        "reads_tanh": lambda of: any(isinstance(step, ModifyScores) and step.by_tanh for step in walk(of)),
        "takes_turns": lambda of: any(isinstance(step, PassTurn) for step in walk(of.program)),
        "element": lambda dtype: ELEMENTS[dtype.name],
        "score_scale": _score_scale,
        "barrier": _barrier,
        "tile_type": _tile_type,
        "smem": _smem,
        "index": _index,
        "first_row": _first_row,
        "head": _head,
        "start": _start,
        "is_paged": _is_paged,
        "paged_rows": _paged_rows,
        "is_by_token": _is_by_token,
        "is_by_one_thread": _is_by_one_thread,
        "row_stride": _row_stride,
        "form": _form,
        "operand": _operand,
        "is_in_memory": lambda place: isinstance(place, View),
        "is_rows": lambda place: isinstance(place, Rows),
        "is_part": lambda place: isinstance(place, PartRows),
        "is_vector": lambda place: isinstance(place, RegVec),
        "is_tile": _is_tile,
        "seqlen": LENGTHS.__getitem__,
        "head_dim": _HEAD_DIMS.__getitem__,
        "columns": _columns,
        "extent": _EXTENTS.__getitem__,
        "first_barrier": first_barrier,
        "declaration": _declaration,
    }
    return env


@jinja2.pass_context
def _columns(context: Context, place: Buffer | QuerySums) -> str:
    """How many columns a place has: by the constant's name, unless it leaves room past those of a head."""
    axis, plan = place.axes[1], context["plan"]
    of_head = {"qk_columns": plan.qk_cols, "v_columns": plan.v_cols}.get(axis, place.cols)
    return _EXTENTS[axis] if place.cols == of_head else str(place.cols)


def _reads_scores(step: Step) -> bool:
    is_modified = isinstance(step, RecoverP) and step.score is not None
    return is_modified or isinstance(step, ModifyScores | SeedScores)


def macros(file: str) -> Any:
    """The macros of a template that asks nothing of a plan."""
    return environment().get_template(file).module


def _score_scale(step: RowMax | Exponentiate | FinishRows) -> str:
    """What the softmax multiplies scores by."""
    if step.is_scaled:
        return "1.f"
    given = None if isinstance(step, FinishRows) else step.scale
    return given.name if given else "params.softmax_scale_log2"


def _is_tile(place: Buffer | RegTile | RegVec) -> bool:
    """Whether it has rows and columns."""
    return len(place.axes) == 2 if isinstance(place, Buffer) else isinstance(place, RegTile)


def _tile_type(place: Buffer | View) -> str:
    buffer = place.buffer if isinstance(place, View) else place
    return f"{buffer.name.capitalize()}Tile"


def _form(product: Product) -> str:
    """Which operands are transposed, as BLAS says it (n, t), and where they are: in shared memory or registers."""
    transposed = "".join("nt"[each] for each in (product.a_is_transposed, product.b_is_transposed))
    return f"{transposed}_{'rs' if isinstance(product.a, RegTile) else 'ss'}"


def first_barrier(barriers: NamedBarriers) -> str:
    """The constant that numbers the barrier of the first warpgroup."""
    return f"k{barriers.name.capitalize()}Barrier"


@jinja2.pass_context
def _operand(context: Context, place: RegTile | View) -> str:
    return place.name if isinstance(place, RegTile) else _smem(context, place)


@jinja2.pass_context
def _smem(context: Context, view: View) -> str:
    base = f"{view.buffer.name}_smem"
    if view.own_rows and context["shares_keys"]:
        which = "warp"
        if view.cursor is not None and view.cursor.stages > 1:
            which = f"({view.cursor.name} * kWarps + warp)"
        own_bytes = view.buffer.stage_bytes // context["plan"].warps
        return f"{base} + {which} * {f'{_tile_type(view)}::kBytes' if _is_tile(view.buffer) else own_bytes}"
    if view.cursor is None or view.cursor.stages == 1:
        return base
    stage = f"{view.cursor.name}.stage" if view.cursor.ring else view.cursor.name
    size = f"{_tile_type(view)}::kBytes" if _is_tile(view.buffer) else view.buffer.stage_bytes
    return f"{base} + {stage} * {size}"


def _barrier(cursor: Cursor, which: str) -> str:
    """The mbarrier ("full" or "empty") of the stage that a cursor stands at."""
    assert cursor.ring is not None
    ring = f"{cursor.ring.name}_ring"
    if cursor.ring.copies > 1:
        ring += f" + warpgroup * {cursor.ring.size_bytes // cursor.ring.copies}"
    return f"{which}<{cursor.stages}>({ring}, {cursor.name})"


def _index(block: BlockIndex) -> str:
    base = _INDEX_BASES.get(block.base, f"seen.{block.base}")
    return str(block).replace(block.base if block.base != "zero" else "0", base, 1)


@jinja2.pass_context
def _first_row(context: Context, block: BlockIndex, axis: Axis) -> str:
    """The first row of a block, of keys that warps share out the first of the warp's own."""
    index = _index(block)
    first = f"({index}) * {_EXTENTS[axis]}" if block.offset else f"{index} * {_EXTENTS[axis]}"
    return f"{first} + warp * kWarpKeys" if axis == "keys" and context["shares_keys"] else first


@jinja2.pass_context
def _head(context: Context, place: Tensor | Rows) -> str:
    """Where the rows of this tile's sequence and head start."""
    if isinstance(place, Rows) and place.axis == "keys":
        head = "(i64)stay_in_loop(tile.batch) * params.num_heads_q + stay_in_loop(tile.head)"
        return f"params.{place.name} + ({head}) * params.seqlen_k"
    if isinstance(place, Rows):
        return f"{'padded' if place.is_padded else 'dense'}_head(params.{place.name}, params, tile)"
    if place.workspace:
        return f"dense_head(params.{place.name}, params, tile, {_HEAD_DIMS[place.axes[1]]})"
    base = f"params.{place.name}"
    head = "tile.kv_head" if place.heads == "kv" else "tile.head"
    start, row, step = _start(context, place), _row_stride(place), _stride(place, "head")
    if _is_by_token(context, place):
        return f"head_of({base}, {start}, {row}, {head}, {step})"
    batched = f"head_of({base}, tile.batch, {_stride(place, 'batch')}, {head}, {step})"
    return f"{batched} + stay_in_loop({start}) * {row}" if start else batched


@jinja2.pass_context
def _is_paged(context: Context, place: Tensor) -> bool:
    """Whether its rows lie in pages."""
    return bool(context["plan"].lengths.is_paged(place.axis))


def _paged_rows(place: Tensor) -> str:
    """Where the rows of this tile's sequence and head lie in a cache of pages."""
    cache = f"params.{place.name}"
    strides = ", ".join(_stride(place, axis) for axis in ("page", "seqlen", "head"))
    return f"paged_rows(params, tile, {cache}, {strides})"


@jinja2.pass_context
def _start(context: Context, place: Tensor | Rows) -> str:
    """Where the tile's sequence starts among the rows of a tensor; nothing where that is the first."""
    is_dense = context["plan"].lengths.of(place.axis) == "dense"
    return "" if is_dense else STARTS[place.axis]


@jinja2.pass_context
def _is_by_one_thread(context: Context, step: Step) -> bool:
    """Whether one thread runs a Step; else whole warps do."""
    return any(role.single_thread and step in walk(role.program) for role in context["plan"].roles)


@jinja2.pass_context
def _is_by_token(context: Context, place: Tensor | Rows) -> bool:
    """Whether a tensor has no batches."""
    return bool(context["plan"].lengths.is_by_token(place.axis))


def _row_stride(tensor: Tensor) -> str:
    """Elements from a row of a head to the next."""
    return _HEAD_DIMS[tensor.axes[1]] if tensor.workspace else _stride(tensor, "seqlen")


def _stride(tensor: Tensor, axis: str) -> str:
    """From one to the next along an axis, in elements; of e4m3 in pairs, which addresses of tensors count by."""
    stride = f"params.{tensor.name}_stride_{axis}"
    return f"{stride} / 2" if tensor.dtype is E4M3 else stride


@jinja2.pass_context
def _declaration(context: Context, place: Param | RegTile) -> str:
    if isinstance(place, RegTile):
        if place.layout == "a_fragment":
            return f"u32 {place.name}[kRowTiles][{place.cols * place.dtype.bits // 256}][4]"
        owners = context["plan"].worker.warpgroups if place.shared_by == "columns" else 1
        shape = f"[kRowTiles][{place.cols // owners // 8}][4]"
        if place.overlays is not None:
            return f"float (&{place.name}){shape} = {place.overlays.name}"
        return f"float {place.name}{shape}"
    if place.ctype == "pointer":
        return f"{context['pointees'].get(place.value, 'float')}* {place.name}"
    return f"{_C_TYPES[place.ctype]} {place.name}"

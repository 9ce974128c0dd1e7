"""Sheets -> the text of their kernels: of tables for an attention kernel's file, of the others a file of their own."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from attngen.dtypes import F32
from attngen.emit.device import used_by
from attngen.emit.environment import ELEMENTS, POINTEES, macros
from attngen.emit.lookups import boundary_texts, finding_functions
from attngen.plan import (
    BUCKETS,
    LENGTHS,
    LETTERS,
    MOST_BLOCKS,
    PADDED_ROWS,
    ROW_NUMBERS,
    SINK_FORMATS,
    SINK_VALUES,
    WIDTHS_OF_ONE_WAVE,
    FindBoundaries,
    FindMaxima,
    FinishSums,
    Formula,
    KernelPlan,
    ListTiles,
    MapBlocks,
    PackValues,
    Param,
    PrepareRows,
    Quantize,
    QueryRanks,
    Rows,
    Sheet,
    SumRows,
    SumSink,
    field_of,
)
from attngen.quantize import DESCALES

_C_TYPES = {"i64": "i64", "i32": "int", "f32": "float"}


SHEET_FILES = ("tables", "boundaries", "tiles", "quantize", "rows", "finish", "sums", "sinks", "blocks")


def sheet_macros() -> dict[str, Callable[..., str]]:
    """The macro of every sheet, by the sheet's name."""
    modules = (macros(f"sheets/{file}.cuh.j2") for file in SHEET_FILES)
    return {name: macro for module in modules for name, macro in vars(module).items() if name[0].isupper()}


def sheet_text(sheet: Sheet, **beside: Any) -> str:
    """One kernel, by the macro that has its sheet's name."""
    return str(sheet_macros()[type(sheet).__name__](sheet, **beside)).strip("\n")


def emit_quantizing(sheets: Sequence[Sheet]) -> str:
    """A file of nothing but kernels that make e4m3 operands, in a namespace of their own."""
    text = quantizing_functions(sheets)
    return "\n\n".join([*used_by(text), text]) + "\n"


def quantizing_functions(sheets: Sequence[Sheet]) -> str:
    """The kernels, in their namespace; `used_by` has what they call."""
    known = [sheet for sheet in sheets if isinstance(sheet, FindMaxima | Quantize | PackValues)]
    quantizer = known[0].quantizer
    factor = f"{quantizer.head_dim_qk**-0.5:.9g}f"
    head = macros("sheets/quantize.cuh.j2").device(quantizer, list(_declarations(known[0].params)), factor)
    kernels = (sheet_text(sheet) for sheet in known)
    return "\n\n".join([str(head).strip("\n"), *kernels, "}  // namespace quantizer"])


def emit_rows(sheet: PrepareRows) -> str:
    """A file of nothing but the kernel that prepares rows, in a namespace of its own."""
    pointees = {each.name: "const int" for each in sheet.plan.lengths.arguments}
    pointees |= {"out": "const float"} if sheet.plan.output is F32 else {}
    pointees |= {each.name: "u32" if isinstance(each, QueryRanks) else "float" for each in sheet.cleared}
    declarations = list(_declarations(sheet.params, pointees))
    text = sheet_text(sheet, declarations=declarations, padded_rows=PADDED_ROWS)
    return "\n\n".join([*used_by(text), text]) + "\n"


def emit_finish(sheet: FinishSums) -> str:
    """A file of nothing but the kernel that makes a gradient of sums, in a namespace of its own."""
    pointees = {sheet.sums.name: "const float", **{each.name: "const int" for each in sheet.starts}}
    pointees |= {each.name: "float" if each.dtype is F32 else "u16" for each in sheet.results}
    text = sheet_text(
        sheet,
        declarations=list(_declarations(sheet.params, pointees)),
        padded_rows=PADDED_ROWS,
        cols=sheet.sums.cols,
        valid_cols=sheet.results[0].cols,
        owners=sheet.plan.worker.warpgroups,
    )
    return "\n\n".join([*used_by(text), text]) + "\n"


def emit_boundaries(sheet: FindBoundaries) -> str:
    """A file of nothing but the kernel that finds boundaries, in a namespace of its own."""
    plan = sheet.plan
    pointees = {
        f"arg_{name}": f"const {POINTEES[each.dtype]}" for name, each in plan.declarations.tensors.items()
    }
    pointees |= {each.field: "int" for each in sheet.boundaries}
    text = sheet_text(
        sheet,
        declarations=list(_declarations(sheet.params, pointees)),
        functions=[str(each).strip("\n") for each in finding_functions(plan)],
        boundaries=boundary_texts(plan),
    )
    return "\n\n".join([*used_by(text), text]) + "\n"


def emit_sums(sheet: SumRows) -> str:
    """A file of nothing but the kernel that adds rows up to a gradient, in a namespace of its own."""
    names = {"b": "b", "h": "h", "h_kv": "h_kv", "q_idx": "row", "kv_idx": "row"}
    of_table = () if isinstance(sheet.sums, Rows) else sheet.site.table_dims
    dims = [
        {
            "number": number,
            "size": size if isinstance(size, int) else f"params.{field_of(str(size))}",
            "index": "entry" if number in of_table else names.get(index.name, index.value),
        }
        for number, (index, size) in enumerate(zip(sheet.site.indices, sheet.sizes, strict=True))
    ]
    kind = sheet.site.dtype
    convert = "sum" if kind == "f32" else f"(u16){ELEMENTS[kind]}::pack(sum, 0.f)"
    pointees = {"sums": "const float", "gradient": "float" if kind == "f32" else "u16"}
    declarations = [
        f"{pointees[param.name]}* {param.name}"
        if param.ctype == "pointer"
        else f"{_C_TYPES[param.ctype]} {param.name}"
        for param in sheet.params
    ]
    if isinstance(sheet.sums, Rows):
        length, entries = f"params.{LENGTHS[sheet.sums.axis]}", 1
    else:
        length, entries = (
            f"((params.seqlen_q + {sheet.sums.block_m - 1}) / {sheet.sums.block_m})",
            sheet.sums.entries,
        )
    text = sheet_text(
        sheet, declarations=declarations, dims=dims, length=length, entries=entries, convert=convert
    )
    return "\n\n".join([*used_by(text), text]) + "\n"


def emit_list(sheet: ListTiles) -> str:
    """The kernel that lists the tiles of an attention kernel, for the text that this stands in."""
    plan, own = sheet.plan, sheet.plan.scheduler.axis
    given = {each.name for each in plan.lengths.arguments}
    sequences = [
        {
            "axis": axis,
            # Of keys in pages as many fit a row of the table as padded sequences have, and as many count.
            "kind": "padded" if plan.lengths.is_paged(axis) else plan.lengths.of(axis),
            "letter": letter,
            "used": f"seqused_{letter}" if f"seqused_{letter}" in given else "",
            "skipped": f"leftpad_{letter}" if f"leftpad_{letter}" in given else "",
            "is_own": axis == (own.axis if own else "queries"),
        }
        for axis, letter in LETTERS.items()
    ]
    return sheet_text(
        sheet,
        sequences=sequences,
        block="" if own is None else "kBlockM" if own.axis == "queries" else "kBlockN",
        most_entries=_in_c(plan.most_entries),
        buckets=BUCKETS,
        most_blocks=MOST_BLOCKS,
        one_wave=WIDTHS_OF_ONE_WAVE,
        heads=_listed_heads(plan),
    )


def _listed_heads(plan: KernelPlan) -> str:
    """How many tiles an entry of its list is, in C."""
    return "(params.num_heads_q / params.group)" if plan.scheduler.is_for_groups else "params.num_heads_q"


def _in_c(formula: Formula) -> str:
    """A formula of a call's sizes as an operand in C."""
    if not isinstance(formula, dict):
        return f"params.{formula}" if isinstance(formula, str) else str(formula)
    written = [_in_c(argument) for argument in formula["args"]]
    if formula["op"] == "ceil_div":
        a, b = written
        return f"(({a} + {b} - 1) / {b})"
    if formula["op"] == "max":
        a, b = written
        return f"max({a}, {b})"
    return f"({ {'add': ' + ', 'mul': ' * '}[formula['op']].join(written) })"


def emit_blocks(sheet: MapBlocks) -> str:
    """A file of nothing but the kernel that makes a map of lists of kept blocks, in a namespace of its own."""
    pointees = {"kept": "unsigned char"}
    declarations = [
        f"{pointees.get(param.name, 'const int')}* {param.name}"
        if param.ctype == "pointer"
        else f"{_C_TYPES[param.ctype]} {param.name}"
        for param in sheet.params
    ]
    text = sheet_text(sheet, declarations=declarations)
    return "\n\n".join([*used_by(text), text]) + "\n"


def emit_sink(sheet: SumSink) -> str:
    """A file of nothing but the kernel that adds rows up to the gradient of a sink, in a namespace of its own."""
    pointees = dict.fromkeys(ROW_NUMBERS, "const float")
    for name, dtype in zip(SINK_VALUES, SINK_FORMATS, strict=True):
        pointees |= {name: f"const {POINTEES[dtype]}", f"gradient_of_{name}": POINTEES[dtype]}
    text = sheet_text(
        sheet,
        declarations=list(_declarations(sheet.params, pointees)),
        padded_rows=PADDED_ROWS,
        read_sink=sink_reader(),
    )
    return "\n\n".join([*used_by(text), text]) + "\n"


def sink_reader() -> str:
    """The function by which a kernel reads a sink."""
    return str(macros("sink.cuh.j2").read_sink()).strip("\n")


def _declarations(params: Iterable[Param], pointees: Mapping[str, str] | None = None) -> Iterable[str]:
    for param in params:
        if param.ctype == "pointer":
            yield f"{(pointees or {}).get(param.name, _pointee(param.name))}* {param.name}"
        else:
            yield f"{_C_TYPES[param.ctype]} {param.name}"


def _pointee(field: str) -> str:
    if field in ("maxima", *DESCALES, "lse", "dlse", *ROW_NUMBERS):
        return "float"
    return "unsigned char" if field.endswith("8") else "const u16"

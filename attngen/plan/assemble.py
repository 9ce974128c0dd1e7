"""A call out of its kernels: which values they read and make, the launches in order, and the manifest."""

import math
from collections.abc import Iterable, Iterator
from typing import Literal

from attngen.dtypes import E4M3, F32
from attngen.errors import InternalError
from attngen.expr import SINK
from attngen.plan.block_map import BLOCK_MAP, GIVEN_BLOCK_VALUES, MapBlocks, block_shapes, takes_blocks
from attngen.plan.call import (
    GRADIENTS_INTAKE,
    OPERANDS_INTAKE,
    Call,
    Intake,
    KernelEntry,
    Launch,
    Manifest,
    Scalar,
    TensorMapEntry,
    Value,
    in_f32,
)
from attngen.plan.declared_places import BlockTables, Elements, PairMatrix, gradient_value
from attngen.plan.formulas import Formula, ceil_div, product, total
from attngen.plan.lengths import ANY_LENGTH, LETTERS, Lengths, padded_blocks
from attngen.plan.pages import PAGES_OF_HEADS, page_values, piece_of
from attngen.plan.places import (
    LENGTHS,
    PADDED_ROWS,
    PANEL_BYTES,
    Axis,
    Descales,
    PartRows,
    QueryRanks,
    QuerySums,
    Rows,
    Tensor,
)
from attngen.plan.plan import KernelPlan, TensorMap
from attngen.plan.quantizer import Quantizer
from attngen.plan.quantizing_sheets import (
    MAXIMA,
    SOURCES,
    TENSORS,
    VALUE_ROWS,
    FindMaxima,
    PackValues,
    Quantize,
    source_of,
)
from attngen.plan.query_sums import FinishSums
from attngen.plan.row_sums import SumRows
from attngen.plan.sheets import (
    FillTables,
    FindBoundaries,
    PrepareRows,
    Sheet,
    SheetInText,
    boundary_shape,
    table_shape,
)
from attngen.plan.sinks import SINK_FORMATS, SumSink, sink_gradient, sink_value
from attngen.plan.tile_list import ListTiles
from attngen.quantize import DESCALES, KEY_BLOCK

ROWS_OF_HEADS = ("batch", "seqlen", "head", "column")
COLUMNS_OF_HEADS = ("batch", "head", "seqlen", "key")
"""Axes of a tensor whose rows are columns; strides of its rows are called as those of others."""
TOKENS_OF_HEADS = ROWS_OF_HEADS[1:]
"""Axes of a tensor in which the rows of all sequences follow one another."""


OfGradients = KernelPlan | FinishSums | SumRows | SumSink
"""A kernel of a backward pass, behind the one that prepares rows."""


def assemble(plans: Iterable[KernelPlan], gradients: Iterable[OfGradients] = ()) -> Call:
    """The call of attention kernels that take one spec's calls, by their numbers of keys.

    Args:
        plans: the one for the most keys, or for any number, takes all calls that the others do not.
        gradients: the kernels of the backward pass, each after what it reads of the others.
    """
    backward = tuple(gradients)
    programs = by_length(plans)
    plan = programs[-1]
    quantizer = plan.quantizer
    kernels: list[KernelPlan | Sheet] = [*quantizing_sheets(quantizer)] if quantizer else []
    if takes_blocks(plan):
        kernels.append(MapBlocks(plan))
    kernels += _finders((plan, *(each for each in backward if isinstance(each, KernelPlan))))
    for each in programs:
        kernels += _with_what_it_reads(each)
    if backward:
        added = (sums for each in backward if isinstance(each, KernelPlan) for sums in each.query_sums)
        kernels.append(PrepareRows(plan, next(added, None)))
    for made in backward:
        if not isinstance(made, KernelPlan):
            kernels.append(made)
            continue
        if made.arch.emits and PADDED_ROWS % made.block_m:
            raise InternalError(
                f"{made.name} reads rows in blocks of {made.block_m}, padded to {PADDED_ROWS}"
            )
        kernels += _with_what_it_reads(made)
    values = {value.name: value for value in (*_values(programs), *_values_of_gradients(plan, backward))}
    return Call(
        plan.arch,
        Manifest(
            name=plan.name,
            arch=plan.arch.name,
            head_dim_qk=plan.head_dim_qk,
            head_dim_v=plan.head_dim_v,
            inputs=plan.inputs.name,
            output=plan.output.name,
            scales=quantizer.scales if quantizer else None,
            hadamard=quantizer is not None and quantizer.hadamard_seed is not None,
            mask=plan.mask_text,
            score=str(plan.score),
            score_factor=plan.score_factor,
            spec_digest=plan.spec_digest,
            values=tuple(values.values()),
            lengths=plan.lengths,
            scalars=(
                *(Scalar(name, "i32", ANY_LENGTH) for name in plan.lengths.bounds),
                *(Scalar(s.name, s.type, s.default) for s in plan.declarations.scalars.values()),
            ),
            intakes=tuple(_with_blocks(intake, plan) for intake in _every_intake(plan, backward)),
            kernels=tuple(map(_entry, kernels)),
            launches=tuple(_launch(kernel, plan) for kernel in kernels),
        ),
        tuple(kernels),
    )


def _with_what_it_reads(plan: KernelPlan) -> list[KernelPlan | Sheet]:
    """A kernel behind those that make its tables and the list of its tiles."""
    return [
        *((FillTables(plan),) if plan.tables else ()),
        *((ListTiles(plan),) if plan.scheduler.is_listed else ()),
        plan,
    ]


def _finders(plans: Iterable[KernelPlan]) -> Iterator[FindBoundaries]:
    """What finds the boundaries that kernels read: those of one axis are the same for all of them."""
    first = {plan.boundaries: plan for plan in reversed(list(plans)) if plan.boundaries}
    yield from map(FindBoundaries, reversed(first.values()))


def by_length(plans: Iterable[KernelPlan]) -> list[KernelPlan]:
    """Attention kernels, those for the fewest keys first, that for all calls last."""
    return sorted(
        plans, key=lambda plan: (plan.guard is None, math.inf if plan.up_to is None else plan.up_to)
    )


def quantizing_sheets(quantizer: Quantizer) -> tuple[Sheet, ...]:
    """The kernels that make operands, of every format."""
    sheets: list[Sheet] = []
    for source in SOURCES:
        if quantizer.finds_maxima:
            sheets.append(FindMaxima(quantizer, source))
        sheets.append(Quantize(quantizer, source))
    return (*sheets, PackValues(quantizer))


def _every_intake(plan: KernelPlan, gradients: Iterable[OfGradients]) -> Iterator[Intake]:
    yield from _intakes(plan)
    yield from _intakes_of_gradients(gradients)


def _with_blocks(intake: Intake, plan: KernelPlan) -> Intake:
    """An intake with what says which blocks are kept, before all else that is passed by name."""
    if not takes_blocks(plan):
        return intake
    return Intake(intake.name, (*intake.tensors, *GIVEN_BLOCK_VALUES, *intake.beside))


def _intakes(plan: KernelPlan) -> Iterator[Intake]:
    if plan.quantizer:
        for source in SOURCES:
            yield Intake(source, tuple(source_of(name, source) for name in TENSORS))
        yield Intake("e4m3", ("q", "k", VALUE_ROWS, *DESCALES))
    descales = tuple(descale.name for descale in plan.every_descale)
    yield Intake(OPERANDS_INTAKE if plan.scales else plan.inputs.name, (*TENSORS, *descales))


def _intakes_of_gradients(gradients: Iterable[OfGradients]) -> Iterator[Intake]:
    """What a backward pass begins with; all of its kernels read one Q, K and V."""
    for plan in _of_inputs(gradients):
        tensors = (tensor.name for tensor in plan.reads if tensor.name != "dout")
        yield Intake(GRADIENTS_INTAKE, (*tensors, "dout", "out", "lse", "dlse"))


def _of_inputs(gradients: Iterable[OfGradients]) -> list[KernelPlan]:
    """The first kernel of a backward pass, if there is one; the others read the same inputs."""
    return [each for each in gradients if isinstance(each, KernelPlan)][:1]


def _launch(kernel: KernelPlan | Sheet, longest: KernelPlan) -> Launch:
    served = kernel.plan if isinstance(kernel, SheetInText) else kernel
    when = None
    if isinstance(served, KernelPlan) and (served is not longest or served.takes_pieces):
        when = served.guard
    if isinstance(kernel, Sheet):
        return Launch(kernel.name, kernel.grid, kernel.tiles, kernel.reads, kernel.writes, when)
    reads = (
        *(tensor.name for tensor in kernel.reads),
        *(rows.name for rows in kernel.read_rows),
        *(descale.name for descale in kernel.every_descale),
        *(f"tensor.{name}" for name in kernel.declarations.tensors),
        *kernel.table_values.values(),
        *((kernel.tile_list,) if kernel.scheduler.is_listed else ()),
    )
    writes = tuple(place.name for place in (*kernel.writes, *kernel.scratch, *kernel.parts))
    return Launch(kernel.name, kernel.grid, kernel.tiles, reads, writes, when)


def _entry(kernel: KernelPlan | Sheet) -> KernelEntry:
    program = kernel.plan if isinstance(kernel, SheetInText) else kernel  # whose struct it takes
    maps = program.tensor_maps if isinstance(program, KernelPlan) else ()
    return KernelEntry(
        kernel.name,
        kernel.module,
        kernel.threads,
        kernel.smem_bytes,
        kernel.params,
        tuple(_tensor_map(map_, program.lengths) for map_ in maps) if isinstance(program, KernelPlan) else (),
        kernel.scheduler.persistent if isinstance(kernel, KernelPlan) else kernel.repeats,
        kernel.arch.starts_early,
    )


def _tensor_map(entry: TensorMap, lengths: Lengths) -> TensorMapEntry:
    shape = value_shape(entry.tensor, lengths)
    batch, *rest = (1, *shape) if lengths.is_by_token(entry.tensor.axis) else shape
    # Of a tensor whose rows are columns the copy engine sees keys first, then columns.
    heads, rows, cols = rest if entry.tensor.is_transposed else (rest[1], rest[0], rest[2])
    box_rows: Formula = entry.box_rows
    if lengths.is_paged(entry.tensor.axis):
        box_rows = piece_of(entry.box_rows)
    box = (entry.box_cols, box_rows, 1, 1)
    return TensorMapEntry(
        entry.tensor.name, entry.tensor.dtype.name, (cols, rows, heads, batch), box, PANEL_BYTES
    )


def value_shape(
    place: Tensor | Rows | QuerySums | QueryRanks | BlockTables, lengths: Lengths
) -> tuple[Formula, ...]:
    """The shape of what stands in device memory, in the order of its axes."""
    if isinstance(place, QuerySums):
        return (*_of_padded(place.axis, PADDED_ROWS, lengths), place.cols)
    if isinstance(place, QueryRanks):
        return (*_of_padded(place.axis, PADDED_ROWS // place.block_m, lengths), place.owners)
    if isinstance(place, BlockTables):
        return ("batch", "num_heads_q", ceil_div("seqlen_q", place.block_m), place.entries)
    batch, length = _extents(place.axis, lengths)
    if isinstance(place, Rows):
        if place.is_padded:
            return _of_padded(place.axis, PADDED_ROWS, lengths)
        return (*batch, "num_heads_q", length)
    if place.is_transposed:
        return (*batch, f"num_heads_{place.heads}", place.cols, _padded(length, KEY_BLOCK))
    if lengths.is_paged(place.axis):
        return ("pages", "page_size", f"num_heads_{place.heads}", place.cols)
    return (*batch, length, f"num_heads_{place.heads}", place.cols)


def part_shape(place: PartRows, plan: KernelPlan) -> tuple[Formula, ...]:
    """The shape of what a kernel leaves of the parts of its tiles."""
    return (plan.tiles, plan.part_rows, *(() if place.cols is None else (place.cols,)))


def axes_of(tensor: Tensor, lengths: Lengths) -> tuple[str, ...]:
    """What the dimensions of a tensor of rows of heads are."""
    if lengths.is_paged(tensor.axis):
        return PAGES_OF_HEADS
    return TOKENS_OF_HEADS if lengths.is_by_token(tensor.axis) else ROWS_OF_HEADS


def _extents(axis: Axis, lengths: Lengths) -> tuple[tuple[Formula, ...], str]:
    """How many sequences a tensor has a dimension for, which it has not where they follow one another; and the rows."""
    return ((), f"tokens_{LETTERS[axis]}") if lengths.is_by_token(axis) else (("batch",), LENGTHS[axis])


def _of_padded(axis: Axis, of_block: int, lengths: Lengths) -> tuple[Formula, ...]:
    """The shape of what heads have so much of for each block of `PADDED_ROWS` rows."""
    batch, length = _extents(axis, lengths)
    blocks = ceil_div(length, PADDED_ROWS) if batch else padded_blocks(length)
    return (*batch, "num_heads_q", product(of_block, blocks))


def _padded(seqlen: str, block: int) -> Formula:
    return product(block, ceil_div(seqlen, block))


def _values(programs: list[KernelPlan]) -> Iterator[Value]:
    """Every value of a call; some more than once."""
    plan = programs[-1]
    quantizer = plan.quantizer
    if quantizer:
        yield from _sources(plan, quantizer)
    # What the call makes for itself, operands, it may be given all the same.
    made: Literal["scratch", "given"] = "scratch" if quantizer else "given"
    for tensor in plan.reads:
        axes = COLUMNS_OF_HEADS if tensor.is_transposed else axes_of(tensor, plan.lengths)
        yield Value(
            tensor.name, tensor.dtype.name, value_shape(tensor, plan.lengths), made, tensor.name, axes
        )
    for descale in plan.scales:
        shape, shared = _descale_shape(descale), quantizer is not None and quantizer.scales == "per_tensor"
        yield Value(descale.name, F32.name, shape, made, descale.name, shared=shared)
    for of_cache in plan.descales:
        is_one = not of_cache.is_by_key
        yield Value(of_cache.name, F32.name, of_cache.shape, "given", of_cache.name, shared=is_one)
    for length in plan.lengths.arguments:  # before what is declared: a list of tiles is made of these alone
        shape = (total("batch", 1) if length.is_cumulative else "batch",)
        yield Value(length.name, "i32", shape, "given", length.name, optional=length.is_optional)
    yield from page_values(plan.lengths)
    for name, dtype, blocks in block_shapes(plan) if takes_blocks(plan) else ():
        yield Value(name, dtype, blocks, "given", name.removeprefix("tensor."), optional=True)
    for declared in plan.declarations.tensors.values():
        if f"tensor.{declared.name}" == BLOCK_MAP:
            continue
        yield Value(f"tensor.{declared.name}", declared.dtype, declared.dims, "given", declared.name)
    for format in SINK_FORMATS if plan.has_sink else ():
        yield Value(sink_value(format), format, ("num_heads_q",), "given", SINK)
    for each in programs:
        yield from _tables_and_scratch(each)
    places: tuple[Tensor | Rows, ...] = (*plan.outputs, *plan.written_rows)
    for place in places:
        name, shape = place.name, value_shape(place, plan.lengths)
        if isinstance(place, Tensor):
            yield Value(name, place.dtype.name, shape, "output", name, axes_of(place, plan.lengths))
        else:
            yield Value(name, F32.name, shape, "output", name, optional=place.optional)


def _tables_and_scratch(plan: KernelPlan) -> Iterator[Value]:
    for table in plan.tables:
        dtype = "f32" if table.lookup.type == "f32" else "i32"
        for end in table.ends:
            yield Value(plan.table_values[end], dtype, table_shape(table, plan), "kept")
    if plan.scheduler.is_listed:
        yield Value(plan.tile_list, "i32", ListTiles(plan).shape, "kept")
    for boundary in plan.boundaries:
        yield Value(boundary.name, "i32", boundary_shape(boundary), "kept")
    for part in plan.parts:
        yield Value(part.name, F32.name, part_shape(part, plan), "scratch")
    for place in plan.scratch:
        columns = (place.cols,) if isinstance(place, Tensor) else ()
        batch, length = _extents(place.axis, plan.lengths)
        yield Value(place.name, F32.name, (*batch, "num_heads_q", length, *columns), "scratch")


def _values_of_gradients(plan: KernelPlan, gradients: tuple[OfGradients, ...]) -> Iterator[Value]:
    """The values of a backward pass that the forward has not."""
    if not gradients:
        return
    (out,), (lse,), lengths = plan.outputs, plan.written_rows, plan.lengths
    (first,) = _of_inputs(gradients)
    for name, tensor in zip(TENSORS, first.reads, strict=False):
        if tensor.name != name:  # of e4m3, which has no gradient
            shape = value_shape(tensor, lengths)
            yield Value(tensor.name, tensor.dtype.name, shape, "given", name, axes_of(tensor, lengths))
    shape, axes = value_shape(out, lengths), axes_of(out, lengths)
    yield Value("dout", plan.differentiated.name, shape, "given", "dout", axes)
    yield Value("dlse", F32.name, value_shape(lse, lengths), "given", "dlse", optional=True)
    for each in gradients:
        if isinstance(each, SumRows):
            yield _declared_gradient(each.site.name, each.site.dtype, each.sizes)
            continue
        if isinstance(each, FinishSums):
            yield from _gradients_of_inputs(each.results, lengths)
            continue
        if isinstance(each, SumSink):
            for format in SINK_FORMATS:
                name, shape = sink_gradient(format), ("num_heads_q",)
                yield Value(name, format, shape, "output", f"d{SINK}", optional=True)
            continue
        yield from _tables_and_scratch(each)
        for rows in (*each.read_rows, *each.sums, *each.query_sums):
            yield Value(rows.name, F32.name, value_shape(rows, lengths), "scratch")
        for ranks in each.query_ranks:
            yield Value(ranks.name, "i32", value_shape(ranks, lengths), "scratch")
        yield from _gradients_of_inputs(each.outputs, lengths)
        for place in each.writes:
            if isinstance(place, PairMatrix):
                yield _declared_gradient(place.of, place.dtype.name, place.shape, zeroed=not place.is_covered)
            elif isinstance(place, Elements):
                yield _declared_gradient(place.of, F32.name, place.shape, zeroed=True)


def _gradients_of_inputs(tensors: tuple[Tensor, ...], lengths: Lengths) -> Iterator[Value]:
    """The gradients that a kernel writes, each in the formats that a call may want."""
    gradient_of = {in_f32(tensor.name): tensor.name for tensor in tensors}
    for tensor in tensors:
        name, shape, axes = tensor.name, value_shape(tensor, lengths), axes_of(tensor, lengths)
        argument = gradient_of.get(name, name)
        yield Value(name, tensor.dtype.name, shape, "output", argument, axes, optional=tensor.optional)


def _declared_gradient(name: str, dtype: str, shape: tuple[Formula, ...], zeroed: bool = False) -> Value:
    """The gradient of a tensor that the spec declares, or of a scalar, which has no dimensions."""
    return Value(gradient_value(name), dtype, shape, "output", f"d{name}", zeroed=zeroed)


def _sources(plan: KernelPlan, quantizer: Quantizer) -> Iterator[Value]:
    """What e4m3 operands are made of."""
    shapes = {
        tensor.name: ("batch", LENGTHS[tensor.axis], f"num_heads_{tensor.heads}", tensor.cols)
        for tensor in plan.reads
    }
    for source in SOURCES:
        for name, shape in shapes.items():
            yield Value(source_of(name, source), source, shape, "given", name, ROWS_OF_HEADS)
    yield Value(VALUE_ROWS, E4M3.name, shapes["v"], "given", "v", ROWS_OF_HEADS)
    if quantizer.finds_maxima:
        heads: tuple[Formula, ...] = () if quantizer.scales == "per_tensor" else ("batch", "num_heads_kv")
        yield Value(MAXIMA, F32.name, (len(TENSORS), *heads), "scratch", zeroed=True)


def _descale_shape(of: Descales) -> tuple[Formula, ...]:
    granules = () if of.granule is None else (ceil_div(LENGTHS[of.axis], of.granule),)
    return ("batch", f"num_heads_{of.heads}", *granules)

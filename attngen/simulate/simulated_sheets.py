"""What each sheet means, in torch: a function a sheet, of its name, from what it reads to what it writes, by value."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import pad

from attngen import quantize as quantization
from attngen.expr import fill_tables as fill
from attngen.expr import find_boundaries as find
from attngen.plan import (
    BLOCK_LISTS,
    BLOCK_MAP,
    MORE_BLOCK_LISTS,
    OPERANDS,
    PADDED_ROWS,
    ROW_NUMBERS,
    SHEETS,
    SINK_VALUES,
    FillTables,
    FindBoundaries,
    FindMaxima,
    FinishSums,
    MapBlocks,
    PackValues,
    PrepareRows,
    Quantize,
    Sheet,
    SumRows,
    SumSink,
    evaluate_formula,
    padded_start,
    value_shape,
)
from attngen.scaling import scale_values
from attngen.simulate.function_names import function_name
from attngen.simulate.tile_lists import list_tiles as list_tiles
from attngen.simulate.tile_lists import spans
from attngen.simulate.visits import Sizes

LOG2_E = math.log2(math.e)
Values = Mapping[str, torch.Tensor]
SheetFunction = Callable[[Any, Values, Sizes], dict[str, torch.Tensor]]


def fill_tables(sheet: FillTables, values: Values, sizes: Sizes) -> dict[str, torch.Tensor]:
    """The extremes of lookups over blocks of rows and keys."""
    plan, declared = sheet.plan, sizes.declared
    filled = fill(plan.tables, sizes.values, declared.scalars, declared.tensors, plan.block_m, plan.block_n)
    return {plan.table_values[end]: extremes for end, extremes in filled.items()}


def find_boundaries(sheet: FindBoundaries, values: Values, sizes: Sizes) -> dict[str, torch.Tensor]:
    """The first key, or row, for which each condition holds."""
    return find(sheet.boundaries, sizes.values, sizes.declared.scalars, sizes.declared.tensors)


def find_maxima(sheet: FindMaxima, values: Values, sizes: Sizes) -> dict[str, torch.Tensor]:
    """The largest magnitudes of Q, K and V."""
    q, k, v = (values[name] for name in sheet.sources)
    numbers = sheet.quantizer
    return {"maxima": quantization.find_maxima(q, k, v, numbers.scales, numbers.hadamard_seed)}


def quantize(sheet: Quantize, values: Values, sizes: Sizes) -> dict[str, torch.Tensor]:
    """The e4m3 operands and their descales."""
    q, k, v = (values[name] for name in sheet.sources)
    numbers = sheet.quantizer
    made = quantization.quantize(q, k, v, numbers.scales, numbers.hadamard_seed, values.get("maxima"))
    return {name: getattr(made, name) for name in OPERANDS}


def pack_values(sheet: PackValues, values: Values, sizes: Sizes) -> dict[str, torch.Tensor]:
    """V, transposed, its keys in the order of fragments."""
    (rows,) = (values[name] for name in sheet.reads)
    return {"v": quantization.pack_values(rows)}


def prepare_rows(sheet: PrepareRows, values: Values, sizes: Sizes) -> dict[str, torch.Tensor]:
    """D and lse in log2 units of each row; 0 and +inf of one without keys (lse infinite) and past the end."""
    delta = (values["out"].float() * values["dout"].float()).sum(-1).transpose(-1, -2)
    if "dlse" in values:
        delta = delta - values["dlse"]
    lse_log2 = values["lse"] * LOG2_E
    has_no_keys, past = lse_log2.isinf(), (0, -lse_log2.shape[-1] % PADDED_ROWS)
    found = {
        "delta": delta.masked_fill(has_no_keys, 0.0),
        "lse_log2": lse_log2.masked_fill(has_no_keys, math.inf),
    }
    nothing = {"delta": 0.0, "lse_log2": math.inf}
    cleared = {
        each.name: torch.zeros_like(values[each.name]) for each in sheet.cleared if each.name in values
    }
    if sheet.plan.lengths.queries == "dense":
        return {name: pad(x, past, value=nothing[name]) for name, x in found.items()} | cleared
    return {name: _by_sequence(sheet, x, values, sizes, nothing[name]) for name, x in found.items()} | cleared


def finish_sums(sheet: FinishSums, values: Values, sizes: Sizes) -> dict[str, torch.Tensor]:
    """dQ, of the sums of rows that exist, in the formats that are wanted; the order of registers is not simulated."""
    rows = (
        _by_token(sheet, values, sizes)
        if sheet.is_ragged
        else values[sheet.sums.name][:, :, : sizes.values["seqlen_q"]]
    )
    rows = rows.transpose(-3, -2)[..., : sheet.results[0].cols]
    scale = scale_values(sizes.softmax_scale, sheet.plan.score_factor)["gradient_scale"]
    found = rows * torch.tensor(scale, dtype=torch.float32, device="cpu")
    wanted = [name for name in sheet.writes if name in values]
    if sizes.accumulates:
        return {name: (values[name].float() + found).to(values[name].dtype) for name in wanted}
    return {name: found.to(values[name].dtype) for name in wanted}


def _by_token(sheet: FinishSums, values: Values, sizes: Sizes) -> torch.Tensor:
    """The sums of every token's rows, (heads, tokens, cols); zeros of tokens that no sequence has."""
    padded = values[sheet.sums.name]
    found = torch.zeros(len(padded), sizes.values["tokens_q"], padded.shape[-1], dtype=torch.float32)
    for sequence, (start, length) in enumerate(spans(sheet.plan, values, sizes, "queries")):
        at = padded_start(start, sequence)
        found[:, start : start + length] = padded[:, at : at + length]
    return found


def _by_sequence(
    sheet: PrepareRows, rows: torch.Tensor, values: Values, sizes: Sizes, fill: float
) -> torch.Tensor:
    """The numbers of the rows that sequences use, each padded to whole blocks; `fill` everywhere else."""
    of_sequences = spans(sheet.plan, values, sizes, "queries")
    shape = [evaluate_formula(size, sizes.values) for size in value_shape(sheet.rows, sheet.plan.lengths)]
    found = torch.full(shape, fill, dtype=torch.float32)
    for sequence, (start, length) in enumerate(of_sequences):
        if sheet.plan.lengths.queries == "padded":
            found[sequence, :, start : start + length] = rows[sequence, :, start : start + length]
        else:
            at = padded_start(start, sequence)
            found[:, at : at + length] = rows[:, start : start + length]
    return found


def sum_rows(sheet: SumRows, values: Values, sizes: Sizes) -> dict[str, torch.Tensor]:
    """The elements of a declared tensor, each the sum of the rows that read it."""
    (gradient,) = sheet.writes
    found, target = values[sheet.sums.name], values[gradient]
    batch, heads, rows = (torch.arange(size) for size in found.shape[:3])
    places = {
        "b": batch.view(-1, 1, 1),
        "h": heads.view(1, -1, 1),
        "h_kv": heads.view(1, -1, 1) // max(1, sizes.group),
        "q_idx": rows.view(1, 1, -1),
        "kv_idx": rows.view(1, 1, -1),
    }
    of_table: dict[int, torch.Tensor] = {}
    if found.dim() == 4:  # an entry a column
        dims = sheet.site.table_dims
        entries = torch.unravel_index(torch.arange(found.shape[3]), [target.shape[dim] for dim in dims])
        of_table = dict(zip(dims, entries, strict=True))
        places = {name: place.unsqueeze(-1) for name, place in places.items()}
    element = torch.zeros(found.shape, dtype=torch.int64)
    for dim, (index, size) in enumerate(zip(sheet.site.indices, target.shape, strict=True)):
        of_rows = index.value if index.op == "const" else places.get(index.name)
        element = element * size + torch.as_tensor(of_table.get(dim, of_rows)).clamp(0, size - 1)
    total = torch.zeros(target.numel(), dtype=torch.float64).index_add_(
        0, element.view(-1), found.double().view(-1)
    )
    return {gradient: total.view(target.shape).to(target.dtype)}


def sum_sink(sheet: SumSink, values: Values, sizes: Sizes) -> dict[str, torch.Tensor]:
    """The gradient of the sink: of each head's rows the sum of -exp(sink - lse) D; 0 of a row whose lse is infinite."""
    (sink,) = (values[name] for name in SINK_VALUES if name in values)
    delta, lse_log2 = (values[name].double() for name in ROW_NUMBERS)
    weights = ((sink.float() * LOG2_E)[:, None] - lse_log2).exp2().masked_fill(lse_log2.isinf(), 0.0)
    total = -(weights * delta).masked_fill(weights == 0, 0.0).sum(-1).view(-1, len(sink)).sum(0)
    return {name: total.to(values[name].dtype) for name in sheet.writes if name in values}


def map_blocks(sheet: MapBlocks, values: Values, sizes: Sizes) -> dict[str, torch.Tensor]:
    """The blocks that are listed, in lists of either kind; what is listed and is no block is none."""
    kept = torch.zeros_like(values[BLOCK_MAP])
    blocks = kept.shape[-1]
    for counts, indices in (BLOCK_LISTS, MORE_BLOCK_LISTS):
        if counts in values:
            found = values[indices]
            is_listed = torch.arange(blocks) < values[counts].unsqueeze(-1)
            is_block = is_listed & (found >= 0) & (found < blocks)
            nowhere = kept.new_zeros(*kept.shape[:-1], blocks + 1)
            kept |= nowhere.scatter(-1, found.where(is_block, blocks).long(), True)[..., :blocks]
    return {BLOCK_MAP: kept}


SHEETS_SIMULATED: dict[type[Sheet], SheetFunction] = {
    sheet: globals()[function_name(sheet)] for sheet in SHEETS
}
"""What each sheet does."""

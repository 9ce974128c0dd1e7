"""What each sheet means, in torch: a function a sheet, of its name, from what it reads to what it writes, by value."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import pad

from attngen import quantize as quantization
from attngen.expr import fill_tables as fill
from attngen.plan import (
    OPERANDS,
    PADDED_ROWS,
    SHEETS,
    FillTables,
    FindMaxima,
    PackValues,
    PrepareRows,
    Quantize,
    Sheet,
)
from attngen.simulate.function_names import function_name
from attngen.simulate.visits import Sizes

Values = Mapping[str, torch.Tensor]
SheetFunction = Callable[[Any, Values, Sizes], dict[str, torch.Tensor]]


def fill_tables(sheet: FillTables, values: Values, sizes: Sizes) -> dict[str, torch.Tensor]:
    """The extremes of lookups over blocks of rows and keys."""
    plan, declared = sheet.plan, sizes.declared
    filled = fill(plan.tables, sizes.values, declared.scalars, declared.tensors, plan.block_m, plan.block_n)
    return {plan.table_values[end]: extremes for end, extremes in filled.items()}


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
    """D and lse in log2 units of each row; 0 and +inf of one without keys (lse -inf or +inf) and past the end."""
    delta = (values["out"].float() * values["dout"].float()).sum(-1).transpose(1, 2)
    if "dlse" in values:
        delta = delta - values["dlse"]
    lse = values["lse"]
    past = (0, -lse.shape[-1] % PADDED_ROWS)
    return {
        "delta": pad(delta.masked_fill(lse.isinf(), 0.0), past),
        "lse_log2": pad((lse * math.log2(math.e)).masked_fill(lse.isinf(), math.inf), past, value=math.inf),
    }


SHEETS_SIMULATED: dict[type[Sheet], SheetFunction] = {
    sheet: globals()[function_name(sheet)] for sheet in SHEETS
}
"""What each sheet does."""

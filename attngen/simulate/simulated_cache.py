"""What the Steps do of a cache in e4m3, which is multiplied as f16."""

import torch

from attngen.dtypes import F16
from attngen.expr import evaluate
from attngen.plan.steps import (
    LARGEST_REFERENCE,
    SMALLEST_REFERENCE,
    FitRows,
    LoadDescales,
    OrderColumns,
    RaiseReference,
    ReadDescale,
    ScaleColumns,
    SyncThreads,
)
from attngen.simulate.device_memory import NOTHING
from attngen.simulate.roles import RoleRun, Run
from attngen.simulate.simulated_copies import rounded
from attngen.simulate.simulated_sync import sync_threads

COLUMNS = 16
"""Of a row of V, those that two matrix instructions share out."""


def read_descale(step: ReadDescale, role: RoleRun) -> None:
    """The descale of the tile's head, in each of its rows."""
    found = NOTHING
    if role.device.holds_values:
        batch, _, head_kv = role.tile.columns
        found = role.device.tensors[step.of.name][batch, head_kv].reshape(-1, 1)
    role.write(step.dst, lambda: found.expand(-1, len(role.own_rows(step.dst.rows))))


def fit_rows(step: FitRows, role: RoleRun) -> Run:
    """Q as f16, each row times a power of two, and the scale of its scores over that.

    Warps that have all rows look at them before they meet, and the first writes.
    """
    q = role.read_shared(step.tile, for_update=not role.has_all_rows)
    power = _fitting_powers(q) if role.device.holds_values else NOTHING
    before = () if step.is_first else (role.read(step.scale),)
    role.write(step.scale, lambda *scale: (scale[0] if scale else 1.0) / power, *before)
    if role.has_all_rows:
        yield from sync_threads(SyncThreads(), role)
    if not role.has_all_rows or role.warpgroup == 0:
        role.write_shared(step.tile, lambda: rounded(q * power.unsqueeze(-1), F16))


def order_columns(step: OrderColumns, role: RoleRun) -> None:
    """Every column where it belongs."""
    o = role.read(step.o)
    places = even_columns_first(step.o.cols).argsort()
    role.write(step.o, lambda: o[..., places])


def load_descales(step: LoadDescales, role: RoleRun) -> None:
    """Start copying the descale of each key of a block; 0 where there is no key, or none that is seen."""
    keys = step.dst.buffer.cols
    first = role.keys_of_block(role.index(step.block), keys).start
    if first < 0:
        raise role.fault(
            "out of bounds", f"block {first // keys} of {step.src} does not exist", step.src.name
        )
    found = role.device.read_descales(step.src, role.tile, first, keys)
    if role.device.holds_values:
        if step.shown is not None:
            names = role.names(dimensions=2) | {"kv_idx": torch.arange(first, first + keys).view(1, -1)}
            is_shown = evaluate(step.shown, names, role.call.sizes.declared.tensors)
            found = found.masked_fill(~torch.as_tensor(is_shown), 0.0)
        found = found.unsqueeze(-2)
    role.started += role.start_copy(step.dst, found, 1, None)


def scale_columns(step: ScaleColumns, role: RoleRun) -> None:
    """Every number of a key's column times that of the key."""
    s, by = role.read(step.s), role.read_shared(step.by)
    over = 1.0 if step.over is None else role.read(step.over)
    role.write(step.s, lambda: s * (by / over.unsqueeze(-1) if isinstance(over, torch.Tensor) else by))


def raise_reference(step: RaiseReference, role: RoleRun) -> None:
    """A power of two that no number of the block passes, nor one of a block before."""
    before, of = role.read(step.reference), role.read_shared(step.of)

    def raised() -> torch.Tensor:
        bits = of.amax(-1).clamp(SMALLEST_REFERENCE, LARGEST_REFERENCE).view(torch.int32)
        power = ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)
        return torch.maximum(before, power)

    after = role.write(step.reference, raised)
    role.write(step.factor, lambda: before / after)


def even_columns_first(columns: int) -> torch.Tensor:
    """The columns of rows of e4m3 in the order in which a product with them leaves them."""
    groups = (range(first, min(first + COLUMNS, columns)) for first in range(0, columns, COLUMNS))
    order = [column for group in groups for column in (*group[::2], *group[1::2])]
    return torch.tensor(order, dtype=torch.int64)


def _fitting_powers(q: torch.Tensor) -> torch.Tensor:
    """The power of two of each row by which its largest number lies from 2^14 up to 2^15; 2^126 at most."""
    exponents = (q.abs().amax(-1).contiguous().view(torch.int32) >> 23) & 0xFF
    return ((127 + (141 - exponents).clamp(max=126)) << 23).view(torch.float32)

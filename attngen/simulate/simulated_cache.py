"""What the Steps do of a cache in e4m3, which is multiplied as f16."""

import torch

from attngen.dtypes import F16
from attngen.plan.steps import FitRows, OrderColumns, ReadDescale
from attngen.simulate.device_memory import NOTHING
from attngen.simulate.roles import RoleRun
from attngen.simulate.simulated_copies import rounded

COLUMNS = 16
"""Of a row of V, those that two matrix instructions share out."""


def read_descale(step: ReadDescale, role: RoleRun) -> None:
    """The descale of the tile's head, in each of its rows."""
    found = NOTHING
    if role.device.holds_values:
        batch, _, head_kv = role.tile.columns
        found = role.device.tensors[step.of.name][batch, head_kv].reshape(-1, 1)
    role.write(step.dst, lambda: found.expand(-1, len(role.own_rows(step.dst.rows))))


def fit_rows(step: FitRows, role: RoleRun) -> None:
    """Q as f16, each row times a power of two, and the scale of its scores over that."""
    q = role.read_shared(step.tile, for_update=True)
    power = _fitting_powers(q) if role.device.holds_values else NOTHING
    role.write_shared(step.tile, lambda: rounded(q * power.unsqueeze(-1), F16))
    before = () if step.is_first else (role.read(step.scale),)
    role.write(step.scale, lambda *scale: (scale[0] if scale else 1.0) / power, *before)


def order_columns(step: OrderColumns, role: RoleRun) -> None:
    """Every column where it belongs."""
    o = role.read(step.o)
    places = even_columns_first(step.o.cols).argsort()
    role.write(step.o, lambda: o[..., places])


def even_columns_first(columns: int) -> torch.Tensor:
    """The columns of rows of e4m3 in the order in which a product with them leaves them."""
    groups = (range(first, min(first + COLUMNS, columns)) for first in range(0, columns, COLUMNS))
    order = [column for group in groups for column in (*group[::2], *group[1::2])]
    return torch.tensor(order, dtype=torch.int64)


def _fitting_powers(q: torch.Tensor) -> torch.Tensor:
    """The power of two of each row by which its largest number lies from 2^14 up to 2^15; 2^126 at most."""
    exponents = (q.abs().amax(-1).contiguous().view(torch.int32) >> 23) & 0xFF
    return ((127 + (141 - exponents).clamp(max=126)) << 23).view(torch.float32)

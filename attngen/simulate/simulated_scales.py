"""What the Steps compute that read the scales of 8-bit operands.

Scales of scores and weights of V are kept for every key, (members, rows, keys), where kernels keep them for groups of
keys; one for all keys is (members, rows, 1).
"""

import torch

from attngen.plan import BlockIndex, Descales, RegTile, RegVec
from attngen.plan.steps import (
    CopyRows,
    Promote,
    ReadRowScales,
    ReadScoreScale,
    ReadTopScale,
    ReadValueWeight,
    ScaleKeys,
    StageScales,
)
from attngen.scaling import SMALLEST_SCALE
from attngen.simulate.device_memory import NOTHING
from attngen.simulate.roles import RoleRun

SMALLEST_WEIGHT = 2.0**-32
"""Of a block of V against the largest; e4m3 rounds P to zero long before."""


def read_row_scales(step: ReadRowScales, role: RoleRun) -> None:
    """The scale of the call times the descale of each row, and K's where a whole head has one."""
    call = role.call
    own = role.own_rows(step.dst.rows)
    rows = torch.arange(len(own)) + role.index(step.rows) * step.dst.rows + own.start
    scale = call.scale["softmax_scale" if step.in_natural_units else "softmax_scale_log2"]
    q, k = _descales(step.q, rows, role), _descales(step.k, rows, role) if step.k else 1.0

    def scaled() -> torch.Tensor:
        return _normal(scale * q * k, step.in_natural_units).expand(-1, len(own)).unsqueeze(-1)

    role.write(step.dst, scaled)


def stage_scales(step: StageScales, role: RoleRun) -> None:
    """K's and V's descale of each key of a block, for the consumers."""
    k, v = (_of_keys(of, step.block, role) for of in (step.k, step.v))
    role.write_by_first_thread(step.dst, lambda: torch.stack((k, v), 1))


def read_score_scale(step: ReadScoreScale, role: RoleRun) -> None:
    """The scale of a row's scores times K's descale of a block."""
    staged, src = role.read_shared(step.staged), role.read(step.src)
    role.write(step.dst, lambda: _normal(src * staged[:, :1], step.in_natural_units))


def scale_keys(step: ScaleKeys, role: RoleRun) -> None:
    """Every score times the descale of its key."""
    s, staged = role.read(step.s), role.read_shared(step.staged)
    role.write(step.s, lambda: s * staged[:, :1])


def read_top_scale(step: ReadTopScale, role: RoleRun) -> None:
    """V's largest descale of the head."""
    every = _descales(step.v, torch.arange(max(1, role.tile.seqlen_k)), role)
    role.write(step.top, lambda: every.amax(-1, keepdim=True).expand(-1, _rows(step.top, role)))


def read_value_weight(step: ReadValueWeight, role: RoleRun) -> None:
    """V's descale of each key of a block in relation to the largest."""
    staged = role.read_shared(step.staged)
    role.write(
        step.weight, lambda top: torch.fmax(staged[:, 1:] / top[:, None, :1], _SMALLEST), role.read(step.top)
    )


def copy_rows(step: CopyRows, role: RoleRun) -> None:
    """Keep a value per row."""
    src = role.read(step.src)
    role.write(step.dst, lambda: src)


def promote(step: Promote, role: RoleRun) -> None:
    """Rescale what was added up before, and add the newest part."""
    o, part, by = role.read(step.o), role.read(step.part), role.read(step.by).unsqueeze(-1)
    columns = slice(step.first_column, step.first_column + step.part.cols)

    def joined() -> torch.Tensor:
        result = o.clone()
        result[..., columns] = o[..., columns] * by + part
        return result

    role.write(step.o, joined)


_SMALLEST = torch.tensor(SMALLEST_WEIGHT, dtype=torch.float32, device="cpu")


def _normal(scale: torch.Tensor, in_natural_units: bool) -> torch.Tensor:
    """What may meet a score of -inf, which scales in natural units do not."""
    return scale if in_natural_units else scale.clamp(min=SMALLEST_SCALE)


def _of_keys(of: Descales, block: BlockIndex, role: RoleRun) -> torch.Tensor:
    """The descales of the keys of a block, (members, keys)."""
    block_n = role.call.plan.block_n
    return _descales(of, torch.arange(block_n) + role.index(block) * block_n, role)


def _descales(of: Descales, rows: torch.Tensor, role: RoleRun) -> torch.Tensor:
    """The descales of some rows of the tile's heads, (members, rows); past the end the last one's, or 0 if none is."""
    if not role.device.holds_values:
        return NOTHING
    batch, head, head_kv = role.tile.columns
    found = role.device.tensors[of.name][batch, head if of.heads == "q" else head_kv]
    if of.granule is None:
        return found.reshape(-1, 1)
    _, length = role.tile.sequence(of.axis)
    if not length:
        return found.new_zeros(len(found), len(rows))
    return found[:, rows.clamp(0, length - 1) // of.granule]


def _rows(place: RegTile | RegVec, role: RoleRun) -> int:
    return len(role.own_rows(place.rows))

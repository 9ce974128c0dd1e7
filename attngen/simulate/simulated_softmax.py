"""What the Steps of the softmax compute. Pure functions first, then the Steps that apply them.

S is kept as Q Kᵀ without the scale, and so is row_max, but where operands have scales of their own. Everything is f32
unless it says so.
Source: the online softmax of Milakov and Gimelshein, arXiv 1805.02867, in the form of FlashAttention-2.
"""

import math
from typing import Any

import torch

from attngen.expr import SINK, evaluate, found_of, with_nodes
from attngen.plan import RegTile, RegVec
from attngen.plan.steps import (
    Clear,
    ConvertP,
    Exponentiate,
    FinishRows,
    JoinSink,
    LookUp,
    MaskScores,
    MaskScoresEach,
    ModifyScores,
    NegateTile,
    ReadSink,
    ReduceRows,
    RowMax,
    ScaleRows,
    SeedScores,
)
from attngen.simulate.roles import RoleRun
from attngen.simulate.simulated_copies import rounded

LN_2, LOG2_E = math.log(2), math.log2(math.e)
LARGEST = torch.finfo(torch.float32).max
SMALLEST_SUM = 2.0**-100
"""Of a row that has seen a key, but one of e4m3 whose maximum was rounded up by more."""


Scale = torch.Tensor | float
"""What scores are multiplied by: a number of the call, or (members, rows, keys or 1)."""


def scaled(s: torch.Tensor, scale: Scale) -> torch.Tensor:
    """Scores in log2 units, rounded up, so that no exponent relative to a maximum of these is positive."""
    exact = s.double() * scale
    nearest = exact.float()
    return torch.where(nearest < exact, nearest.nextafter(torch.full_like(nearest, math.inf)), nearest)


def running_max(s: torch.Tensor, row_max: torch.Tensor) -> torch.Tensor:
    """max(row_max, maximum of s). NaN is passed over here; it comes back through the exponential."""
    return torch.fmax(row_max, s.masked_fill(s.isnan(), -math.inf).amax(-1))


def is_coarse(reference: torch.Tensor, coarse: float) -> torch.Tensor:
    """Which rows are coarse, by their maxima in log2 units."""
    return ~(reference.abs() < coarse)


def maximum_or_zero(row_max: torch.Tensor) -> torch.Tensor:
    """What exponents are taken relative to: the maximum, or 0 for a row that has seen no key."""
    return row_max.masked_fill(row_max == -math.inf, 0.0)


def relative_scores(s: torch.Tensor, row_max: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Scores, those of some rows relative to the maximum."""
    if not bool(rows.any()):
        return s
    return torch.where(rows.unsqueeze(-1), s - row_max.unsqueeze(-1), s)


def exponent_scales(row_max: torch.Tensor, scale_log2: float, coarse: float) -> torch.Tensor:
    """What the scores of each row are multiplied by: the scale or, of coarse rows, the power of two below it."""
    _, exponent = math.frexp(scale_log2)
    scales = torch.full_like(row_max, scale_log2)
    return scales.masked_fill_(is_coarse(row_max * scale_log2, coarse), math.ldexp(1.0, exponent - 1))


def rescale_factor(old_reference: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """What sums under the old reference are worth under the new one; of two scales the new one may be less."""
    return torch.exp2(-(old_reference - reference).abs())


def exponentials(s: torch.Tensor, reference: torch.Tensor, scale: Scale, lift: Scale = 0) -> torch.Tensor:
    """2^(scaled s - reference + lift), the exponent rounded once, as a fused multiply-add does."""
    exact = s.double().mul_(scale).sub_(reference.unsqueeze(-1) - lift)
    return torch.exp2_(exact.float())


def inverse_sum(row_sum: torch.Tensor) -> torch.Tensor:
    """1 / row_sum, or 0 for a row that saw no key."""
    return torch.where(row_sum < SMALLEST_SUM, 0.0, row_sum.reciprocal())


def log_sum_exp(reference: torch.Tensor, row_sum: torch.Tensor, lift: int = 0) -> torch.Tensor:
    """The natural logarithm of the sum of exponentials that are lifted, or -inf for a row that saw no key."""
    return torch.where(row_sum < SMALLEST_SUM, -math.inf, (reference - lift + torch.log2(row_sum)) * LN_2)


def log_sum_exp_of_scores(
    row_max: torch.Tensor, row_sum: torch.Tensor, scale_log2: float, coarse: float, lift: int = 0
) -> torch.Tensor:
    """`log_sum_exp` of maxima that are scores; coarse ones are brought to natural units at once, and stay finite."""
    reference, largest = row_max * scale_log2, torch.finfo(row_max.dtype).max
    exact = row_max.double() * (scale_log2 * LN_2) + (torch.log2(row_sum) - lift) * LN_2
    natural = is_coarse(reference, coarse) & (row_sum != 0)
    fine = log_sum_exp(reference, row_sum, lift)
    return torch.where(natural, exact.clamp(-largest, largest).float(), fine)


def joined(by: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of rows and their log-sum-exp, once a sink, a logit of no value, is in the sum.

    Both are taken relative to the larger one, which is finite: exponents are then 0 or less, but for a sink of +inf.
    """
    largest = torch.fmax(lse, sink).clamp(-LARGEST, LARGEST)
    of_keys, of_sink = (torch.exp2((x - largest) * LOG2_E) for x in (lse, sink))
    total = of_keys + of_sink  # 0 where neither is there
    share = torch.where(total == 0, 0.0, of_keys * total.reciprocal())
    return by * share, largest + torch.log2(total) * LN_2


def scale_rows_of(o: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Every row times its factor."""
    return o * by.unsqueeze(-1)


# ---- softmax ------------------------------------------------------------------------------------------
def clear(step: Clear, role: RoleRun) -> None:
    """Fill registers; the sum of a gradient begins."""
    role.contributions[step.dst.name].clear()
    value = {"0": 0.0, "-inf": -math.inf, "lowest": torch.finfo(torch.float32).min}[step.value]
    rows = len(role.own_rows(step.dst.rows))
    shape = (rows, step.dst.cols) if isinstance(step.dst, RegTile) else (rows,)
    role.write(step.dst, lambda: torch.full((len(role.tile.members), *shape), value, dtype=torch.float32))


def negate_tile(step: NegateTile, role: RoleRun) -> None:
    """Flip the sign of a tile; each thread does its part."""
    values = role.read_shared(step.tile, for_update=True)
    role.write_shared(step.tile, torch.neg, values)


def look_up(step: LookUp, role: RoleRun) -> None:
    """An element of a tensor for each pair."""

    def found() -> torch.Tensor:
        _, names = _indices(step, step.dst, role)
        elements = torch.as_tensor(evaluate(step.lookup, names, role.call.sizes.declared.tensors))
        rows = len(role.own_rows(step.dst.rows))
        return elements.expand(len(role.tile.members), rows, step.dst.cols)

    role.write(step.dst, found)


def seed_scores(step: SeedScores, role: RoleRun) -> None:
    """What the spec adds to each product, divided by the scale."""

    def seeds() -> torch.Tensor:
        _, names = _indices(step, step.s, role)
        found = torch.as_tensor(evaluate(step.added, names, role.call.sizes.declared.tensors))
        rows = len(role.own_rows(step.s.rows))
        shape = (len(role.tile.members), rows, step.s.cols)
        return (found * role.call.scale["softmax_scale_inverse"]).expand(shape).contiguous()

    role.write(step.s, seeds)


def modify_scores(step: ModifyScores, role: RoleRun) -> None:
    """What the spec makes of each scaled score."""
    s = role.read(step.s)
    looked_up = {lookup: role.read(place) for lookup, place in step.looked_up}

    def modified() -> torch.Tensor:
        _, names = _indices(step, step.s, role)
        scale = role.call.scale["softmax_scale"] if step.scale is None else role.read(step.scale)
        found = {lookup: found_of(lookup) for lookup in looked_up}
        names |= {"score": s * scale, **{found[lookup].name: value for lookup, value in looked_up.items()}}
        score = with_nodes(step.score, found)
        scores = torch.as_tensor(evaluate(score, names, role.call.sizes.declared.tensors))
        in_exponents = scores * role.call.scale["softmax_scale_log2"] if step.is_tanh else scores
        return in_exponents.expand_as(s).contiguous()

    role.write(step.s, modified)


def mask_scores(step: MaskScores, role: RoleRun) -> None:
    """Keep the scores of the keys in the row's interval and in the sequence; the others become -inf."""
    s = role.read(step.s)

    def masked() -> torch.Tensor:
        kv_idx, names = _indices(step, step.s, role)
        tensors = role.call.sizes.declared.tensors
        keep = kv_idx < role.tile.seqlen_k
        for bound in step.visible.lower:
            keep = keep & (kv_idx >= evaluate(bound, names, tensors))
        for bound in step.visible.upper:
            keep = keep & (kv_idx < evaluate(bound, names, tensors))
        return torch.where(keep, s, -math.inf)

    role.write(step.s, masked)


def mask_scores_each(step: MaskScoresEach, role: RoleRun) -> None:
    """Keep the scores of keys that the mask shows and that are in the sequence; the others become -inf."""
    s = role.read(step.s)

    def masked() -> torch.Tensor:
        kv_idx, names = _indices(step, step.s, role)
        tensors = role.call.sizes.declared.tensors
        keep = (kv_idx < role.tile.seqlen_k) & evaluate(step.mask, names, tensors)
        return torch.where(keep, s, -math.inf)

    role.write(step.s, masked)


def _indices(
    step: LookUp | MaskScores | MaskScoresEach | ModifyScores | SeedScores, tile: RegTile, role: RoleRun
) -> tuple[torch.Tensor, dict[str, int | torch.Tensor]]:
    """The key of every score, and all names of an expression: broadcast to (members, rows, cols)."""
    own, keys = role.rows_in_block(tile.rows), role.keys_of_block(role.index(step.block), tile.cols)
    first_row = role.index(step.rows) * role.block_rows(tile.rows) + own.start
    kv_idx = torch.arange(keys.start, keys.stop).view(1, 1, -1)
    q_idx = torch.arange(first_row, first_row + len(own)).view(1, -1, 1)
    if role.call.plan.scheduler.packs_group:
        q_idx = q_idx // role.call.sizes.group
    return kv_idx, role.names(dimensions=3) | {"q_idx": q_idx, "kv_idx": kv_idx}


def row_max(step: RowMax, role: RoleRun) -> None:
    """Raise the running maximum, and say what the sums so far are worth under it."""
    if step.scale is not None:
        _raise_scaled(step, role)
    elif step.exponent_scale is not None:
        _raise_and_choose_scale(step, step.exponent_scale, role)
    else:
        _raise_and_subtract(step, role)


def _raise_scaled(step: RowMax, role: RoleRun) -> None:
    """Where operands have scales of their own the maximum is in log2 units."""
    s, old, scale = role.read(step.s), role.read(step.row_max), _scale(step, role)
    top = role.write(step.row_max, lambda: running_max(scaled(s, scale), old))
    role.write(step.alpha, lambda: torch.exp2(old - maximum_or_zero(top)))


def _raise_and_choose_scale(step: RowMax, exponent_scale: RegVec, role: RoleRun) -> None:
    """A coarse row takes a scale of which products are exact."""
    assert step.reference is not None and step.coarse is not None, "scores share a scale"
    s, old, before = role.read(step.s), role.read(step.row_max), role.read(step.reference)
    scale, coarse = _scale(step, role), step.coarse
    top = role.write(step.row_max, running_max, s, old)
    scales = role.write(exponent_scale, lambda: exponent_scales(top, scale, coarse).unsqueeze(-1))

    def reference() -> torch.Tensor:
        rounded = top * scale
        return torch.where(is_coarse(rounded, coarse), scaled(top, scales.squeeze(-1)), rounded)

    role.write(step.alpha, rescale_factor, before, role.write(step.reference, reference))


def _raise_and_subtract(step: RowMax, role: RoleRun) -> None:
    """The scores of a coarse row become relative to its maximum."""
    assert step.reference is not None and step.coarse is not None, "scores share a scale"
    s, old = role.read(step.s), role.read(step.row_max)
    scale, coarse = _scale(step, role), step.coarse
    top = role.write(step.row_max, running_max, s, old)
    rounded = role.write(step.reference, scaled, top, scale)
    role.write(step.s, lambda: relative_scores(s, top, is_coarse(rounded, coarse)))

    def alpha() -> torch.Tensor:
        exact = torch.exp2((old - top) * scale)
        return torch.where(is_coarse(rounded, coarse), exact, rescale_factor(scaled(old, scale), rounded))

    role.write(step.alpha, alpha)
    role.write(step.reference, lambda: rounded.masked_fill(is_coarse(rounded, coarse), 0.0))


def exponentiate(step: Exponentiate, role: RoleRun) -> None:
    """Scores to unnormalised probabilities, which are added to the rescaled sum."""
    s, scale, total = role.read(step.s), _scale(step, role), role.read(step.row_sum, partial=True)
    if step.row_max is None or step.alpha is None:
        s = role.write(step.s, lambda: torch.exp2(s * scale))
        role.write(step.row_sum, lambda: total + s.sum(-1))
        return
    alpha = role.read(step.alpha)
    reference = role.read(step.reference) if step.reference else maximum_or_zero(role.read(step.row_max))
    if step.weight is None:
        s = role.write(step.s, exponentials, s, reference, scale, step.lift)
        role.write(step.row_sum, lambda: alpha * total + s.sum(-1))
    else:
        weight = role.read(step.weight)
        s = role.write(step.s, lambda: exponentials(s, reference, scale, step.lift + torch.log2(weight)))
        role.write(step.row_sum, lambda: alpha * total + (s / weight).sum(-1))


def _scale(step: RowMax | Exponentiate | FinishRows, role: RoleRun) -> Any:
    """What brings scores to log2 units: a number, or one for each row and group of columns."""
    if step.is_scaled:
        return 1.0
    given = None if isinstance(step, FinishRows) else step.scale
    return role.call.scale["softmax_scale_log2"] if given is None else role.read(given)


def convert_p(step: ConvertP, role: RoleRun) -> None:
    """Round probabilities to the input type."""
    role.write(step.p, lambda s: rounded(s, step.p.dtype), role.read(step.s))


def scale_rows(step: ScaleRows, role: RoleRun) -> None:
    """Multiply every row by its factor."""
    role.write(step.o, scale_rows_of, role.read(step.o), role.read(step.by))


def reduce_rows(step: ReduceRows, role: RoleRun) -> None:
    """Add up the lanes' parts; the simulator keeps only their sum."""
    part = role.read(step.part, partial=True)
    role.write(step.total, lambda: part)


def finish_rows(step: FinishRows, role: RoleRun) -> None:
    """The factor that normalises a row, and its log-sum-exp."""
    total = role.read(step.row_sum)
    top = role.read(step.row_max) if step.row_max else None
    by = role.read(step.top) if step.top else None
    role.write(step.inv_sum, lambda: inverse_sum(total) if by is None else by * inverse_sum(total))
    role.write(step.lse, lambda: log_sum_exp_of(step, role, top, total))


def log_sum_exp_of(
    step: FinishRows, role: RoleRun, row_max: torch.Tensor | None, total: torch.Tensor
) -> torch.Tensor:
    """The log-sum-exp of rows as a Step finishes them."""
    top = torch.zeros((), dtype=torch.float32) if row_max is None else row_max
    if step.coarse is None:
        return log_sum_exp(top, total, step.lift)
    return log_sum_exp_of_scores(top, total, _scale(step, role), step.coarse, step.lift)


def read_sink(step: ReadSink, role: RoleRun) -> None:
    """The sinks of the tile's heads, one for all rows of each."""
    role.write(step.dst, lambda: sinks_of(role, role.rows_in_block(step.dst.rows)))


def sinks_of(role: RoleRun, rows: range) -> torch.Tensor:
    """The sinks of some rows of the tile: of its head, or of the heads of a group in turn."""
    _, head, _ = role.tile.columns
    heads = head.view(-1, 1).expand(-1, len(rows))
    if role.call.plan.scheduler.packs_group:
        first = (role.tile.m_block or 0) * role.call.plan.block_m
        heads = heads + torch.arange(first + rows.start, first + rows.stop) % role.call.sizes.group
    return role.device.tensors[SINK][heads].float()


def join_sink(step: JoinSink, role: RoleRun) -> None:
    """The keys' share of a sum that the sink has joined, and its logarithm."""
    by, lse, sink = role.read(step.by), role.read(step.lse), role.read(step.sink)
    role.write(step.by, lambda: joined(by, lse, sink)[0])
    role.write(step.lse, lambda: joined(by, lse, sink)[1])

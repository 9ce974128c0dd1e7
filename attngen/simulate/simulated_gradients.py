"""What the Steps of the backward pass do."""

import torch

from attngen.expr import Expr, evaluate
from attngen.plan import Axis, BlockIndex, RegTile, RegVec, View
from attngen.plan.steps import (
    ForHeads,
    HidePairs,
    RecoverP,
    RowNumbers,
    ScaleGradient,
    ScoreGradient,
    StoreGradient,
)
from attngen.simulate.roles import RoleRun, Run
from attngen.simulate.simulated_copies import rounded


def for_heads(step: ForHeads, role: RoleRun) -> Run:
    """Run the body for every query head that shares the tile's keys, each with the blocks of queries that it sees."""
    tile = role.tile
    for place in range(role.call.sizes.group):
        role.tile = tile.of_group(place)
        role.see_queries()
        yield from role.run(step.body)
    role.tile = tile


def recover_p(step: RecoverP, role: RoleRun) -> None:
    """P of each pair, rounded where that is wanted, then times the slope of its score."""
    s = role.read(step.s)
    pairs = TilePairs(step.s, step.rows, step.block, role)
    lse = pairs.of_queries(step.lse)
    scale = role.call.scale

    def probabilities() -> torch.Tensor:
        score = s if step.score is None else pairs.value(step.score, s * scale["softmax_scale"])
        p = torch.exp2(score * scale["softmax_scale_log2"] - lse)
        if step.mask is None:
            return p.expand_as(s).contiguous()
        exists = (pairs.q_idx < role.tile.seqlen_q) & (pairs.kv_idx < role.tile.seqlen_k)
        return torch.where(exists & pairs.value(step.mask), p, 0.0).expand_as(s).contiguous()

    def steepened(p: torch.Tensor) -> torch.Tensor:
        assert step.slope is not None
        steep = (p * pairs.value(step.slope, s * scale["softmax_scale"])).contiguous()
        return steep.masked_fill_(p == 0, 0.0) if step.is_steep else steep

    p = role.write(step.s, probabilities)
    if step.p is not None:
        dtype = step.p.dtype
        role.write(step.p, lambda: rounded(p, dtype))
    if step.slope is not None:
        role.write(step.s, steepened, p)


def hide_pairs(step: HidePairs, role: RoleRun) -> None:
    """Nothing of the pairs that are hidden or do not exist."""
    pairs = TilePairs(step.s, step.rows, step.block, role)
    exists = (pairs.q_idx < role.tile.seqlen_q) & (pairs.kv_idx < role.tile.seqlen_k)

    def shown(values: torch.Tensor) -> torch.Tensor:
        return torch.where(exists & pairs.value(step.mask), values, 0.0).expand_as(values).contiguous()

    for place in filter(None, (step.s, step.p)):
        role.write(place, shown, role.read(place))


def score_gradient(step: ScoreGradient, role: RoleRun) -> None:
    """The gradient of the products, rounded."""
    s, dp = role.read(step.s), role.read(step.dp)
    delta = TilePairs(step.s, step.rows, step.rows, role).of_queries(step.delta)
    role.write(step.ds, lambda: rounded(s * (dp - delta), step.ds.dtype))


def scale_gradient(step: ScaleGradient, role: RoleRun) -> None:
    """What dS was left without."""
    role.write(step.acc, lambda acc: acc * role.call.scale["gradient_scale"], role.read(step.acc))


def store_gradient(step: StoreGradient, role: RoleRun) -> None:
    """Write a buffer, or its sum with what stands there, to the places that the call wants."""
    buffer, device = step.src.buffer, role.device
    own = role.own_rows(buffer.rows) if step.src.own_rows else range(buffer.rows)
    values, shape = role.read_shared(step.src), (len(own), buffer.cols)
    first = role.index(step.block) * buffer.rows + own.start
    for place in filter(device.wants, step.places):
        given = device.read(place, role.tile, first, shape) if role.call.accumulates else None
        device.write(place, role.tile, first, values if given is None else values + given, shape)


class TilePairs:
    """The queries and the keys of a tile of pairs, each broadcast to (members, rows, cols)."""

    def __init__(self, tile: RegTile, rows: BlockIndex, block: BlockIndex, role: RoleRun) -> None:
        self._role = role
        numbers: dict[Axis, int] = {"queries": role.index(rows), "keys": role.index(block)}
        extents = dict(zip(tile.axes, (tile.rows, tile.cols), strict=True))
        own = role.own_rows(tile.rows)
        spans = {tile.axes[0]: own, tile.axes[1]: range(tile.cols)}
        first = {axis: number * extents[axis] + spans[axis].start for axis, number in numbers.items()}
        shapes = {tile.axes[0]: (1, -1, 1), tile.axes[1]: (1, 1, -1)}
        of = {
            axis: (torch.arange(len(spans[axis])) + first[axis]).view(shape) for axis, shape in shapes.items()
        }
        self.q_idx, self.kv_idx = of["queries"], of["keys"]
        self._first, self._queries = first["queries"], len(spans["queries"])
        self._other_axis = 2 if tile.axes[0] == "queries" else 1

    def of_queries(self, place: RowNumbers) -> torch.Tensor:
        """A number of each query."""
        role = self._role
        if isinstance(place, View):
            return role.read_shared(place)
        if isinstance(place, RegVec):
            found = role.read(place)
        else:
            found = role.device.read(place, role.tile, self._first, (self._queries,))
        return found.unsqueeze(self._other_axis) if role.device.holds_values else found

    def value(self, expr: Expr, score: torch.Tensor | None = None) -> torch.Tensor:
        """What an expression is for each pair."""
        role = self._role
        names = role.names(dimensions=3) | {"q_idx": self.q_idx, "kv_idx": self.kv_idx, "score": score}
        return torch.as_tensor(evaluate(expr, names, role.call.sizes.declared.tensors))

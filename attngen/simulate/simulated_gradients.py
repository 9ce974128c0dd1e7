"""What the Steps of the backward pass do."""

import math

import torch

from attngen.expr import Expr, evaluate
from attngen.plan import BlockIndex, RegTile, Rows
from attngen.plan.steps import ForHeads, RecoverP, ScaleGradient, ScoreGradient
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
    pairs = _Pairs(step.s, step.rows, step.block, role)
    lse = pairs.of_queries(step.lse, math.inf)
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
        return (p * pairs.value(step.slope, s * scale["softmax_scale"])).contiguous()

    p = role.write(step.s, probabilities)
    if step.p is not None:
        dtype = step.p.dtype
        role.write(step.p, lambda: rounded(p, dtype))
    if step.slope is not None:
        role.write(step.s, steepened, p)


def score_gradient(step: ScoreGradient, role: RoleRun) -> None:
    """The gradient of the products, rounded."""
    s, dp = role.read(step.s), role.read(step.dp)
    delta = _Pairs(step.s, step.rows, step.rows, role).of_queries(step.delta, 0.0)
    role.write(step.ds, lambda: rounded(s * (dp - delta), step.ds.dtype))


def scale_gradient(step: ScaleGradient, role: RoleRun) -> None:
    """What dS was left without."""
    role.write(step.acc, lambda acc: acc * role.call.scale["gradient_scale"], role.read(step.acc))


class _Pairs:
    """The queries and the keys of a tile of pairs, each broadcast to (members, rows, cols)."""

    def __init__(self, tile: RegTile, rows: BlockIndex, block: BlockIndex, role: RoleRun) -> None:
        self._role = role
        self._block = role.index(rows)
        extents = dict(zip(tile.axes, (tile.rows, tile.cols), strict=True))
        self._queries = extents["queries"]
        self._shape = (1, -1, 1) if tile.axes[0] == "queries" else (1, 1, -1)
        other = (1, 1, -1) if tile.axes[0] == "queries" else (1, -1, 1)
        self.q_idx = (torch.arange(self._queries) + self._block * self._queries).view(self._shape)
        keys = extents["keys"]
        self.kv_idx = (torch.arange(keys) + role.index(block) * keys).view(other)

    def of_queries(self, place: Rows, missing: float) -> torch.Tensor:
        """A value of each query; of those past the end `missing`."""
        role, first = self._role, self._block * self._queries
        valid = role.device.valid_rows(place, role.tile, first, self._queries)
        found = role.device.read(place, role.tile, first, (self._queries,))
        if not role.device.holds_values:
            return found
        known = torch.arange(self._queries) < valid
        return torch.where(known, found, missing).unsqueeze(self._shape.index(1, 1))

    def value(self, expr: Expr, score: torch.Tensor | None = None) -> torch.Tensor:
        """What an expression is for each pair."""
        role = self._role
        batch, head, head_kv = (column.view(-1, 1, 1) for column in role.tile.columns)
        names = {
            "q_idx": self.q_idx,
            "kv_idx": self.kv_idx,
            "seqlen_q": role.tile.seqlen_q,
            "seqlen_k": role.tile.seqlen_k,
            "b": batch,
            "h": head,
            "h_kv": head_kv,
            "score": score,
            **role.call.sizes.declared.scalars,
        }
        return torch.as_tensor(evaluate(expr, names, role.call.sizes.declared.tensors))

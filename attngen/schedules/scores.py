"""S of a block of keys: what enters before the product, and what makes scores of it that the softmax may take."""

from dataclasses import dataclass

from attngen.expr import Expr
from attngen.plan import BlockIndex, Cursor, Program, RegTile, View
from attngen.plan.steps import (
    ByTanh,
    LookUp,
    MaskScores,
    MaskScoresEach,
    ModifyScores,
    NegateTile,
    SeedScores,
    Step,
    When,
    WhenBlock,
)
from attngen.schedules.cache_scales import CacheScales
from attngen.schedules.key_loop import N_MIN, KeyBlock
from attngen.schedules.operand_scales import Scales
from attngen.schedules.pairs import Pairs


@dataclass(frozen=True)
class Scores:
    """The scores of a tile's rows and a block of keys.

    Attributes:
        acc_s: (block_m, block_n), the accumulators of the product.
        pairs: what the spec says of a query and a key.
        ahead: lookups of the score that are loaded before the product, and the registers for them.
        by_tanh: that of the pairs, where scores are computed so.
        scales: of 8-bit operands; None for others.
        cache: of K and V in a cache of e4m3 that are multiplied as f16; None for others.
    """

    acc_s: RegTile
    pairs: Pairs
    ahead: tuple[tuple[Expr, RegTile], ...] = ()
    by_tanh: ByTanh | None = None
    scales: Scales | None = None
    cache: CacheScales | None = None

    @property
    def starts_at_zero(self) -> bool:
        """Whether the product is all there is, rather than added to what `begin` left."""
        return self.pairs.added is None

    # ---- once for a tile --------------------------------------------------------------------------------------------
    def start(self, rows: BlockIndex) -> Program:
        """What a tile needs to know before its first block."""
        return self.scales.start(rows, self.pairs.modifies_scores) if self.scales else ()

    def orient(self, q: View, before: Program = (), after: Program = ()) -> Program:
        """What a negative softmax_scale asks of Q, between two programs; a modified score is scaled by itself.

        Of a sum it must be the product that changes its sign, so that is done before.
        """
        if self.pairs.modifies_scores and self.pairs.added is None:
            return ()
        return (When("scale is negative", (*before, NegateTile(q), *after)),)

    # ---- of a block -------------------------------------------------------------------------------------------------
    def stage(self, stage: Cursor, block: BlockIndex) -> Program:
        """What a producer leaves beside a block of keys."""
        return self.scales.stage(stage, block) if self.scales else ()

    def begin(self, block: KeyBlock, is_first: bool = False) -> Program:
        """What is done before the product: loads that it hides, and what it adds to.

        A block that follows another has its loads begun by that one, unless a walk alone knows which it will be.
        """
        loads = self._look_up(block.rows, block.n) if is_first or self._walks else ()
        added = self.pairs.added
        return (*loads, *(() if added is None else (SeedScores(self.acc_s, block.rows, block.n, added),)))

    def read_stage(self, stage: Cursor) -> Program:
        """What is read of a stage of keys, once it is full, before the product."""
        return self.scales.read(stage, self.pairs.modifies_scores) if self.scales else ()

    def leave_stage(self, stage: Cursor) -> Program:
        """What is read of a stage of keys, once the product is there, before it is released."""
        return self.scales.scale_keys(self.acc_s, stage) if self.scales else ()

    def finish(self, block: KeyBlock) -> Program:
        """Scores as the spec wants them, those of invisible keys at -inf."""
        scaled = self.cache.scale(self.acc_s) if self.cache else ()
        return (*scaled, *self._modify(block), *self._mask(block))

    @property
    def _walks(self) -> bool:
        return self.pairs.visible is None

    def _look_up(self, rows: BlockIndex, block: BlockIndex) -> Program:
        return tuple(LookUp(place, rows, block, lookup) for lookup, place in self.ahead)

    def _modify(self, block: KeyBlock) -> Program:
        """What the spec makes of the product; then loads for the next block, where its number is known."""
        if not self.pairs.modifies_scores:
            return ()
        scale = self.scales.of_scores if self.scales else None
        modified = ModifyScores(
            self.acc_s, block.rows, block.n, self.pairs.score, scale, self.ahead, self.by_tanh
        )
        if self._walks or not self.ahead:
            return (modified,)
        return (modified, WhenBlock(block.n - 1, N_MIN, self._look_up(block.rows, block.n - 1)))

    def _mask(self, block: KeyBlock) -> Program:
        """By interval where a row has one, else one by one."""
        mask: Step
        if self.pairs.interval is not None:
            mask = MaskScores(self.acc_s, block.rows, block.n, self.pairs.interval)
        else:
            mask = MaskScoresEach(self.acc_s, block.rows, block.n, self.pairs.mask)
        return block.where_masked((mask,))

"""A cache in e4m3: what its descales do to scores, P and O, and what Q is made for it."""

from dataclasses import dataclass

from attngen.expr import Expr
from attngen.plan import BlockIndex, Buffer, CacheDescales, Cursor, Program, RegTile, RegVec, View
from attngen.plan.steps import (
    Clear,
    FitRows,
    LoadDescales,
    Note,
    OrderColumns,
    RaiseReference,
    ReadDescale,
    ScaleColumns,
    ScaleRows,
    SyncThreads,
    WaitCopies,
)


@dataclass(frozen=True)
class StagedDescales:
    """Descales of the keys of a block in shared memory, a stage beside that of K or V.

    Attributes:
        k, v: where: (1, block_n), f32; where warps share out keys (warps, keys of a warp).
        read_at: which stage is worked on.
        of_warps: each warp has its own.
    """

    k: Buffer
    v: Buffer
    read_at: Cursor
    of_warps: bool

    def at(self, buffer: Buffer, stage: Cursor) -> View:
        """Those of a stage that the one at work needs."""
        view = buffer.at(stage)
        return view.own if self.of_warps else view


@dataclass(frozen=True)
class CacheScales:
    """Descales of K and V in device memory, in shared memory and in registers.

    Where keys have descales of their own, those of V go to P, in relation to a power of two that no descale of V passes
    which the tile has met: so P stays as f16 wants it, and one accumulator serves all keys.

    Attributes:
        k, v: descales.
        fits_q: Q is bf16, and becomes f16.
        pending: groups of copies behind that of Q which may be in flight when Q is needed.
        of_scores: what the scores of a row are multiplied by: K's descale, where a head has one, over the power of two
            that Q's row has.
        of_values: V's descale of the tile's head, or the reference of those of its keys.
        raised: what O is worth under the reference of a block in relation to that of the block before.
        staged: descales of keys; None where a head has one, and of `raised` too.
        shown: holds for a key that some query may see, as `Pairs.shown`.
    """

    k: CacheDescales
    v: CacheDescales
    fits_q: bool
    pending: int
    of_scores: RegVec
    of_values: RegVec
    raised: RegVec
    staged: StagedDescales | None
    shown: Expr | None

    @property
    def _scales_rows(self) -> bool:
        return self.fits_q or not self.staged

    @property
    def vectors(self) -> tuple[RegVec, ...]:
        """What of it is kept in registers."""
        of_scores = (self.of_scores,) if self._scales_rows else ()
        return (*of_scores, self.of_values, *((self.raised,) if self.staged else ()))

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """What of it is kept in shared memory."""
        return (self.staged.k, self.staged.v) if self.staged else ()

    # ---- of a tile --------------------------------------------------------------------------------------------------
    @property
    def start(self) -> Program:
        """What a tile reads of descales, before it waits for anything else."""
        if self.staged:
            return (Clear(self.of_values),)
        return (ReadDescale(self.of_scores, self.k), ReadDescale(self.of_values, self.v))

    def fit(self, q: View) -> Program:
        """Q in the format of products, where it is in another."""
        return (WaitCopies(self.pending), SyncThreads(), self.fitted(q)) if self.fits_q else ()

    def fitted(self, q: View) -> FitRows:
        """Q, which has come, in that format."""
        return FitRows(q, self.of_scores, is_first=self.staged is not None)

    def settle(self, o: RegTile) -> Program:
        """O of real values, its columns in order, once all keys have been visited."""
        return (
            Note("V in real numbers, and columns in order"),
            OrderColumns(o),
            ScaleRows(o, self.of_values),
        )

    # ---- of a block of keys -----------------------------------------------------------------------------------------
    def load_k(self, stage: Cursor, block: BlockIndex) -> Program:
        """Start copying what belongs to a block of K."""
        return (
            (LoadDescales(self.staged.at(self.staged.k, stage), self.k, block, self.shown),)
            if self.staged
            else ()
        )

    def load_v(self, stage: Cursor, block: BlockIndex) -> Program:
        """Start copying what belongs to a block of V."""
        return (
            (LoadDescales(self.staged.at(self.staged.v, stage), self.v, block, self.shown),)
            if self.staged
            else ()
        )

    def scale(self, s: RegTile) -> Program:
        """True scores out of products."""
        of_rows = (ScaleRows(s, self.of_scores),) if self._scales_rows else ()
        return (*of_rows, *((ScaleColumns(s, self._at(self.staged.k)),) if self.staged else ()))

    def weigh(self, p: RegTile, o: RegTile) -> Program:
        """P times V's descales, once its sums have been taken."""
        if not self.staged:
            return ()
        descales = self._at(self.staged.v)
        return (
            RaiseReference(self.of_values, self.raised, descales),
            ScaleRows(o, self.raised, votes=True),
            ScaleColumns(p, descales, over=self.of_values),
        )

    def _at(self, buffer: Buffer) -> View:
        assert self.staged is not None
        return self.staged.at(buffer, self.staged.read_at)

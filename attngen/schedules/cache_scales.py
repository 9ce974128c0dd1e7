"""A cache in e4m3: what its descales do to scores and to O, and what Q is made for it."""

from dataclasses import dataclass

from attngen.plan import CacheDescales, Program, RegTile, RegVec, View
from attngen.plan.steps import FitRows, Note, OrderColumns, ReadDescale, ScaleRows, SyncThreads, WaitCopies


@dataclass(frozen=True)
class CacheScales:
    """Descales of K and V in device memory and in registers.

    Attributes:
        k, v: descales.
        of_scores: what the scores of a row are multiplied by: K's descale, over the power of two that Q's row has.
        of_values: V's descale of the tile's head.
        fits_q: Q is bf16, and becomes f16.
        pending: groups of copies behind that of Q which may be in flight when Q is needed.
    """

    k: CacheDescales
    v: CacheDescales
    of_scores: RegVec
    of_values: RegVec
    fits_q: bool
    pending: int

    @property
    def vectors(self) -> tuple[RegVec, ...]:
        """What of it is kept in registers."""
        return (self.of_scores, self.of_values)

    @property
    def start(self) -> Program:
        """What a tile reads of descales, before it waits for anything else."""
        return (ReadDescale(self.of_scores, self.k), ReadDescale(self.of_values, self.v))

    def fit(self, q: View) -> Program:
        """Q in the format of products, where it is in another."""
        if not self.fits_q:
            return ()
        return (WaitCopies(self.pending), SyncThreads(), FitRows(q, self.of_scores, is_first=False))

    def scale(self, s: RegTile) -> Program:
        """True scores out of products."""
        return (ScaleRows(s, self.of_scores),)

    def settle(self, o: RegTile) -> Program:
        """O of real values, its columns in order, once all keys have been visited."""
        return (
            Note("V in real numbers, and columns in order"),
            OrderColumns(o),
            ScaleRows(o, self.of_values),
        )

"""Tree to trees over a tile: whether it may hold a visible pair, and whether all of its pairs must be visible.

A tile is empty where `may` does not hold and full where `must` does. Both are ordinary trees over what is one value
in a tile (`TILE_NAMES`, b, h, h_kv, lengths, scalars), so that they have every reading that a mask has. They
never claim too much: what they cannot tell is partial, which costs time and no more. They are exact where each index
is read once, and for the masks of tests/expr/test_tile_classes.py.

Three things go beyond arithmetic on intervals. The remainders of a tile by a constant are no interval
(remainders.py). A conjunct about one index alone (`kv_idx >= n`) narrows the tile for the others. A disjunction is
read as what it denies, so it must hold where no pair is left that every branch refuses.

Of a map of given blocks (given_blocks.py) a tile asks for the blocks that it lies in, mostly one.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from attngen.errors import InternalError
from attngen.expr import intervals, real_intervals
from attngen.expr.arithmetic import floor_divide, where
from attngen.expr.given_blocks import GIVEN_BLOCKS, blocks_of_tile, some_and_all_kept, without_blocks
from attngen.expr.intervals import Bounds, greater, lesser
from attngen.expr.logic import conjunction, less_equal, negate
from attngen.expr.ranges import index_range
from attngen.expr.remainders import Band, band_of
from attngen.expr.tables import Table, Tables
from attngen.expr.tree import (
    FALSE,
    TRUE,
    Expr,
    affine,
    affine_parts,
    const,
    free_names,
    name,
    real,
    scale,
)

_MAX_READINGS = 3_000
"""Of numbers, each for one part of the tile; a mask of a hundred branches takes some hundred."""

_MAX_TRUTHS = 1_000
"""Of conditions, likewise: alternatives of alternatives double them. Then nothing narrows the tile any more."""


@dataclass(frozen=True)
class TileClasses:
    """What tells empty, full and partial tiles apart.

    Attributes:
        may: holds wherever a pair of the tile may be visible.
        must: holds only where all of its pairs are.
        tables: what both read besides the tensors of the mask, by first use.
        may_of_spans: holds wherever a pair of several tiles side by side may be visible; None where what `may` reads is
            of one tile.
    """

    may: Expr
    must: Expr
    tables: tuple[Table, ...]
    may_of_spans: Expr | None


_ANY_NUMBER = {
    "i32": Bounds(const(-(2**31)), const(2**31 - 1)),
    "f32": Bounds(real(float("-inf")), real(float("inf"))),
}


def tile_classes(mask: Expr, has_tables: bool = True, block_m: int = 1, block_n: int = 1) -> TileClasses:
    """The classes of the tiles of a mask.

    Args:
        mask: of the spec.
        has_tables: whether there are extremes of what is looked up by row or key; else a lookup may be anything.
        block_m: rows of a tile, which count where the mask asks a map of given blocks.
        block_n: keys of a tile, likewise.

    Raises:
        InternalError: the mask reads `score` or divides by what may be 0; the parser has refused both.
    """
    return _classes(mask, has_tables, blocks_of_tile(mask, block_m, block_n))


@lru_cache(maxsize=64)  # every candidate for a plan asks for those of one mask
def _classes(mask: Expr, has_tables: bool, blocks: tuple[int, int] | None) -> TileClasses:
    reader = _Reader(has_tables, blocks)
    found = reader.truth(mask, _Tile())
    tables = reader.tables.used_by(found.may, found.must)
    of_spans = found.may if blocks is None else reader.truth(without_blocks(mask), _Tile()).may
    return TileClasses(found.may, found.must, tables, None if tables else of_spans)


class _Truth(NamedTuple):
    """Whether a condition may and whether it must hold in a tile."""

    may: Expr
    must: Expr

    def denied(self) -> "_Truth":
        return _Truth(negate(self.must), negate(self.may))


@dataclass(frozen=True)
class _Tile:
    """The rows and keys for which something is read, and what holds of them.

    Where they are none, nothing that is said of them counts.
    """

    q_idx: Bounds = Bounds(name("q_idx.first"), name("q_idx.last"))
    kv_idx: Bounds = Bounds(name("kv_idx.first"), name("kv_idx.last"))
    known: frozenset[Expr] = frozenset()


class _Reader:
    """The readings of a mask's nodes, each once for each part of the tile that it is read for.

    Args:
        has_tables: whether lookups by row or key have extremes.
        blocks: in how many blocks of the map that the mask asks the rows, and the keys, of a tile lie at most.
    """

    def __init__(self, has_tables: bool, blocks: tuple[int, int] | None) -> None:
        self.tables = Tables()
        self._has_tables = has_tables
        self._blocks = blocks
        self._truths: dict[tuple[Expr, _Tile], _Truth] = {}
        self._bounds: dict[tuple[Expr, _Tile], Bounds] = {}
        self._uniform: dict[Expr, bool] = {}

    def is_uniform(self, expr: Expr) -> bool:
        """Whether the expression has one value in a tile."""
        if expr not in self._uniform:
            self._uniform[expr] = free_names(expr).isdisjoint(("q_idx", "kv_idx"))
        return self._uniform[expr]

    def truth(self, condition: Expr, tile: _Tile) -> _Truth:
        """Whether a condition may and must hold."""
        if self.is_uniform(condition):
            return _Truth(condition, condition)
        if condition in tile.known:
            return _Truth(TRUE, TRUE)
        if negate(condition) in tile.known:
            return _Truth(FALSE, FALSE)
        key = (condition, tile)
        if key not in self._truths:
            self._truths[key] = self._truth(condition, tile)
        return self._truths[key]

    def bounds(self, number: Expr, tile: _Tile) -> Bounds:
        """Between which values a number lies."""
        if self.is_uniform(number):
            return Bounds(number, number)
        key = (number, tile)
        if key not in self._bounds:
            self._bounds[key] = self._bounds_of(number, tile)
        return self._bounds[key]

    def _truth(self, condition: Expr, tile: _Tile) -> _Truth:
        if condition.op in ("or", "not", "ne") or (condition.op == "compare" and condition.name == "!="):
            return self.truth(negate(condition), tile).denied()
        if condition.op == "and":
            return self._conjunction(condition, tile)
        if condition.op == "lookup" and condition.name == GIVEN_BLOCKS.name:
            return self._given_blocks(condition, tile)
        if condition.op == "lookup":
            if not self._has_tables:
                return _Truth(TRUE, FALSE)
            table = self.tables.of(condition)
            return _Truth(table.greatest, table.least)
        if condition.op == "compare":
            of = {
                "<": real_intervals.is_less,
                "<=": real_intervals.is_at_most,
                "==": real_intervals.is_equal,
            }[condition.name]
            a, b = condition.args
            return _Truth(*of(self.bounds(a, tile), self.bounds(b, tile)))
        return self._comparison(condition, tile)

    def _given_blocks(self, kept: Expr, tile: _Tile) -> _Truth:
        """Whether some, and whether all of the blocks of a map are kept that the tile lies in."""
        assert self._blocks is not None
        rows, columns = (
            Bounds(index.lo, index.lo) if count == 1 else index
            for index, count in zip(
                (self.bounds(each, tile) for each in kept.args[2:]), self._blocks, strict=True
            )
        )
        return _Truth(*some_and_all_kept(kept, rows, columns))

    def _conjunction(self, condition: Expr, tile: _Tile) -> _Truth:
        """Conjuncts about one index alone, then the others for what those leave of the tile."""
        narrowed, truths, others = tile, [], []
        bands: dict[Expr, Band] = {}
        for part in condition.args:
            left = self._narrowed(part, narrowed)
            if left is None:
                others.append(part)
                band = band_of(part, self.is_uniform)
                if band:
                    bands[band.remainder] = band.within(bands.get(band.remainder, band))
            else:
                truths.append(_Truth(self.truth(part, narrowed).may, self.truth(part, tile).must))
                narrowed = left
        whole = replace(tile, known=narrowed.known)  # where they must hold they leave all of it
        truths += [_Truth(self.truth(part, narrowed).may, self.truth(part, whole).must) for part in others]
        may = [band.may_meet(self.bounds(band.remainder.args[0], narrowed)) for band in bands.values()]
        may += [each.may for each in truths]
        return _Truth(conjunction(may), conjunction(each.must for each in truths))

    def _narrowed(self, part: Expr, tile: _Tile) -> _Tile | None:
        """The part of the tile where a comparison of one index with a uniform number holds; None for all others."""
        if part in tile.known:
            return tile
        if part.op not in ("le", "eq") or len(self._truths) > _MAX_TRUTHS:
            return None
        coefficients, constant = affine_parts(part.args[0])
        mixed = [atom for atom in coefficients if not self.is_uniform(atom)]
        if len(mixed) != 1 or mixed[0].op != "name":
            return None
        factor = coefficients.pop(mixed[0])
        rest = affine(coefficients, constant)
        q_idx, kv_idx = (
            _cut(bounds, factor, rest, part.op == "eq") if mixed[0].name == index else bounds
            for index, bounds in (("q_idx", tile.q_idx), ("kv_idx", tile.kv_idx))
        )
        return _Tile(q_idx, kv_idx, tile.known | {part})

    def _comparison(self, condition: Expr, tile: _Tile) -> _Truth:
        """A comparison of an affine form with 0."""
        band = band_of(condition, self.is_uniform)
        if band:
            dividend = self.bounds(band.remainder.args[0], tile)
            return _Truth(band.may_meet(dividend), band.must_hold(dividend))
        bounds = self.bounds(condition.args[0], tile)
        zero = const(0)
        if condition.op == "le":
            return _Truth(less_equal(bounds.lo, zero), less_equal(bounds.hi, zero))
        meet = conjunction([less_equal(bounds.lo, zero), less_equal(zero, bounds.hi)])
        return _Truth(meet, conjunction([less_equal(zero, bounds.lo), less_equal(bounds.hi, zero)]))

    def _bounds_of(self, number: Expr, tile: _Tile) -> Bounds:
        if number.op == "name" and number.name != "score":
            return tile.q_idx if number.name == "q_idx" else tile.kv_idx
        if number.op == "lookup":
            if not self._has_tables:
                return _ANY_NUMBER[number.type]
            table = self.tables.of(number)
            return Bounds(table.least, table.greatest)
        if number.op == "where":
            return self._choice(number, tile)
        if number.op == "mul":
            return intervals.multiple(int(number.args[0].value), self.bounds(number.args[1], tile))
        parts = [self.bounds(arg, tile) for arg in number.args]
        if number.op == "add":
            return intervals.total(parts)
        if number.op == "call":
            return real_intervals.function(number.name, *parts)
        if number.op != "arith":
            raise InternalError(f"{number} has no bounds over a tile")
        if number.type == "f32":
            return real_intervals.arithmetic(number.name, *parts)
        if number.name == "*":
            return intervals.product(*parts)
        divide = intervals.quotient if number.name == "//" else intervals.remainder
        dividend, divisor = parts
        return divide(dividend, divisor, index_range(number.args[1]))

    def _choice(self, choice: Expr, tile: _Tile) -> Bounds:
        """The branch that the condition decides for, or both."""
        condition, yes, no = choice.args
        truth = self.truth(condition, tile)
        if_yes = self.bounds(yes, self._where_it_holds(condition, tile))
        if_no = self.bounds(no, self._where_it_holds(negate(condition), tile))
        if truth.may is truth.must:
            return Bounds(where(truth.may, if_yes.lo, if_no.lo), where(truth.may, if_yes.hi, if_no.hi))
        either = real_intervals.either(if_yes, if_no)
        return Bounds(
            where(truth.must, if_yes.lo, where(truth.may, either.lo, if_no.lo)),
            where(truth.must, if_yes.hi, where(truth.may, either.hi, if_no.hi)),
        )

    def _where_it_holds(self, condition: Expr, tile: _Tile) -> _Tile:
        """The tile narrowed by a condition; after many readings no more, since choices of choices double them."""
        if len(self._bounds) > _MAX_READINGS:
            return tile
        for part in condition.args if condition.op == "and" else (condition,):
            tile = self._narrowed(part, tile) or tile
        return tile


def _cut(index: Bounds, factor: int, rest: Expr, is_equal: bool) -> Bounds:
    """What is left of an index where factor · index + rest <= 0, or == 0."""
    size = const(abs(factor))
    # -rest / factor, rounded down as an upper and up as a lower bound.
    below = floor_divide(scale(-1, rest) if factor > 0 else rest, size)
    above = scale(-1, floor_divide(rest if factor > 0 else scale(-1, rest), size))
    return Bounds(
        greater(index.lo, above) if factor < 0 or is_equal else index.lo,
        lesser(index.hi, below) if factor > 0 or is_equal else index.hi,
    )

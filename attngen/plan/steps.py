"""The Steps: the whole vocabulary of a program. Data only.

Each Step has one name in three places: the class here, the Jinja macro in `templates/steps`, the function in
`attngen.simulate`. `str(step)` is its line in a listing. A program is a tuple of Steps; the order is the schedule.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from attngen.expr import Expr, KeyRange
from attngen.plan.places import (
    BlockIndex,
    Cursor,
    Descales,
    NamedBarriers,
    Range,
    RegTile,
    RegVec,
    Rows,
    Tensor,
    View,
    Walk,
)


@dataclass(frozen=True)
class Step:
    """Base of all Steps."""


Program = tuple[Step, ...]


# ---- control ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ForTiles(Step):
    """Run the body for every tile that the scheduler gives this block."""

    body: Program

    def __str__(self) -> str:
        return "for each tile of this block:"


@dataclass(frozen=True)
class ForBlocks(Step):
    """Run the body for every block of a range; `index` names the loop's variable."""

    range: Range
    index: Literal["m", "n"]
    body: Program

    def __str__(self) -> str:
        return f"for {self.index} in {self.range} ({self.range.tile_class} tiles):"


Condition = Literal["tile has blocks", "scale is negative", "m sees n", "last warpgroup"]
"""Closed set of run-time conditions, uniform over the warpgroup. `m sees n`: the mask lets some row of block m see
some key of block n."""


@dataclass(frozen=True)
class When(Step):
    """Run the body where a uniform condition holds."""

    condition: Condition
    body: Program

    def __str__(self) -> str:
        return f"when {self.condition}:"


@dataclass(frozen=True)
class WhenBlock(Step):
    """Run the body where block `block` is not left of `first`, that is, exists."""

    block: BlockIndex
    first: BlockIndex
    body: Program

    def __str__(self) -> str:
        return f"when {self.block} >= {self.first}:"


@dataclass(frozen=True)
class StartWalk(Step):
    """Stand before the first block of keys that the tile visits."""

    walk: Walk

    def __str__(self) -> str:
        return f"start {self.walk}, a walk over the blocks of keys that the mask shows"


@dataclass(frozen=True)
class WhenNext(Step):
    """Go on to the next block of a walk; run the body where there is one."""

    walk: Walk
    body: Program

    def __str__(self) -> str:
        return f"go on with {self.walk}; when there is a next block:"


@dataclass(frozen=True)
class ForVisited(Step):
    """Run the body for every block that a walk still comes to."""

    walk: Walk
    body: Program

    def __str__(self) -> str:
        return f"for each further block of {self.walk}:"


@dataclass(frozen=True)
class WhenVisited(Step):
    """Run the body where a walk has come to some block."""

    walk: Walk
    body: Program

    def __str__(self) -> str:
        return f"when {self.walk} has come to a block:"


@dataclass(frozen=True)
class WhenPartial(Step):
    """Run the body where the mask, or the end of the keys, hides some pair of the block that a walk stands at."""

    walk: Walk
    body: Program

    def __str__(self) -> str:
        return f"when the block of {self.walk} is partial:"


@dataclass(frozen=True)
class ReadTile(Step):
    """Work out the tile anew, so that nothing of it is kept in registers across the loops before."""

    def __str__(self) -> str:
        return "read the tile again"


# ---- synchronisation --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class SyncThreads(Step):
    """Wait for all threads of the block; orders their shared and device memory accesses."""

    def __str__(self) -> str:
        return "sync threads"


@dataclass(frozen=True)
class WaitFull(Step):
    """Wait until the stage that the cursor stands at has been filled.

    Attributes:
        together: the compiler is told that a warp's threads go on together, which keeps what follows in uniform
            registers but takes a vote: for waits outside the loops over keys.
    """

    cursor: Cursor
    together: bool = False

    def __str__(self) -> str:
        return f"wait until {self.cursor.name} is full"


@dataclass(frozen=True)
class WaitEmpty(Step):
    """Wait until every consumer has released the stage that the cursor stands at."""

    cursor: Cursor

    def __str__(self) -> str:
        return f"wait until {self.cursor.name} is empty"


@dataclass(frozen=True)
class Release(Step):
    """Hand the stage back to its producer; one thread of the warpgroup arrives."""

    cursor: Cursor

    def __str__(self) -> str:
        return f"release {self.cursor.name}"


@dataclass(frozen=True)
class TakeTurn(Step):
    """Wait for this warpgroup's turn to issue GEMMs."""

    turn: NamedBarriers

    def __str__(self) -> str:
        return "take turn"


@dataclass(frozen=True)
class PassTurn(Step):
    """Give the turn to the next warpgroup, without waiting."""

    turn: NamedBarriers

    def __str__(self) -> str:
        return "pass turn to the next warpgroup"


@dataclass(frozen=True)
class SyncWarpgroup(Step):
    """Wait for all threads of the warpgroup; orders their shared memory accesses."""

    barriers: NamedBarriers

    def __str__(self) -> str:
        return "sync warpgroup"


@dataclass(frozen=True)
class FenceAsync(Step):
    """Let the copy engine and wgmma see what this thread's ordinary stores wrote to shared memory."""

    def __str__(self) -> str:
        return "fence: stores before asynchronous reads"


@dataclass(frozen=True)
class Advance(Step):
    """Move a cursor to the next stage of its ring."""

    cursor: Cursor

    def __str__(self) -> str:
        return f"advance {self.cursor.name}"


# ---- copies -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LoadTile(Step):
    """Start copying a block of rows of this tile's head to shared memory, asynchronously.

    Attributes:
        bounded: rows past the sequence may occur; they arrive as zeros.
    """

    dst: View
    src: Tensor
    block: BlockIndex
    bounded: bool

    def __str__(self) -> str:
        return f"load {self.dst} <- {self.src}[{self.block}]" + (
            " (zeros past the end)" if self.bounded else ""
        )


@dataclass(frozen=True)
class CommitCopies(Step):
    """Close the group of copies started since the last commit; a group may be empty."""

    def __str__(self) -> str:
        return "commit copies"


@dataclass(frozen=True)
class WaitCopies(Step):
    """Wait until at most `pending` of this thread's groups of copies are in flight, the newest ones."""

    pending: int

    def __str__(self) -> str:
        return "wait for copies" + (f", {self.pending} newest may be in flight" if self.pending else "")


@dataclass(frozen=True)
class CopyTile(Step):
    """Round an accumulator to the type of a buffer and write it there."""

    src: RegTile
    dst: View

    def __str__(self) -> str:
        return f"copy {self.dst} <- {self.src}"


@dataclass(frozen=True)
class StoreTile(Step):
    """Write a buffer to a block of rows in device memory; rows past the sequence are dropped."""

    src: View
    dst: Tensor
    block: BlockIndex

    def __str__(self) -> str:
        return f"store {self.dst}[{self.block}] <- {self.src}"


@dataclass(frozen=True)
class LoadFragment(Step):
    """Read an accumulator from a block of rows in device memory; rows past the sequence read as zero."""

    dst: RegTile
    src: Tensor
    block: BlockIndex

    def __str__(self) -> str:
        return f"load {self.dst} <- {self.src}[{self.block}]"


@dataclass(frozen=True)
class StoreFragment(Step):
    """Write an accumulator to a block of rows in device memory; rows past the sequence are dropped."""

    src: RegTile
    dst: Tensor
    block: BlockIndex

    def __str__(self) -> str:
        return f"store {self.dst}[{self.block}] <- {self.src}"


@dataclass(frozen=True)
class LoadRows(Step):
    """Read one value per row from device memory."""

    dst: RegVec
    src: Rows
    block: BlockIndex

    def __str__(self) -> str:
        return f"load {self.dst} <- {self.src}[{self.block}]"


@dataclass(frozen=True)
class StoreRows(Step):
    """Write one value per row to device memory."""

    src: RegVec
    dst: Rows
    block: BlockIndex

    def __str__(self) -> str:
        return f"store {self.dst}[{self.block}] <- {self.src}"


@dataclass(frozen=True)
class TmaLoad(Step):
    """Have the copy engine fill the stage of a ring with a block of rows of this tile's head; `full` tells when.

    Rows past the sequence and columns past the head dim arrive as zeros.

    Attributes:
        keep: what the L2 cache is to do with the lines.
    """

    dst: View
    src: Tensor
    block: BlockIndex
    keep: Literal["evict_first", "evict_last"]

    def __str__(self) -> str:
        return f"load {self.dst} <- {self.src}[{self.block}]"


@dataclass(frozen=True)
class StageTile(Step):
    """Round an accumulator to the type of a buffer in panels and write it there, each warp its rows."""

    src: RegTile
    dst: View

    def __str__(self) -> str:
        return f"stage {self.dst} <- {self.src}"


@dataclass(frozen=True)
class TmaStore(Step):
    """Have the copy engine write this warpgroup's rows of a buffer to device memory; what lies past it is dropped."""

    src: View
    dst: Tensor
    block: BlockIndex

    def __str__(self) -> str:
        return f"store {self.dst}[{self.block}] <- {self.src}"


@dataclass(frozen=True)
class WaitStores(Step):
    """Wait until the copy engine has read what this warpgroup's stores were to write."""

    def __str__(self) -> str:
        return "wait until the stores have read shared memory"


# ---- GEMM -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ScoreGemm(Step):
    """acc = a bᵀ, both row by row in shared memory (contraction over their columns). Synchronous.

    Attributes:
        unroll: k-steps of the matrix instruction that are written out; fewer need fewer registers.
    """

    acc: RegTile
    a: View
    b: View
    unroll: int

    def __str__(self) -> str:
        return f"{self.acc} = {self.a} {self.b}ᵀ"


@dataclass(frozen=True)
class OutputGemm(Step):
    """acc += a b, a in registers, the rows of b in shared memory contracted. Synchronous."""

    acc: RegTile
    a: RegTile
    b: View

    def __str__(self) -> str:
        return f"{self.acc} += {self.a} {self.b}"


@dataclass(frozen=True)
class IssueScoreGemm(Step):
    """Start acc = a bᵀ on the tensor core, both in shared memory, and close the group. Asynchronous."""

    acc: RegTile
    a: View
    b: View

    def __str__(self) -> str:
        return f"issue {self.acc} = {self.a} {self.b}ᵀ"


@dataclass(frozen=True)
class IssueOutputGemm(Step):
    """Start acc += a b, a in registers, the keys of b in shared memory contracted, and close the group.

    Attributes:
        starts_at_zero: acc = a b instead.
        first_column: of b, where it has more columns than acc.
    """

    acc: RegTile
    a: RegTile
    b: View
    starts_at_zero: bool = False
    first_column: int = 0

    def __str__(self) -> str:
        some = f", columns from {self.first_column} on" if self.first_column else ""
        return f"issue {self.acc} {'=' if self.starts_at_zero else '+='} {self.a} {self.b}{some}"


@dataclass(frozen=True)
class WaitGemm(Step):
    """Wait until at most `pending` groups of this warpgroup's GEMMs are in flight, the newest ones.

    Attributes:
        lands: the register tiles that are the warpgroup's own again: accumulators and A operands.
    """

    pending: int
    lands: tuple[RegTile, ...]

    def __str__(self) -> str:
        newest = f", {self.pending} newest may be in flight" if self.pending else ""
        return f"wait for {', '.join(map(str, self.lands))}{newest}"


# ---- scales of 8-bit operands -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class ReadRowScales(Step):
    """dst = the scale of scores, times Q's descale of each row, and times K's where a whole head has one.

    Attributes:
        in_natural_units: the scale is softmax_scale, as modified scores want it, else that in log2 units. Those meet
            scores of -inf, and are never less than FLT_MIN: -inf times it stays -inf.
    """

    dst: RegVec
    q: Descales
    k: Descales | None
    rows: BlockIndex
    in_natural_units: bool

    def __str__(self) -> str:
        scale = "softmax_scale" if self.in_natural_units else "softmax_scale log2(e)"
        return f"{self.dst} = {' '.join(map(str, (scale, self.q, self.k) if self.k else (scale, self.q)))}"


@dataclass(frozen=True)
class StageScales(Step):
    """Leave the descales of a block of keys in shared memory for its consumers, before its stage is said to be full.

    Attributes:
        k: None where consumers read K's by themselves.
    """

    dst: View
    k: Descales | None
    v: Descales
    block: BlockIndex

    def __str__(self) -> str:
        of = f"{self.k}, {self.v}" if self.k else str(self.v)
        return f"stage {self.dst} <- {of} of block {self.block}"


@dataclass(frozen=True)
class ReadScoreScale(Step):
    """dst = src times K's descale of a block of keys; units as of ReadRowScales."""

    dst: RegVec
    src: RegVec
    staged: View
    in_natural_units: bool

    def __str__(self) -> str:
        return f"{self.dst} = {self.src} times K's in {self.staged}"


@dataclass(frozen=True)
class ScaleKeys(Step):
    """s = s times K's descale of each key."""

    s: RegTile
    k: Descales
    block: BlockIndex

    def __str__(self) -> str:
        return f"{self.s} = {self.s} times {self.k} of each key"


@dataclass(frozen=True)
class ReadTopScale(Step):
    """top = V's largest descale of this head."""

    top: RegVec
    v: Descales

    def __str__(self) -> str:
        return f"{self.top} = largest {self.v}"


@dataclass(frozen=True)
class ReadValueWeight(Step):
    """weight = V's descale of a block of keys in relation to the largest, at least 2^-32; P takes it up."""

    weight: RegVec
    top: RegVec
    staged: View

    def __str__(self) -> str:
        return f"{self.weight} = V's in {self.staged} / {self.top}"


@dataclass(frozen=True)
class CopyRows(Step):
    """dst = src, a value per row."""

    dst: RegVec
    src: RegVec

    def __str__(self) -> str:
        return f"{self.dst} = {self.src}"


@dataclass(frozen=True)
class Promote(Step):
    """o = o times a factor per row, plus what the tensor core added up: its own sums keep fewer bits than f32.

    Attributes:
        first_column: of o, where it has more columns than the part.
    """

    o: RegTile
    part: RegTile
    by: RegVec
    first_column: int = 0

    def __str__(self) -> str:
        some = f", columns from {self.first_column} on" if self.first_column else ""
        return f"{self.o} = {self.by} {self.o} + {self.part}{some}"


# ---- softmax ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Clear(Step):
    """Fill registers with 0, or with -inf."""

    dst: RegTile | RegVec
    value: Literal["0", "-inf"] = "0"

    def __str__(self) -> str:
        return f"{self.dst} = {self.value}"


@dataclass(frozen=True)
class NegateTile(Step):
    """Flip the sign of a tile in shared memory: what a negative softmax_scale asks of Q."""

    tile: View

    def __str__(self) -> str:
        return f"{self.tile} = -{self.tile}"


@dataclass(frozen=True)
class LookUp(Step):
    """Load an element of a tensor for each pair of a block, in the layout of P; memory answers under what follows."""

    dst: RegTile
    rows: BlockIndex
    block: BlockIndex
    lookup: Expr

    def __str__(self) -> str:
        return f"{self.dst} = {self.lookup} of each pair"


@dataclass(frozen=True)
class ModifyScores(Step):
    """s = the spec's score of each pair, in natural units; its `score` is s scaled by softmax_scale, or by `scale`.

    Attributes:
        looked_up: lookups of the score that a LookUp has put into registers.
    """

    s: RegTile
    rows: BlockIndex
    block: BlockIndex
    score: Expr
    scale: RegVec | None = None
    looked_up: tuple[tuple[Expr, RegTile], ...] = ()

    def __str__(self) -> str:
        return f"{self.s} = score of each pair, from scaled {self.s}"


@dataclass(frozen=True)
class MaskScores(Step):
    """Set the scores of invisible keys to -inf; what a row sees is an interval of keys, known in closed form."""

    s: RegTile
    rows: BlockIndex
    block: BlockIndex
    visible: KeyRange

    def __str__(self) -> str:
        return f"{self.s} = -inf where masked, or past the last key"


@dataclass(frozen=True)
class MaskScoresEach(Step):
    """Set the scores of invisible keys to -inf, asking the mask for each pair of row and key."""

    s: RegTile
    rows: BlockIndex
    block: BlockIndex
    mask: Expr

    def __str__(self) -> str:
        return f"{self.s} = -inf where masked, or past the last key (asked for each)"


@dataclass(frozen=True)
class RowMax(Step):
    """row_max = max(row_max, scaled maxima of s); alpha = 2^(old row_max - new). Units: log2, scaled.

    Attributes:
        scale: of each row, and group of columns; the call's softmax_scale where None.
    """

    s: RegTile
    row_max: RegVec
    alpha: RegVec
    scale: RegVec | None = None

    def __str__(self) -> str:
        return f"{self.row_max}, {self.alpha} = running maximum of {self.s}, rescale factor"


@dataclass(frozen=True)
class Exponentiate(Step):
    """s = 2^(scaled s - row_max); row_sum = alpha row_sum + sums of s.

    Attributes:
        scale: as in `RowMax`.
        lift: s = 2^lift times that, and so are the sums.
        weight: s is multiplied by that as well; the sums are not.
    """

    s: RegTile
    row_max: RegVec
    row_sum: RegVec
    alpha: RegVec
    scale: RegVec | None = None
    lift: int = 0
    weight: RegVec | None = None

    def __str__(self) -> str:
        return f"{self.s} = exp2(scaled {self.s} - {self.row_max}); {self.row_sum} = {self.alpha} {self.row_sum} + sums"


@dataclass(frozen=True)
class ConvertP(Step):
    """Round probabilities to the input type, as the A operand of the second GEMM."""

    s: RegTile
    p: RegTile

    def __str__(self) -> str:
        return f"{self.p} = {self.s} rounded to {self.p.dtype.name}"


@dataclass(frozen=True)
class ScaleRows(Step):
    """Multiply every row of an accumulator by its factor.

    Attributes:
        votes: a warp all of whose factors are 1 leaves its rows alone, which changes no value.
    """

    o: RegTile
    by: RegVec
    votes: bool = False

    def __str__(self) -> str:
        return f"{self.o} = {self.o} * {self.by}" + (
            ", unless they are 1 in the whole warp" if self.votes else ""
        )


@dataclass(frozen=True)
class ReduceRows(Step):
    """Add up the parts of a row's sum that its lanes hold."""

    total: RegVec
    part: RegVec

    def __str__(self) -> str:
        return f"{self.total} = {self.part} added over the lanes"


@dataclass(frozen=True)
class FinishRows(Step):
    """inv_sum = top / row_sum, or 0 for a row that saw no key; lse = natural log-sum-exp, or -inf.

    Attributes:
        lift: the sums are 2^lift times what they mean.
        top: what inv_sum is multiplied by; 1 where None.
    """

    row_max: RegVec
    row_sum: RegVec
    inv_sum: RegVec
    lse: RegVec
    lift: int = 0
    top: RegVec | None = None

    def __str__(self) -> str:
        return f"{self.inv_sum}, {self.lse} = {self.top or 1} / {self.row_sum}, log-sum-exp"


# ---- scheduler --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class DrawTile(Step):
    """Draw the number of the next tile from the counter of the launch, and publish it to the consumers."""

    cursor: Cursor

    def __str__(self) -> str:
        return f"draw the next tile, publish it in {self.cursor.name}"


@dataclass(frozen=True)
class TakeTile(Step):
    """Go on to the tile whose number the producer published."""

    cursor: Cursor

    def __str__(self) -> str:
        return f"take the next tile from {self.cursor.name}"


@dataclass(frozen=True)
class Note(Step):
    """A heading for readers; it does nothing."""

    text: str

    def __str__(self) -> str:
        return f"# {self.text}"


STEPS: tuple[type[Step], ...] = tuple(Step.__subclasses__())
"""Every kind of Step."""

CONDITIONS: tuple[str, ...] = get_args(Condition)


_HoldsSteps = ForTiles | ForBlocks | ForVisited | When | WhenBlock | WhenNext | WhenVisited | WhenPartial


def body_of(step: Step) -> Program:
    """The Steps inside a control Step; nothing for the others."""
    return step.body if isinstance(step, _HoldsSteps) else ()


def walk(program: Program) -> Iterator[Step]:
    """Every Step of a program, outer before inner, in order."""
    for step in program:
        yield step
        yield from walk(body_of(step))


def listing(program: Program, indent: int = 0) -> str:
    """The program as text, one line a Step."""
    lines = []
    for step in program:
        lines.append("  " * indent + str(step))
        if body := body_of(step):
            lines.append(listing(body, indent + 1))
    return "\n".join(lines)

"""Places: what a Step reads and writes. Objects, never text.

A place is declared once in a kernel plan and referred to by object. Device memory: `Tensor`, `Rows`. Shared
memory: `Buffer`, seen through a `View` that picks the stage a `Cursor` stands at. Registers: `RegTile`, `RegVec`.
Block indices are a variable or a bound of the tile plus a constant (`BlockIndex`). No number is decided here.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import gcd
from typing import ClassVar, Literal

from attngen.dtypes import DType

CHUNK_BYTES = 16
"""What one cp.async or one ldmatrix row moves; the unit of the swizzle."""
BANK_BYTES = 128
"""What shared memory serves in one clock: 32 banks of 4 bytes."""
MBARRIER_BYTES = 8
WARPGROUP_WARPS = 4
WARPGROUP_THREADS = 32 * WARPGROUP_WARPS

Axis = Literal["queries", "keys", "qk_columns", "v_columns"]
"""What a dimension of a place runs along: rows of Q, rows of K and V, columns of Q and K, columns of V and O."""
LENGTHS: dict[Axis, str] = {"queries": "seqlen_q", "keys": "seqlen_k"}
"""The sizes of axes that run along a sequence."""
ROWS_OF_Q: tuple[Axis, ...] = ("queries", "qk_columns")
ROWS_OF_K: tuple[Axis, ...] = ("keys", "qk_columns")
ROWS_OF_V: tuple[Axis, ...] = ("keys", "v_columns")
ROWS_OF_O: tuple[Axis, ...] = ("queries", "v_columns")
SCORES: tuple[Axis, ...] = ("queries", "keys")


def sequence_of(axes: Iterable[Axis]) -> Axis:
    """The one of some axes that runs along a sequence."""
    return next(axis for axis in axes if axis in LENGTHS)


PADDED_ROWS = 128
"""What rows of a head are padded to where blocks are read whole: the most rows of a block that does so."""
PANEL_BYTES = 128
"""The widest row that the copy engine swizzles. Source: CUDA driver API, CU_TENSOR_MAP_SWIZZLE_128B."""


@dataclass(frozen=True)
class Swizzle:
    """Where the 16-byte chunk `chunk` of row `row` stands, so that eight rows of one column never share a bank.

    Rows follow one another without padding. With `pitch` chunks a row, g = gcd(pitch, 8) says how many
    neighbouring chunks may be exchanged; the exchange changes every 8 / g rows. Then the eight chunks that one
    ldmatrix phase reads (one column, eight rows) fall on the eight 16-byte groups of the banks: pitch * row takes
    8 / g different multiples of g, and the XOR takes the g values between them.
    """

    pitch: int

    @property
    def span(self) -> int:
        """How many neighbouring chunks are exchanged: a power of two up to 8."""
        return gcd(self.pitch, BANK_BYTES // CHUNK_BYTES)

    @property
    def rows_per_step(self) -> int:
        """After how many rows the exchange changes."""
        return BANK_BYTES // CHUNK_BYTES // self.span

    def physical_chunk(self, row: int, chunk: int) -> int:
        """The chunk of the row where logical chunk `chunk` is kept."""
        return chunk ^ (row // self.rows_per_step % self.span)

    def address(self, row: int, chunk: int) -> int:
        """Byte offset of a chunk from the start of the tile."""
        return (row * self.pitch + self.physical_chunk(row, chunk)) * CHUNK_BYTES


@dataclass(frozen=True)
class Ring:
    """Stages that a producer fills and consumers empty, each guarded by two mbarriers.

    `full` of a stage completes when its producer has arrived and the bytes it announced have landed; `empty` when
    every consumer warpgroup has released the stage. A ring without buffers carries a tile's number.

    Attributes:
        read_by_threads: consumers load from the stages themselves, which no GEMM waits for, so each warp releases what
            it has read; else one thread does for its warpgroup.
        filled_by_warp: the producer's lanes store to the stages besides, and each of them arrives.
        loads: of the copy engine by which a stage is filled, and with each of which the producer arrives; or
            warpgroups that fill it.
        filled_by_threads: warpgroups store to the stages, and each warp says so for itself.
        copies: how many there are of it, one a consumer warpgroup, which hands its stages to a warp of its own.
    """

    name: str
    stages: int
    read_by_threads: bool = False
    filled_by_warp: bool = False
    loads: int = 1
    filled_by_threads: bool = False
    copies: int = 1

    @property
    def fills(self) -> int:
        """Arrivals by which a stage is filled: of a warp that does so for itself, those of its last quad of lanes."""
        if self.filled_by_threads:
            return self.loads * WARPGROUP_WARPS * 4
        return 32 if self.filled_by_warp else self.loads

    @property
    def releases(self) -> int:
        """Arrivals by which a consumer warpgroup releases a stage: of a warp, those of its last quad of lanes."""
        return WARPGROUP_WARPS * 4 if self.read_by_threads else 1

    @property
    def size_bytes(self) -> int:
        """Bytes of its mbarriers in shared memory."""
        return 2 * MBARRIER_BYTES * self.stages * self.copies


@dataclass(frozen=True)
class NamedBarriers:
    """One hardware barrier per warpgroup, `first` onwards, at which the threads of `parties` warpgroups meet.

    Source: PTX ISA, bar.sync and bar.arrive; 16 a block, of which 0 is __syncthreads.

    Attributes:
        is_common: all warpgroups have one and the same.
    """

    name: str
    first: int
    parties: int
    is_common: bool = False

    @property
    def threads(self) -> int:
        """Threads that meet."""
        return self.parties * WARPGROUP_THREADS


@dataclass(frozen=True)
class Cursor:
    """Which stage of a ring a role works on next; it only moves by an `Advance` step.

    Attributes:
        ring: the mbarriers that guard the stages; without one, other Steps order their use.
        fills: the role fills the stages; it finds all of them empty at first.
    """

    name: str
    stages: int
    ring: Ring | None = None
    fills: bool = False


Share = Literal["rows", "columns"]
"""Which of them warpgroups share where each has a part of a tile as its own."""


@dataclass(frozen=True)
class Buffer:
    """A tile in shared memory, `stages` times.

    Attributes:
        axes: of its rows and of its columns; a single row has none, and the other axis stands alone.
        rows, cols: of one stage; cols is padded to the matrix instruction, columns from `valid_cols` on are zero.
        offset: bytes from the start of the block's shared memory.
        overlays: name of the buffer whose bytes this one reuses after that one's last use, or None.
        in_panels: columns in panels of 128 bytes one after another, as the copy engine and wgmma want them, rather
            than row after row. Eight rows of a panel exchange their chunks.
        shared_by: what of it a warpgroup has as its own, where it has some.
    """

    name: str
    dtype: DType
    axes: tuple[Axis, ...]
    rows: int
    cols: int
    valid_cols: int
    stages: int = 1
    offset: int = 0
    overlays: str | None = None
    in_panels: bool = False
    shared_by: Share = "rows"

    @property
    def is_transposed(self) -> bool:
        """Whether a row is a column of a tensor, and a sequence runs along it."""
        return self.axes[-1] in LENGTHS

    @property
    def sequence_extent(self) -> int:
        """How much of its sequence a stage holds."""
        return self.cols if self.is_transposed else self.rows

    @property
    def stage_bytes(self) -> int:
        """Bytes of one stage."""
        if self.in_panels:
            return self.panels * self.panel_bytes
        return self.rows * self.cols * self.dtype.bits // 8

    @property
    def panels(self) -> int:
        """Panels of 128 bytes that a row spans; what the last one has beyond `cols` is zero."""
        return -(-self.cols * self.dtype.bits // 8 // PANEL_BYTES)

    @property
    def panel_bytes(self) -> int:
        """Bytes of all rows of one panel."""
        return self.rows * PANEL_BYTES

    @property
    def size_bytes(self) -> int:
        """Bytes of all stages."""
        return self.stage_bytes * self.stages

    @property
    def pitch_chunks(self) -> int:
        """16-byte chunks in a row."""
        return self.cols * self.dtype.bits // 8 // CHUNK_BYTES

    @property
    def swizzle(self) -> Swizzle:
        """How the chunks of a row are exchanged against bank conflicts."""
        return Swizzle(self.pitch_chunks)

    def at(self, cursor: Cursor | None = None) -> "View":
        """The stage that `cursor` stands at; without a cursor, the only one."""
        return View(self, cursor)


@dataclass(frozen=True)
class View:
    """One stage of a buffer, or the rows, or columns, of it that belong to the warpgroup at work."""

    buffer: Buffer
    cursor: Cursor | None
    own_rows: bool = False

    @property
    def own(self) -> "View":
        """The part of the warpgroup at work."""
        return View(self.buffer, self.cursor, own_rows=True)

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Of its rows and of its columns."""
        return self.buffer.axes

    def __str__(self) -> str:
        stage = f"[{self.cursor.name}]" if self.cursor and self.cursor.stages > 1 else ""
        return self.buffer.name + stage + (f" (own {self.buffer.shared_by})" if self.own_rows else "")


@dataclass(frozen=True)
class Tensor:
    """A tensor in device memory, (batch, seqlen, heads, cols), of which a tile is a block of rows of one head.

    Attributes:
        axes: of its rows and of its columns. Where the second runs along a sequence it is (batch, heads, cols, seqlen)
            instead, as `attngen.quantize.Operands` has V; a tile is then a block of the sequence, of all columns.
        cols: how many there are of the axis that is no sequence.
        heads: whose heads it has, "q" or "kv".
        workspace: made by the launch, dense (batch, heads, seqlen, cols), rather than passed by the user.
        optional: a call may not ask for it; then nothing is written, or read.
        is_packed: a tile's rows are those of all query heads that share its keys: row i * group + j is row i of head j.
    """

    name: str
    dtype: DType
    axes: tuple[Axis, ...]
    cols: int
    heads: Literal["q", "kv"]
    workspace: bool = False
    optional: bool = False
    is_packed: bool = False

    @property
    def axis(self) -> Axis:
        """The sequence that it is of."""
        return sequence_of(self.axes)

    @property
    def is_transposed(self) -> bool:
        """Whether its rows are columns, along which the sequence runs."""
        return self.axis == self.axes[1]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Descales:
    """What the numbers of an 8-bit tensor are multiplied by to be real ones: f32 in device memory.

    Attributes:
        axis: the sequence whose rows they are for.
        heads: whose heads have their own, "q" or "kv".
        granule: rows of a head that share one; None where all do.
    """

    name: str
    axis: Axis
    heads: Literal["q", "kv"]
    granule: int | None

    def __str__(self) -> str:
        return self.name

    @property
    def dimensions(self) -> tuple[str, ...]:
        """What it has one for each of."""
        return ("batch", "head") if self.granule is None else ("batch", "head", "granule")


@dataclass(frozen=True)
class Rows:
    """One f32 per row of a sequence in device memory, dense (batch, num_heads_q, seqlen).

    Attributes:
        axis: the sequence.
        is_padded: each head has whole blocks of `PADDED_ROWS`; who writes it writes what follows the sequence too.
        optional: the user may not ask for it; then nothing is written.
        workspace: made by the launch rather than passed by the user.
        is_packed: as of `Tensor`.
    """

    name: str
    axis: Axis
    optional: bool = False
    workspace: bool = False
    is_padded: bool = False
    is_packed: bool = False

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class QueryRanks:
    """How many blocks of keys have added to the sums of a block of queries: a u32 for each part of it.

    Dense (batch, num_heads_q, rows / block_m, owners) in device memory, of ragged queries without batches; rows as of
    `Rows` that are padded.

    Attributes:
        block_m: queries of a block.
        owners: warpgroups, of which each adds its part.
    """

    axis: ClassVar[Axis] = "queries"

    name: str
    block_m: int
    owners: int

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class QuerySums:
    """Sums of f32 for each row of queries in device memory, to which many blocks of threads add.

    Dense (batch, num_heads_q, rows, cols), of ragged queries without batches; rows as of `Rows` that are padded. The
    elements of a tile of `block_m` rows stand as the registers of accumulators do that are added: by warpgroup, warp,
    four registers, lane.

    Attributes:
        cols: of a row; those past the last of the tensor are zeros.
        shared_by: what of a tile a warpgroup adds.
        ranks: by which they add in one order; None where any will do.
    """

    axis: ClassVar[Axis] = "queries"
    axes: ClassVar[tuple[Axis, ...]] = ROWS_OF_Q

    name: str
    block_m: int
    cols: int
    shared_by: Share
    ranks: QueryRanks | None = None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class PartRows:
    """What a part of the keys has come to in each row of its tile: f32 in device memory, dense (tiles, rows).

    Attributes:
        cols: of an accumulator, which is (tiles, rows, cols); None where it is one number a row.
    """

    name: str
    cols: int | None = None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class RegTile:
    """A tile spread over the registers of a role's warps: rows, or columns, over warpgroups, then rows over warps.

    Attributes:
        axes: of its rows and of its columns.
        layout: "accumulator" (D of the matrix instruction, f32) or "a_fragment" (its A operand).
        valid_cols: columns that mean something; the others are zero.
        shared_by: what of it a warpgroup has.
        overlays: the tile whose registers it takes, where never both are wanted; both have as many a thread.
    """

    name: str
    dtype: DType
    axes: tuple[Axis, ...]
    rows: int
    cols: int
    valid_cols: int
    layout: Literal["accumulator", "a_fragment"]
    shared_by: Share = "rows"
    overlays: "RegTile | None" = None

    def registers_per_thread(self, warps: int) -> int:
        """32-bit registers that each of the warps' threads spends on it."""
        return self.rows * self.cols * self.dtype.bits // 32 // (32 * warps)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class RegVec:
    """One f32 per row of the role's tile, in registers.

    Attributes:
        axis: of the tile's rows.
        partial: each of the four lanes that share a row holds its own part, and their sum is meant.
        groups: of a tile's columns that have each a value of their own; None where a row has one for all of them.
        is_counted: the rule on registers counts it; NVRTC was seen to find room for the others.
    """

    name: str
    axis: Axis
    rows: int
    partial: bool = False
    groups: int | None = None
    is_counted: bool = True

    def registers_per_thread(self, warps: int) -> int:
        """32-bit registers that each of the warps' threads spends on it: four lanes share a row."""
        return self.rows * 4 // (32 * warps) * (self.groups or 1)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Walk:
    """A role's walk over the blocks that a tile visits, classed as it comes to them.

    A tile of queries visits blocks of keys, from right to left; one of keys visits blocks of queries, in their order.
    Past the last block it stays there.

    Attributes:
        name: of the variable that holds where it stands.
    """

    name: Literal["visit", "load"]

    @property
    def n(self) -> "BlockIndex":
        """The block it stands at."""
        return BlockIndex("visit.n" if self.name == "visit" else "load.n")

    def __str__(self) -> str:
        return self.name


Variable = Literal[
    "m",
    "n",
    "m_block",
    "n_block",
    "m_min",
    "m_full_begin",
    "m_full_end",
    "m_stop",
    "n_min",
    "n_full_begin",
    "n_full_end",
    "n_max",
    "zero",
    "m_max",
    "n_end",
    "visit.n",
    "visit.before",
    "load.n",
]
"""What a block index starts from: a loop's own index (m, n), a bound of the tile, 0, the number of blocks of rows
(m_max) and of keys (n_end) of the whole sequence, or where a walk stands."""


@dataclass(frozen=True)
class BlockIndex:
    """The number of a block of rows or keys: `base + offset`."""

    base: Variable
    offset: int = 0

    def __add__(self, offset: int) -> "BlockIndex":
        return BlockIndex(self.base, self.offset + offset)

    def __sub__(self, offset: int) -> "BlockIndex":
        return self + -offset

    def __str__(self) -> str:
        base = "0" if self.base == "zero" else self.base
        return base if not self.offset else f"{base} {'+' if self.offset > 0 else '-'} {abs(self.offset)}"


@dataclass(frozen=True)
class Range:
    """Blocks lo, lo + 1, ... hi - 1, or the same from right to left.

    Attributes:
        tile_class: what lowering knows of them: "partial" tiles compare, "full" tiles need not, "any" is unknown.
    """

    name: str
    lo: BlockIndex
    hi: BlockIndex
    descending: bool
    tile_class: Literal["full", "partial", "any"]

    def __str__(self) -> str:
        if self.descending:
            return f"{self.hi - 1} .. {self.lo} downwards"
        return f"{self.lo} .. {self.hi - 1}"

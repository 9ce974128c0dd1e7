"""A kernel of programs: places, roles, and every number. Numbers that change from call to call are `Formula`s."""

from dataclasses import dataclass
from typing import Literal

from attngen.arch import Arch
from attngen.dtypes import BF16, E4M3, F16, DType
from attngen.errors import InternalError
from attngen.expr import Boundary, Declarations, Expr, Table, TileClasses, name
from attngen.plan.cache_descales import CacheDescales
from attngen.plan.declared_places import BlockTables, Elements, PairMatrix
from attngen.plan.formulas import Formula, Guard, ceil_div, maximum, minimum, product, total
from attngen.plan.lengths import DENSE, LETTERS, PAGES_BY_ROW, Lengths
from attngen.plan.places import (
    Buffer,
    Cursor,
    Descales,
    NamedBarriers,
    PartRows,
    QueryRanks,
    QuerySums,
    RegTile,
    RegVec,
    Ring,
    Rows,
    Tensor,
)
from attngen.plan.quantizer import Quantizer
from attngen.plan.scheduler import QUERIES, Scheduler, SequenceAxis
from attngen.plan.seen import SeenBlocks
from attngen.plan.steps import Program, ReadSink, StartWalk, walk


@dataclass(frozen=True)
class Role:
    """Warps that run one program, and what is private to them.

    Attributes:
        warpgroups: how many groups of warps run the program, each on rows of its own, or on keys of its own where
            those are split and a group is a warp; one where the warps do not divide the work by groups.
        registers: registers a thread holds after setmaxnreg, or None where the launch decides.
        single_thread: one thread runs the program, the others idle.
    """

    name: str
    warps: int
    program: Program
    reg_tiles: tuple[RegTile, ...] = ()
    reg_vecs: tuple[RegVec, ...] = ()
    cursors: tuple[Cursor, ...] = ()
    warpgroups: int = 1
    registers: int | None = None
    single_thread: bool = False

    def __post_init__(self) -> None:
        if self.single_thread and any(isinstance(step, StartWalk) for step in walk(self.program)):
            raise InternalError(
                f"one thread of {self.name} cannot go on in a walk, whose blocks a warp classes"
            )


@dataclass(frozen=True)
class Param:
    """A field of the kernel's parameter struct: its C type and the run-time value it carries."""

    name: str
    ctype: Literal["pointer", "i64", "i32", "f32", "tensor_map"]
    value: str


@dataclass(frozen=True)
class TensorMap:
    """How the copy engine sees a tensor: (cols, seqlen, heads, batch), fastest first, in boxes of one head's rows.

    Attributes:
        tensor: whose; `value` of the parameter that carries it is "map.<tensor>".
        box_rows, box_cols: of one copy; box_cols spans 128 bytes, which are swizzled.
    """

    tensor: Tensor
    box_rows: int
    box_cols: int


def table_value(end: str, up_to: int | None) -> str:
    """The value that is an end of a table, of the kernel for calls of up to so many keys."""
    return end if up_to is None else f"{end}.k{up_to}"


@dataclass(frozen=True)
class Split:
    """How the keys of a tile are cut into parts.

    Attributes:
        keys: of a part, counted from its sequence's first; None where that is worked out by what all tiles of a call
            visit; parts of a tile are then as long as each other. Widths are tried by which there is about one part
            for each block of threads that the GPU holds at a time, and by which there are up to `waves`, for those that
            are done early. A call is guessed to take as long as its longest part where one wave has them all, and
            else as its keys dealt out evenly and half a part; each part takes `start` keys more than it has, and the
            parts of a tile are merged one after the other, `merged` rows in the time of a key.
        least: keys that a part has at least where that is worked out.
        start, waves: see keys.
        merged: see keys; None where rows are so few that merges do not count.
    """

    keys: int | None
    least: int
    start: int
    merged: int | None
    waves: int


@dataclass(frozen=True)
class KernelPlan:
    """One kernel of programs: everything lowering decided of it, from which it is emitted and simulated.

    Attributes:
        name: entry name; facts first, digest last.
        spec_digest, mask_text: of the spec it came from.
        mask, score: what is computed of each pair of query and key.
        score_factor: the constant factor of the score that is left to the exponentials.
        tile_classes: how blocks of keys are classed; None where `key_blocks` has them in closed form.
        key_blocks: see `tile_classes`.
        declarations: the spec's scalars and tensors that mask and score read.
        qk_cols, v_cols: head dims padded to the matrix instruction.
        row_tiles: how many instruction-high row tiles each warp owns.
        warps: of the role that computes.
        overlap: whether the scores of a block are computed under the output of the one before.
        direction: of the pass.
        reads, read_rows, writes: tensors and rows of the call, whoever makes them.
        scratch: tensors and rows that nobody else sees.
        up_to: most keys of the calls that it takes; None for any.
        scales: of e4m3 Q, K and V; empty for others.
        quantizer: how their operands are made of 16-bit tensors; None for others.
        descales: of K and V in a cache of e4m3 beside Q of 16 bits; empty for others.
        params: fields of the struct that the kernel takes by value.
        lengths: of the sequences of its calls.
        split: how the keys of a tile are cut into parts; None where they are not.
        parts: what it leaves of each part.
    """

    name: str
    spec_digest: str
    arch: Arch
    inputs: DType
    output: DType
    head_dim_qk: int
    head_dim_v: int
    mask: Expr
    mask_text: str
    score: Expr
    score_factor: float
    tile_classes: TileClasses | None
    declarations: Declarations
    schedule: str
    block_m: int
    block_n: int
    stages: int
    warps: int
    qk_cols: int
    v_cols: int
    row_tiles: int
    overlap: bool
    key_blocks: SeenBlocks | None
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor | Rows | QuerySums | QueryRanks | PairMatrix | BlockTables | Elements, ...]
    scheduler: Scheduler
    roles: tuple[Role, ...]
    buffers: tuple[Buffer, ...]
    params: tuple[Param, ...]
    blocks_per_sm: int
    smem_bytes: int
    scratch: tuple[Tensor | Rows, ...] = ()
    rings: tuple[Ring, ...] = ()
    rings_offset: int = 0
    tensor_maps: tuple[TensorMap, ...] = ()
    scales: tuple[Descales, ...] = ()
    quantizer: Quantizer | None = None
    up_to: int | None = None
    direction: Literal["forward", "backward"] = "forward"
    read_rows: tuple[Rows, ...] = ()
    lengths: Lengths = DENSE
    split: Split | None = None
    parts: tuple[PartRows, ...] = ()
    descales: tuple[CacheDescales, ...] = ()

    @property
    def every_descale(self) -> tuple[Descales | CacheDescales, ...]:
        """Of 8-bit inputs, or of a cache."""
        return (*self.scales, *self.descales)

    @property
    def multiplied(self) -> DType:
        """The format of what matrix instructions take."""
        return F16 if self.descales else self.inputs

    @property
    def shares_keys(self) -> bool:
        """Whether the warps of a block share out the keys of a tile; each then has all of its rows."""
        return self.split is not None and len(self.roles) == 1

    @property
    def module(self) -> str:
        """Name of the text that it is emitted to."""
        return self.name

    @property
    def has_score(self) -> bool:
        """Whether the spec's score is anything but the scaled product."""
        return self.score is not name("score")

    @property
    def has_sink(self) -> bool:
        """Whether a learned sink joins the sum of each row."""
        return any(isinstance(step, ReadSink) for step in walk(self.worker.program))

    @property
    def tables(self) -> tuple[Table, ...]:
        """Extremes of lookups over blocks of rows or keys, which the classes of blocks of keys read."""
        return self.tile_classes.tables if self.tile_classes else ()

    @property
    def boundaries(self) -> tuple[Boundary, ...]:
        """Boundaries among the keys, or rows, that the bounds of blocks read."""
        return self.key_blocks.boundaries if self.key_blocks else ()

    @property
    def table_values(self) -> dict[str, str]:
        """The values that are the ends of tables, or boundaries, by the names that expressions have for them.

        Boundaries do not depend on tiles: all kernels of a call share them.
        """
        ends = {end: self._own_value(end) for table in self.tables for end in table.ends}
        return ends | {each.name: each.name for each in self.boundaries}

    @property
    def tile_list(self) -> str:
        """The value that is the list of its tiles, where it has one."""
        return self._own_value("tiles")

    @property
    def takes_pieces(self) -> bool:
        """Whether the copy engine brings pieces of pages, which not all pages are made of."""
        return bool(self.tensor_maps) and self.lengths.is_paged("keys")

    @property
    def guard(self) -> Guard | None:
        """Which calls it takes; None for all."""
        if self.takes_pieces:
            return Guard(PAGES_BY_ROW, 0)
        return None if self.up_to is None else Guard("seqlen_k", self.up_to)

    def _own_value(self, of: str) -> str:
        suffix = "" if self.direction == "forward" else f".{self.schedule}"
        suffix += ".pieces" if self.takes_pieces else ""
        return table_value(of, self.up_to) + suffix

    @property
    def differentiated(self) -> DType:
        """The format of the inputs that gradients are of: of e4m3 ones, of those that they were made of."""
        return BF16 if self.inputs is E4M3 else self.inputs

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """The tensors that it writes."""
        return tuple(place for place in self.writes if isinstance(place, Tensor))

    @property
    def sums(self) -> tuple[Rows | BlockTables, ...]:
        """What it writes for a `SumRows` to add up."""
        return tuple(place for place in self.writes if isinstance(place, Rows | BlockTables))

    @property
    def query_sums(self) -> tuple[QuerySums, ...]:
        """The sums to which it adds."""
        return tuple(place for place in self.writes if isinstance(place, QuerySums))

    @property
    def query_ranks(self) -> tuple[QueryRanks, ...]:
        """The ranks by which it adds in one order."""
        return tuple(place for place in self.writes if isinstance(place, QueryRanks))

    @property
    def written_rows(self) -> tuple[Rows, ...]:
        """The rows that it writes."""
        return tuple(place for place in self.writes if isinstance(place, Rows))

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * sum(role.warps for role in self.roles)

    @property
    def worker(self) -> Role:
        """The role that computes."""
        return self.roles[0]

    @property
    def named_barriers(self) -> tuple[NamedBarriers, ...]:
        """The named barriers at which its warpgroups meet."""
        steps = (step for role in self.roles for step in walk(role.program))
        places = (place for step in steps for place in vars(step).values())
        return tuple(dict.fromkeys(place for place in places if isinstance(place, NamedBarriers)))

    @property
    def tiles(self) -> Formula:
        """What the blocks of a launch work on, together."""
        if self.scheduler.is_listed:
            return product(self.listed_heads, self.most_entries)
        heads = product("batch", "num_heads_q")
        if self.scheduler.kind == "pair_blocks":
            batch: Formula = 1 if self.scheduler.sums_batch else "batch"
            of: dict[str, Formula] = {"own": "num_heads_q", "group": "num_heads_kv", "all": 1}
            blocks = (ceil_div("seqlen_q", self.block_m), ceil_div("seqlen_k", self.block_n))
            return product(batch, of[self.scheduler.sums_heads], *blocks)
        if self.scheduler.kind == "heads":
            return heads
        if self.scheduler.kind == "key_blocks":
            return product("batch", "num_heads_kv", ceil_div("seqlen_k", self.block_n))
        return product(heads, ceil_div("seqlen_q", self.block_m))

    @property
    def most_entries(self) -> Formula:
        """Entries of its list of tiles at most: blocks of all sequences, and of what lies between and behind them."""
        axis = self.scheduler.axis
        kind = self.lengths.of(axis.axis if axis else "queries")
        pieces = {"dense": "batch", "padded": product(3, "batch"), "ragged": total(product(2, "batch"), 1)}[
            kind
        ]
        if axis is None:
            return pieces
        block = self.block_m if axis.axis == "queries" else self.block_n
        length = f"tokens_{LETTERS[axis.axis]}" if kind == "ragged" else axis.seqlen
        blocks = ceil_div(product(length, "group") if self.scheduler.packs_group else length, block)
        more = 0 if kind == "dense" else 2
        rows = total(blocks, pieces) if kind == "ragged" else product("batch", total(blocks, more))
        if self.split is None:
            return rows
        if self.split.keys is None:
            parts = product("num_sms", self.blocks_per_sm * self.split.waves)
            return total(rows, ceil_div(parts, maximum(1, self.listed_heads)))
        if self.lengths.keys == "ragged":  # the longest is whatever a call says
            of_sequence = rows if kind == "ragged" else blocks
            return total(rows, product(of_sequence, ceil_div("tokens_k", self.split.keys)))
        return product(rows, maximum(1, ceil_div("seqlen_k", self.split.keys)))

    @property
    def part_rows(self) -> Formula:
        """Rows of a part for which there is a place: of its tile, or of the longest sequence where these are fewer."""
        if self.lengths.is_by_token("queries"):
            return self.block_m
        group: Formula = "group" if self.scheduler.packs_group else 1
        return minimum(self.block_m, product("seqlen_q", group))

    @property
    def listed_heads(self) -> str:
        """How many tiles an entry of its list is: the name of a size."""
        return "num_heads_kv" if self.scheduler.is_for_groups else "num_heads_q"

    @property
    def queries(self) -> SequenceAxis:
        """How queries are cut into rows of tiles."""
        own = self.scheduler.axis
        return own if own and own.axis == "queries" else QUERIES

    @property
    def grid(self) -> Formula:
        """Blocks of a launch: one for each tile, or as many as the GPU holds at a time; beyond a list's end they do
        nothing.
        """
        if not self.scheduler.persistent:
            return self.tiles
        return minimum(product("num_sms", self.blocks_per_sm), self.tiles)

    def ring_offset(self, ring: Ring) -> int:
        """Where in shared memory the mbarriers of a ring start: `full` of every stage, then `empty`."""
        before = self.rings[: self.rings.index(ring)]
        return self.rings_offset + sum(other.size_bytes for other in before)

    @property
    def tile_slot_offset(self) -> int:
        """Where in shared memory the number of the next tile stands, after the mbarriers."""
        return self.rings_offset + sum(ring.size_bytes for ring in self.rings)

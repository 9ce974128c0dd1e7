"""The places that schedules work with, handed to them by lowering."""

from dataclasses import dataclass

from attngen.plan import BlockIndex, Buffer, Cursor, Program, RegTile, Rows, Tensor, View
from attngen.plan.steps import LoadTile, StageTile, StoreRegisters, StoreTile, SyncThreads, ZeroHidden
from attngen.schedules.cache_scales import CacheScales
from attngen.schedules.key_loop import KeyLoop
from attngen.schedules.key_parts import KeyParts, WarpShares
from attngen.schedules.online_softmax import OnlineSoftmax
from attngen.schedules.scores import Scores


@dataclass(frozen=True)
class TilePlaces:
    """What a schedule of any family may name.

    Attributes:
        keys: how it comes to the blocks of keys of a tile.
        scores, softmax: what it makes of a block of keys.
        acc_o: (block_m, head_dim_v), the accumulators of O.
        q, k, v, out: tiles in shared memory: (block_m or block_n, padded head dim); `out` stages the result. An f32
            result of shorter inputs has none: it goes from registers to device memory.
        q_in, k_in, v_in, result, lse: tensors in device memory.
        parts: where a tile leaves its part of the keys; None where keys are not cut.
    """

    keys: KeyLoop
    scores: Scores
    softmax: OnlineSoftmax
    acc_o: RegTile
    q: Buffer
    k: Buffer
    v: Buffer
    out: Buffer | None
    q_in: Tensor
    k_in: Tensor
    v_in: Tensor
    result: Tensor
    lse: Rows
    parts: KeyParts | None

    @property
    def cache(self) -> CacheScales | None:
        """What is done for a cache of e4m3; None where there is none."""
        return self.scores.cache

    @property
    def votes_on_products(self) -> bool:
        """Whether a warp votes on its products before they are masked: those of what no query may see must be 0."""
        return self.scores.by_tanh is not None

    def zero_hidden(self, block: BlockIndex, *tiles: View) -> Program:
        """Zeros over keys that the mask hides from every query: P of them is 0, and so must be what that is times V."""
        shown = self.scores.pairs.shown
        return () if shown is None else tuple(ZeroHidden(tile, block, shown) for tile in tiles)

    @property
    def reg_tiles(self) -> tuple[RegTile, ...]:
        """What of tiles is kept in registers."""
        ahead = (tile for _, tile in self.scores.ahead)
        return (self.scores.acc_s, self.softmax.p, self.acc_o, *ahead)


@dataclass(frozen=True)
class Places(TilePlaces):
    """What the schedules that every warp runs alike may name.

    Attributes:
        stages: of the ring of K and V.
        score_unroll: k-steps of the score GEMM that are written out.
        load_at, read_at: where the next copy into the ring goes, and which stage is worked on.
        o_acc, saved_max, saved_sum: what a schedule keeps in device memory between blocks of keys.
        shares: where warps leave what their keys have come to; None where they share out rows.
    """

    stages: int
    score_unroll: int
    load_at: Cursor
    read_at: Cursor
    o_acc: Tensor
    saved_max: Rows
    saved_sum: Rows
    shares: WarpShares | None = None

    def load_k(self, stage: Cursor, block: BlockIndex, pads: bool) -> Program:
        """Start copying a block of K to a stage, with what belongs to it; `pads` as of `LoadTile`."""
        return (
            LoadTile(self._own(self.k, stage), self.k_in, block, pads),
            *(self.cache.load_k(stage, block) if self.cache else ()),
        )

    def load_v(self, stage: Cursor, block: BlockIndex, pads: bool) -> Program:
        """Start copying a block of V, likewise."""
        return (
            LoadTile(self._own(self.v, stage), self.v_in, block, pads),
            *(self.cache.load_v(stage, block) if self.cache else ()),
        )

    def _own(self, buffer: Buffer, stage: Cursor) -> View:
        """The keys of a stage that a program copies: where warps share them out, those of the warp."""
        return buffer.at(stage).own if self.shares else buffer.at(stage)

    def store_result(self, block: BlockIndex) -> Program:
        """Bring O of a block to device memory."""
        if self.out is None:
            return (StoreRegisters(self.acc_o, self.result, block),)
        return (
            SyncThreads(),
            StageTile(self.acc_o, self.out.at()),
            SyncThreads(),
            StoreTile(self.out.at(), self.result, block),
        )

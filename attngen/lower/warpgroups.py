"""Places and storage of the schedules for warpgroups: from a choice of numbers to a kernel plan."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from attngen.arch import Arch
from attngen.dtypes import F32, DType
from attngen.expr import Expr
from attngen.lower.choice import WarpgroupChoice
from attngen.lower.decision import Decision
from attngen.lower.features import Features
from attngen.lower.params import row_strides
from attngen.lower.rounding import round_up
from attngen.lower.scale_places import scale_params
from attngen.lower.storage import is_staged, key_parts, tile_places
from attngen.plan import (
    PANEL_BYTES,
    ROWS_OF_K,
    ROWS_OF_O,
    ROWS_OF_Q,
    ROWS_OF_V,
    SCORES,
    WARPGROUP_WARPS,
    Axis,
    Buffer,
    Cursor,
    NamedBarriers,
    Param,
    RegTile,
    RegVec,
    Ring,
    Role,
    Tensor,
    TensorMap,
)
from attngen.plan.hardware_rules import WARPGROUP_REGISTERS, RegisterShare
from attngen.schedules import WARPGROUP_SCHEDULES, Output, RingCursors, WarpgroupPlaces

TILE_SLOT_BYTES = 16
"""Where the producer leaves the number of the next tile of a persistent block, after the mbarriers."""
WIDEST_WITH_TILE = 192
"""Columns of O beside which a listed tile, unlike one that a number tells, fits into registers across a walk: NVRTC
13.0.88 spills 60 bytes at 256, and none if the tile is read again; at 128 reading it again makes it spill 4."""
LISTED_TILE_BYTES = 48
"""Where it leaves all of a tile that is listed: consumers would wait for the list to be read."""
LOADING_REGISTERS = 48
"""What a thread needs beside its tiles when it loads ahead; with fewer NVRTC 13.0.88 spills."""
REGISTERS_OF_PARTS = {**WARPGROUP_REGISTERS, 2: RegisterShare(232, 40, spare=24)}
"""How registers are shared out where a tile is a part of its keys: a producer that walks over blocks or looks up pages
spills with 24 (NVRTC 13.0.88)."""
BUFFER_ALIGNMENT = 1024
"""The 128-byte swizzle repeats every eight rows. Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory
Layout"."""


def places(choice: WarpgroupChoice, features: Features, decided: Decision) -> WarpgroupPlaces:
    """Every place the schedules may name, at its offset in shared memory.

    Lookups of the score by the key are loaded ahead where registers allow.
    """
    inputs, output, arch, scales = features.inputs, features.output, features.arch, decided.scales
    assert arch.wgmma is not None
    qk, v = features.head_dim_qk, features.head_dim_v
    qk_cols, v_cols = round_up(qk, arch.k_step(inputs)), v
    m, n, stages = choice.block_m, choice.block_n, choice.stages
    panels = arch.emits

    def buffer(
        name: str,
        dtype: DType,
        axes: tuple[Axis, ...],
        rows: int,
        cols: int,
        valid: int,
        stages: int,
        after: Buffer | None,
    ) -> Buffer:
        offset = round_up(after.offset + after.size_bytes, BUFFER_ALIGNMENT) if after else 0
        return Buffer(name, dtype, axes, rows, cols, valid, stages, offset, in_panels=panels)

    q_buffer = buffer("q", inputs, ROWS_OF_Q, m, qk_cols, qk, choice.q_stages, None)
    acc_o = RegTile("acc_o", F32, ROWS_OF_O, m, v_cols, v, "accumulator")
    out = buffer("out", output, ROWS_OF_O, m, v_cols, v, 1, None) if is_staged(inputs, output) else None
    out_over_q = choice.out_over_q and out is not None
    first = q_buffer
    if out and out_over_q:  # which then must be as large as the larger of the two
        out = replace(out, overlays="q")
        first = max(q_buffer, out, key=lambda each: each.size_bytes)
    k_buffer = buffer("k", inputs, ROWS_OF_K, n, qk_cols, qk, stages, first)
    v_buffer = buffer("v", inputs, ROWS_OF_V, n, v_cols, v, stages, k_buffer)
    if scales:  # 8-bit wgmma contracts over columns alone
        v_buffer = replace(v_buffer, axes=ROWS_OF_V[::-1], rows=v_cols, cols=n, valid_cols=n)
    if out and not out_over_q:
        out = replace(out, offset=round_up(v_buffer.offset + v_buffer.size_bytes, BUFFER_ALIGNMENT))

    def ring(name: str, count: int) -> Ring:
        beside = scales if name == "k" else None
        return Ring(name, count, bool(beside and beside.staged), bool(beside and beside.has_key_scales))

    def cursors(fills: bool) -> RingCursors:
        depth = {"q": choice.q_stages, "k": stages, "v": stages, "tile": 1}
        return RingCursors(
            **{name: Cursor(f"{name}_at", count, ring(name, count), fills) for name, count in depth.items()}
        )

    if scales and scales.staged:
        tiles = (q_buffer, k_buffer, v_buffer, *((out,) if out else ()))
        end = max(each.offset + each.size_bytes for each in tiles)
        scales = replace(scales, staged=replace(scales.staged, offset=end))
    ahead = tuple(
        (lookup, RegTile(f"ahead{i}_{lookup.name}", format, SCORES, m, n, n, "a_fragment"))
        for i, (lookup, format) in enumerate(features.lookups_by_key.items())
    )
    part = (
        RegTile("part_o", F32, ROWS_OF_O, m, choice.part_cols, choice.part_cols, "accumulator")
        if choice.part_cols
        else None
    )
    consumer = cursors(fills=False)
    own = NamedBarriers("own", 1 + choice.warpgroups, 1)
    common = NamedBarriers("common", own.first + choice.warpgroups, choice.warpgroups, is_common=True)

    def with_loads(ahead: tuple[tuple[Expr, RegTile], ...]) -> WarpgroupPlaces:
        of_tile = tile_places(
            q_buffer,
            k_buffer,
            v_buffer,
            acc_o,
            output,
            out,
            replace(decided, scales=scales),
            ahead,
            packs=features.packs_group,
            parts=key_parts(acc_o, decided, common) if features.splits else None,
        )
        of_warpgroup = Output(
            of_tile["acc_o"],
            of_tile["softmax"],
            v_buffer,
            consumer.v,
            choice.overlap,
            choice.rescale,
            choice.rescale_votes,
            part,
            RegVec("alpha_before", "queries", m),
        )
        return WarpgroupPlaces(
            **of_tile,
            output=of_warpgroup,
            passes_late=choice.passes_late,
            persistent=choice.persistent,
            out_over_q=out_over_q,
            producer=cursors(fills=True),
            consumer=consumer,
            turn=NamedBarriers("turn", 1, 2),
            own=own,
            lengths=features.lengths,
            reads_tile_again=features.walks and not features.lengths.are_dense and v > WIDEST_WITH_TILE,
        )

    found = with_loads(ahead)  # all or none: what stays in the loop wants registers too
    return found if _fit(arch, choice.warpgroups, found.reg_tiles) else with_loads(())


def _fit(arch: Arch, warpgroups: int, tiles: Iterable[RegTile]) -> bool:
    """Whether a consumer's thread has registers for all of these, and for the addresses of what is loaded."""
    share = WARPGROUP_REGISTERS.get(warpgroups)
    most = share.consumer if share and arch.emits else arch.registers_per_thread
    return (
        sum(tile.registers_per_thread(WARPGROUP_WARPS * warpgroups) for tile in tiles) + LOADING_REGISTERS
        <= most
    )


def roles(schedule: str, choice: WarpgroupChoice, at: WarpgroupPlaces) -> tuple[Role, Role]:
    """Who runs what: consumers first, so that a warp's number tells its rows; the producer's warps last.

    A whole warp of the producer loads where its lanes class blocks of keys together, look up pages, or spread scales of
    keys; else one thread does.
    """
    programs = WARPGROUP_SCHEDULES[schedule](at)
    share = (REGISTERS_OF_PARTS if at.parts else WARPGROUP_REGISTERS).get(choice.warpgroups)

    return (
        Role(
            "consumer",
            WARPGROUP_WARPS * choice.warpgroups,
            programs["consumer"],
            at.reg_tiles,
            at.reg_vecs,
            _used(at.consumer, at),
            choice.warpgroups,
            share.consumer if share else None,
        ),
        Role(
            "producer",
            4 if share else 1,
            programs["producer"],
            cursors=_used(at.producer, at),
            registers=share.producer if share else None,
            single_thread=not (
                at.keys.walks
                or (at.scores.scales and at.scores.scales.has_key_scales)
                or at.lengths.is_paged("keys")
            ),
        ),
    )


def _used(cursors: RingCursors, at: WarpgroupPlaces) -> tuple[Cursor, ...]:
    """Those of the rings that there are: tiles that are drawn, and Q that the copy engine brings, pass through some."""
    of_q, of_tiles = () if at.parts else (cursors.q,), (cursors.tile,) if at.persistent else ()
    return (*of_q, cursors.k, cursors.v, *of_tiles)


def storage(choice: WarpgroupChoice, at: WarpgroupPlaces) -> dict[str, Any]:
    """The fields of `KernelPlan` that are shared memory: buffers, then mbarriers and the number of the next tile."""
    rings = tuple(cursor.ring for cursor in _used(at.consumer, at) if cursor.ring)
    scales = at.scores.scales
    staged = (scales.staged,) if scales and scales.staged else ()
    buffers = (at.q, at.k, at.v, *((at.out,) if at.out else ()), *staged)
    end = max(buffer.offset + buffer.size_bytes for buffer in buffers)
    barrier_bytes = sum(ring.size_bytes for ring in rings)
    tile_slot = TILE_SLOT_BYTES if at.lengths.are_dense else LISTED_TILE_BYTES
    smem_bytes = end + barrier_bytes + (tile_slot if choice.persistent else 0)
    return dict(buffers=buffers, rings=rings, rings_offset=end, smem_bytes=smem_bytes)


def tensor_maps(choice: WarpgroupChoice, at: WarpgroupPlaces) -> tuple[TensorMap, ...]:
    """One box is what one copy moves: a panel of a block, and of O the rows of one warpgroup."""

    def box(tensor: Tensor, rows: int) -> TensorMap:
        return TensorMap(tensor, rows, PANEL_BYTES // tensor.dtype.bytes)

    of_keys = (box(at.k_in, choice.block_n), box(at.v_in, at.v.rows))
    if at.parts:
        return of_keys
    return (
        box(at.q_in, choice.block_m),
        *of_keys,
        *((box(at.result, choice.block_m // choice.warpgroups),) if at.out else ()),
    )


def params(choice: WarpgroupChoice, at: WarpgroupPlaces, of_pairs: tuple[Param, ...]) -> tuple[Param, ...]:
    """The fields of the parameter struct: tensor maps, pointers, sizes, what expressions read, and scales."""
    by_threads: tuple[str, ...] = ("q", "out") if at.parts else ()
    if not at.parts and (at.out is None or at.lengths.has_neighbours(at.result.axis)):
        by_threads = ("out",)
    maps = tensor_maps(choice, at)
    return (
        *(Param(f"{each.tensor.name}_map", "tensor_map", f"{each.tensor.name}.map") for each in maps),
        *(Param(tensor, "pointer", f"{tensor}.ptr") for tensor in by_threads),
        Param("lse", "pointer", "lse.ptr"),
        *((Param("tile_counter", "pointer", "counter.ptr"),) if choice.persistent else ()),
        *row_strides(by_threads),
        *(Param(size, "i32", size) for size in ("batch", "seqlen_q", "seqlen_k", "num_heads_q", "group")),
        *of_pairs,
        *(scale_params(at.scores.scales) if at.scores.scales else ()),
    )

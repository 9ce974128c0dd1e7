"""The text of kernels for sequences that have lengths of their own, and what NVRTC makes of it. Needs no GPU."""

import re
from functools import cache
from typing import Any

import pytest

import attngen
from attngen.emit import emit
from attngen.kernel import Kernel
from tests.emit.sass import hot_loop
from tests.emit.test_compiled import assert_compiles_as_planned

pytestmark = pytest.mark.usefixtures("nvdisasm")
ON_WARPGROUPS = ("warp_specialized", "pingpong")


@cache
def kernel_of(
    arch: str,
    schedule: str,
    lengths: str,
    mask: str = "causal",
    head_dim: int = 64,
    persistent: bool | None = None,
) -> Kernel:
    """A kernel of a spec; lengths are those of queries and of keys."""
    queries, keys = lengths.split()
    fields = {} if persistent is None else {"persistent": persistent}
    spec: dict[str, Any] = {
        "problem": {"head_dim": head_dim, "queries": queries, "keys": keys},
        "mask": mask,
        "schedule": {"kind": schedule, **fields},
    }
    return attngen.compile(spec, arch=arch)


@pytest.mark.matrix(most=2)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("arch", "schedule"),
    [
        ("sm_80", "fa2"),
        ("sm_80", "serial"),
        ("sm_90a", "warp_specialized"),
        ("sm_90a", "pingpong"),
        ("sm_90a", "auto"),
    ],
)
def test_ragged_kernels_compile_without_spills(arch: str, schedule: str, head_dim: int) -> None:
    """The kernel and the one that lists its tiles, which touches no memory before those ahead of it have ended."""
    kernel = kernel_of(arch, schedule, "ragged ragged", head_dim=head_dim)
    assert_compiles_as_planned(kernel)
    for plan in kernel.call.programs:
        names = [used.name for used in kernel.modules[plan.module].compiled.resources]
        assert sorted(names) == [plan.name, f"{plan.name}_tiles"]


@pytest.mark.matrix
@pytest.mark.parametrize("mask", ["window(100, 20)", "kv_idx <= q_idx or kv_idx < 3"])
@pytest.mark.parametrize("lengths", ["padded padded", "dense ragged", "ragged padded"])
@pytest.mark.parametrize(("arch", "schedule"), [("sm_80", "fa2"), ("sm_90a", "pingpong")])
def test_lengths_of_either_side_compile(arch: str, schedule: str, lengths: str, mask: str) -> None:
    """Queries and keys are cut each in its way; a mask that is walked, and one that has a lower bound too."""
    assert_compiles_as_planned(kernel_of(arch, schedule, lengths, mask))


@pytest.mark.parametrize("head_dim", [128, 256])
def test_lookups_by_token_compile_without_spills(head_dim: int) -> None:
    """A walk that looks two tokens up for each pair leaves no register for what the epilogue alone asks of a tile."""
    spec = {
        "problem": {"head_dim": head_dim, "queries": "ragged", "keys": "ragged"},
        "mask": "causal and doc[q_idx] == doc[kv_idx]",
        "tensors": {"doc": "i32[tokens_k]"},
    }
    assert_compiles_as_planned(attngen.compile(spec, arch="sm_90a"))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_loop_is_that_of_dense_sequences(head_dim: int) -> None:
    """Descriptors stay in uniform registers: a warp knows that its threads have one tile."""
    dense, ragged = (
        kernel_of("sm_90a", "auto", lengths, head_dim=head_dim)
        for lengths in ("dense dense", "ragged ragged")
    )
    of_dense, of_ragged = (
        hot_loop(kernel.modules[kernel.call.programs[-1].module].sass()) for kernel in (dense, ragged)
    )
    for instruction in ("HGMMA", "MUFU", "BAR"):
        assert of_ragged[instruction] == of_dense[instruction]
    assert of_ragged["R2UR"] <= of_dense["R2UR"] + 2
    assert of_ragged.total() <= of_dense.total() + 8


@pytest.mark.parametrize("schedule", ON_WARPGROUPS)
@pytest.mark.parametrize("persistent", [True, False])
def test_who_has_no_tile_does_nothing(schedule: str, persistent: bool) -> None:
    """A block beyond the list ends at once, or finds that its first tile does not exist, and then draws none."""
    text = emit(kernel_of("sm_90a", schedule, "ragged ragged", persistent=persistent).call.programs[-1])
    ends = "if ((int)blockIdx.x >= (int)same_in_warp(num_tiles(params))) return;"
    assert (ends in text) == (not persistent)
    assert ("tile.exists = index < num_tiles(params);" in text) == persistent
    # The producer alone waits for the list; consumers find the tile in shared memory.
    assert ("publish_tile(tile_slot, tile);" in text, "tile = published_tile(tile_slot);" in text) == (
        persistent,
    ) * 2
    (count,) = re.findall(r"DEV int num_tiles\(const Params& params\) \{ return (.*?); \}", text)
    assert count == "params.num_heads_q * num_entries(params)"


@pytest.mark.parametrize("lengths", ["ragged padded", "padded ragged"])
def test_rows_begin_with_their_sequence(lengths: str) -> None:
    """For the copy engine and for threads; a tensor without batches has none, and no stride of them."""
    plan = kernel_of("sm_90a", "pingpong", lengths).call.programs[-1]
    text, (queries, keys) = emit(plan), lengths.split()
    batch = {"ragged": "0", "padded": "tile.batch"}
    assert f"0, tile.q_start + tile.m_block * kBlockM, tile.head, {batch[queries]}, kEvictFirst" in text
    assert (
        len(re.findall(rf", 0, tile\.kv?_start \+ .*?, tile\.kv_head, {batch[keys]}, kEvictLast", text)) == 4
    )
    assert f"tile.q_start + tile.m_block * kBlockM, tile.head, {batch[queries]});" in text
    assert ("out_stride_batch" in text) == (queries == "padded")


def test_ends_are_seen_to_where_copies_know_none() -> None:
    """Rows of V past an end become zeros once a tile; those of Q and K where a warp votes on products."""
    text = emit(kernel_of("sm_90a", "pingpong", "ragged ragged").call.programs[-1])
    assert [text.count(f"zero_rows<{tile}Tile>") for tile in "QKV"] == [0, 0, 1]
    spec = {
        "problem": {"head_dim": 64, "queries": "ragged", "keys": "ragged"},
        "score": "softcap(score, 30.0)",
        "schedule": {"kind": "pingpong"},
    }
    text = emit(attngen.compile(spec, arch="sm_90a").call.programs[-1])
    assert [text.count(f"zero_rows<{tile}Tile>") for tile in "QKV"] == [1, 1, 1]
    assert "zero_rows" not in emit(kernel_of("sm_80", "fa2", "ragged ragged").call.programs[-1])
    assert "zero_rows" not in emit(kernel_of("sm_90a", "pingpong", "dense dense").call.programs[-1])

"""What a call may pass for given blocks, and what a spec may say: every fault names the place and what would do."""

import pytest
import torch

import attngen
from attngen.errors import ArgumentError, SpecError
from attngen.spec.models import json_schema
from tests.blocks.block_cases import BlockCase, lists_of
from tests.blocks.test_block_lists import BlockSparse, flex_mask

CASE = BlockCase()


def refused(blocks: object, case: BlockCase = CASE) -> ArgumentError:
    q, k, v, _ = case.inputs()
    with pytest.raises(ArgumentError) as raised:
        case.kernel(q, k, v, blocks=blocks)
    return raised.value


def test_a_spec_with_blocks_wants_them_and_one_without_takes_none() -> None:
    """Neither is passed over in silence."""
    q, k, v, _ = CASE.inputs()
    for blocks in ({}, {"blocks": None}):
        with pytest.raises(ArgumentError, match="blocks: got nothing, expected a bool tensor"):
            CASE.kernel(q, k, v, **blocks)
    with pytest.raises(ArgumentError, match="the spec has no blocks") as raised:
        CASE.without_blocks(q, k, v, blocks=CASE.drawn())
    assert "blocks: {block_m: 128, block_n: 128}" in str(raised.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda kept: kept[:, :, 1:], r"ceil_div\(seqlen_q, 32\) is 4"),
        (lambda kept: kept[..., 1:], r"ceil_div\(seqlen_k, 32\) is 5"),
        (lambda kept: kept.repeat(2, 1, 1, 1), "4 batches, expected 2, as q has, or 1 for all"),
        (lambda kept: kept[:, :3], "3 heads, expected 4, as q has, or 1 for all"),
        (lambda kept: kept[0], "3 heads|dimensions|4 batches"),
        (lambda kept: kept.to(torch.uint8), "torch.uint8, expected torch.bool"),
        (lambda kept: kept.float(), "torch.float32, expected torch.bool"),
        (lambda kept: kept.to("meta"), "meta"),
        (lambda kept: kept.numpy(), "ndarray"),
        (lambda kept: kept.tolist(), "list"),
        (lambda kept: (*lists_of(kept), kept), "tuple"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(change: object, says: str) -> None:
    """Its sizes, its type, its device, and what it is."""
    with pytest.raises(ArgumentError, match=says):
        raise refused(change(CASE.drawn()))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda counts, indices: (counts.long(), indices), "torch.int64, expected torch.int32"),
        (lambda counts, indices: (counts, indices.float()), "torch.float32, expected torch.int32"),
        (lambda counts, indices: (counts[..., 1:], indices), r"ceil_div\(seqlen_q, 32\) is 4"),
        (lambda counts, indices: (counts, indices[..., 1:]), r"ceil_div\(seqlen_k, 32\) is 5"),
        (lambda counts, indices: (counts[:1], indices.repeat(3, 1, 1, 1)), "6 batches"),
        (lambda counts, indices: (counts[:, :3], indices), "the same batches and heads"),
        (lambda counts, indices: (counts, None), "NoneType for indices"),
        (lambda counts, indices: BlockSparse(counts, indices, counts), "NoneType for full_block_idx"),
        (lambda counts, indices: (indices, counts), "dimensions"),
    ],
)
def test_lists_that_do_not_fit_are_refused(change: object, says: str) -> None:
    """Each by its own name."""
    with pytest.raises(ArgumentError, match=says):
        raise refused(change(*lists_of(CASE.drawn())))  # type: ignore[operator]


def test_lists_of_other_blocks_are_refused_with_what_would_do() -> None:
    """A BlockMask, or FlashAttention-4's tensors, whose blocks are not the spec's: either is to be made anew."""
    case = BlockCase(lengths=(300, 300), blocks=(64, 64))
    others = BlockCase(lengths=(300, 300), blocks=(32, 16))
    raised = refused(flex_mask(others), case)
    assert "BlockMask with blocks of (32, 16), expected blocks of (64, 64)" in str(raised)
    assert "compile with blocks: {block_m: 32, block_n: 16}" in str(raised)
    sparse = BlockSparse(*lists_of(case.drawn()), block_size=(128, 128))
    assert "compile with blocks: {block_m: 128, block_n: 128}" in str(refused(sparse, case))


def test_a_backward_pass_wants_blocks_too() -> None:
    """Those of the forward call, which it does not remember."""
    kernel, (q, k, v, dout), kept = CASE.kernel, CASE.inputs(), CASE.drawn()
    out, lse = kernel(q, k, v, return_lse=True, blocks=kept)
    with pytest.raises(ArgumentError, match="blocks: got nothing"):
        kernel.backward(dout, q, k, v, out, lse)
    with pytest.raises(ArgumentError, match="NoneType for indices"):
        kernel.backward(dout, q, k, v, out, lse, blocks=(kept, None))


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        ({"block_m": 128}, "blocks.block_n must be given"),
        (128, "must be {block_m: 128, block_n: 128}"),
        ({"block_m": 0, "block_n": 1}, "must be a positive integer"),
        ({"block_m": 128, "block_n": True}, "must be a positive integer"),
        ({"block_m": 128, "block_n": 2**30}, "at most"),
        ({"block_m": 128, "block_k": 128, "block_n": 1}, "unknown key blocks.block_k"),
    ],
)
def test_faults_of_the_spec_are_told_where_they_stand(blocks: object, says: str) -> None:
    """Sizes that are missing, are none, or are called otherwise."""
    with pytest.raises(SpecError, match=says):
        attngen.compile({"problem": {"head_dim": 64}, "blocks": blocks}, arch="simulator")


@pytest.mark.parametrize("name", ["blocks", "blocks_m", "blocks_heads"])
def test_the_names_of_the_map_are_reserved(name: str) -> None:
    """Nobody declares the map, nor a size of it."""
    with pytest.raises(SpecError, match="must be called otherwise"):
        attngen.compile({"problem": {"head_dim": 64}, "scalars": {name: "i32"}, "mask": f"kv_idx < {name}"})
    with pytest.raises(SpecError, match="blocks"):
        attngen.compile(
            {
                "problem": {"head_dim": 64},
                "mask": "blocks[b, h, 0, 0]",
                "blocks": {"block_m": 1, "block_n": 1},
            }
        )


def test_a_spec_with_blocks_is_another_kernel_and_comes_back_as_it_was() -> None:
    """Its digest, its YAML, its schema; a spec without has the digest that it had before there were blocks."""
    spec, plain = CASE.kernel.spec, CASE.without_blocks.spec
    assert attngen.spec.load(spec.to_yaml()) == spec and spec.digest() != plain.digest()
    assert spec.digest() != spec.replace({"blocks.block_m": 64}).digest()
    assert "blocks" not in plain.to_dict()
    assert "GivenBlocks" in json_schema()["$defs"] and "blocks" in json_schema()["properties"]


def test_a_mask_that_shows_nothing_takes_blocks_all_the_same() -> None:
    """There is no pair of which to ask."""
    case = BlockCase(mask="false")
    with pytest.warns(attngen.errors.SpecWarning):
        kernel = case.kernel
    q, k, v, _ = case.inputs()
    assert not kernel(q, k, v, blocks=case.drawn()).any()


def test_tables_of_extremes_do_not_depend_on_blocks() -> None:
    """Made once, they serve calls with other maps, and with lists."""
    case = BlockCase(mask="document(doc)", more={"tensors": {"doc": "i32[batch, seqlen_k]"}})
    kernel, (q, k, v, _) = case.kernel, case.inputs()
    doc = (torch.arange(139, dtype=torch.int32) // 40).expand(2, -1).contiguous()
    first, second = case.drawn(seed=1), case.drawn(seed=2)
    tables = kernel.tables(q, k, v, blocks=first, doc=doc)
    for blocks in (first, second, lists_of(second)):
        expected = kernel(q, k, v, blocks=blocks, doc=doc)
        assert torch.equal(kernel(q, k, v, blocks=blocks, doc=doc, tables=tables), expected)

"""Which blocks of keys rows see, and which blocks of rows keys see, against every pair of query and key, one by one."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attngen.emit.tile_text import seen as emitted
from attngen.expr import Expr, IndexRange, Leaves, evaluate, key_range, name, parse_mask, row_range
from attngen.plan import KEYS, QUERIES, SeenBlocks, SequenceAxis, seen_blocks
from attngen.simulate.visits import evaluated
from tests.effort import examples
from tests.expr.strategies import ENV, NAMES, sums

OTHERS = tuple(each for each in NAMES if each not in ("q_idx", "kv_idx"))
RANGES = {KEYS: key_range, QUERIES: row_range}
BLOCKS = {QUERIES.block: 4, KEYS.block: 3}


def bounds(index: str) -> st.SearchStrategy[str]:
    """Comparisons that bound an index by the other one and by all else that a mask may name."""
    other = "q_idx" if index == "kv_idx" else "kv_idx"
    return st.builds(
        "{} {} {}".format,
        st.sampled_from([index, f"{index} + 2", f"3 - {index}", f"{index} - h"]),
        st.sampled_from(["<", "<=", ">", ">=", "=="]),
        sums((*OTHERS, other)),
    )


def is_right(seen: SeenBlocks, mask: Expr, env: dict[str, int]) -> None:
    """Assert that what is not visited holds no visible pair, and what counts as full no hidden one."""
    axis, other = seen.axis, seen.axis.other
    lengths = {each: env[each.seqlen] for each in (KEYS, QUERIES)}
    count = {each: -(-lengths[each] // BLOCKS[each.block]) for each in (KEYS, QUERIES)}

    def pairs(block: int, other_block: int) -> list[bool]:
        starts = {axis: block * BLOCKS[axis.block], other: other_block * BLOCKS[other.block]}
        spans = {each: range(start, start + BLOCKS[each.block]) for each, start in starts.items()}
        existing = {each: [i for i in span if i < lengths[each]] for each, span in spans.items()}
        return [
            bool(evaluate(mask, env | {axis.index: i, other.index: j}))
            for i, j in product(existing[axis], existing[other])
        ]

    for other_block in range(count[other]):
        names = evaluated(other.span, {**env, **BLOCKS, other.tile.name: other_block})
        found = evaluated(seen.definitions, names)
        ends = [int(found[f"seen.{end}"]) for end in ("min", "full_begin", "full_end", "max")]
        assert [0, *ends, count[axis]] == sorted([0, *ends, count[axis]])
        for block in range(count[axis]):
            seen_pairs = pairs(block, other_block)
            assert ends[0] <= block < ends[3] or not any(seen_pairs)
            if ends[1] <= block < ends[2]:
                assert all(seen_pairs) and (block + 1) * BLOCKS[axis.block] <= lengths[axis]


@settings(max_examples=examples(1))
@given(st.data(), ENV)
@pytest.mark.parametrize("axis", [KEYS, QUERIES], ids=lambda axis: axis.index)
@pytest.mark.parametrize("partial_is_masked", [False, True])
def test_blocks_of_drawn_masks_are_those_of_their_pairs(
    partial_is_masked: bool, axis: SequenceAxis, data: st.DataObject, env: dict[str, int]
) -> None:
    """For every block of the other axis: blocks out of sight show no pair, full ones hide none and exist whole."""
    mask = parse_mask(" and ".join(data.draw(st.lists(bounds(axis.index), min_size=1, max_size=3))))
    env = env | {"seqlen_q": data.draw(st.integers(0, 14)), "seqlen_k": data.draw(st.integers(0, 14))}
    seen = seen_blocks(RANGES[axis](mask), axis)
    assert seen is not None
    seen = seen.of_whole_blocks() if partial_is_masked else seen
    is_right(seen, mask, env)


@pytest.mark.parametrize("axis", [KEYS, QUERIES], ids=lambda axis: axis.index)
@pytest.mark.parametrize("partial_is_masked", [False, True])
def test_a_block_that_exists_in_part_has_no_full_ones_where_it_is_masked(
    partial_is_masked: bool, axis: SequenceAxis
) -> None:
    """Of two blocks that see all, the second has but one row, or key."""
    other = axis.other
    seen = SeenBlocks(axis).of_whole_blocks() if partial_is_masked else SeenBlocks(axis)
    sizes = {axis.seqlen: 12, other.seqlen: BLOCKS[other.block] + 1, **BLOCKS}
    for block in range(2):
        found = evaluated(seen.definitions, evaluated(other.span, {**sizes, other.tile.name: block}))
        is_full = found["seen.full_begin"] < found["seen.full_end"]
        assert is_full == (block == 0 or not partial_is_masked)
        assert found["seen.max"] == 12 // BLOCKS[axis.block]


@pytest.mark.parametrize("text", ["full", "causal", "window(3, 1)", "kv_idx == q_idx", "false"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(8, 9), (9, 8), (3, 14), (14, 3), (5, 0)])
def test_rows_and_keys_see_each_other(text: str, seqlen_q: int, seqlen_k: int) -> None:
    """Common masks are ranges both ways, and a pair of blocks that is out of sight one way shows nothing."""
    mask, env = parse_mask(text), {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "b": 0, "h": 0, "h_kv": 0}
    for axis, of in RANGES.items():
        seen = seen_blocks(of(mask), axis)
        assert seen is not None
        is_right(seen, mask, env)


def test_causal_blocks_of_rows_are_written_as_a_person_would() -> None:
    """The statements that find the rows that see block n of keys: none before the diagonal, all to the last."""
    seen = seen_blocks(row_range(parse_mask("causal")), QUERIES)
    assert seen is not None
    lengths = {"seqlen_q": "tile.seqlen_q", "seqlen_k": "tile.seqlen_k"}
    ends = {"kv_idx.first": "kv_first", "kv_idx.last": "kv_last"}
    assert emitted(seen, Leaves(lengths | ends)) == [
        "const int kv_first = n * kBlockN, kv_last = min(kv_first + kBlockN, tile.seqlen_k) - 1;",
        "seen.m_max = (tile.seqlen_q + kBlockM - 1) / kBlockM;",
        "seen.m_min = min(max(kv_first + tile.seqlen_q - tile.seqlen_k, 0) / kBlockM, seen.m_max);",
        "const int first_all = min(max(kv_last + tile.seqlen_q - tile.seqlen_k, 0), tile.seqlen_q);",
        "seen.m_full_begin = max(min((first_all + kBlockM - 1) / kBlockM, seen.m_max), seen.m_min);",
        "seen.m_full_end = max(min(tile.seqlen_q / kBlockM, seen.m_max), seen.m_full_begin);",
    ]


def test_the_last_block_is_not_full_where_the_program_masks_it() -> None:
    """It is peeled off, so it counts as partial even where nothing of it is hidden."""
    names = {"seqlen_k": 9, **BLOCKS}
    for last_is_masked, end in ((False, 3), (True, 2)):
        seen = SeenBlocks(KEYS, last_is_masked=last_is_masked)
        assert evaluated(seen.definitions, names)["seen.full_end"] == end


def test_what_is_unknown_bounds_nothing_and_fills_nothing() -> None:
    """With no bound known, all blocks are visited and none is full."""
    bound = name("h")
    seen = seen_blocks(IndexRange((bound,), (bound,)), KEYS)
    assert seen is not None and seen.where_known(lambda _: True) is seen
    found = evaluated(seen.where_known(lambda _: False).definitions, {"seqlen_k": 9, **BLOCKS})
    assert [int(found[f"seen.{end}"]) for end in ("min", "max")] == [0, 3]
    assert found["seen.full_begin"] == found["seen.full_end"]

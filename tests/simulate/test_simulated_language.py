"""Walks, modified scores and declared values on small tiles, in every schedule, against the fp64 reference."""

import pytest
import torch
from small_plans import KINDS, lowered

import attngen
from attngen.check.inputs import Shape
from attngen.expr import evaluate
from attngen.simulate import Sizes
from attngen.simulate.tile_source import tiles
from attngen.simulate.visits import Member, declared_values, visited_blocks, walk_of
from tests.check.language_cases import CASES, MASKS, WINDOW_AND_SINKS, LanguageCase

LENGTHS = ((17, 23), (13, 5), (1, 1), (0, 3), (3, 0))
TILE = {"block_m": 6, "block_n": 4}
WALKED = tuple(
    mask
    for mask in MASKS
    if lowered("fa2", mask, declarations=LanguageCase(mask).declarations).key_blocks is None
)


@pytest.mark.matrix
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_language_is_right_in_every_schedule(kind: str, case: LanguageCase) -> None:
    """out and lse are within the bound for lengths beside the tiles, of no key and of no row."""
    spec = case.spec(
        target="simulator",
        problem={"head_dim": 8},
        precision={"inputs": "f32"},
        tile=TILE,
        schedule={"kind": kind},
    )
    made = attngen.compile(spec)
    for lengths in LENGTHS:
        accuracy = case.judge(made, Shape(2, 4, 2, *lengths))
        assert accuracy.ok, f"{lengths}: {accuracy}"


def seen_pairs(made: attngen.Spec, sizes: Sizes, member: Member) -> torch.Tensor:
    """Every pair of a head, asked one by one: (seqlen_q, seqlen_k)."""
    names = {
        "q_idx": torch.arange(sizes.seqlen_q)[:, None],
        "kv_idx": torch.arange(sizes.seqlen_k),
        "b": member.batch,
        "h": member.head,
        "h_kv": member.head_kv,
        **sizes.values,
        **sizes.declared.scalars,
    }
    found = torch.as_tensor(evaluate(made.mask_expr, names, sizes.declared.tensors))
    return found.expand(sizes.seqlen_q, sizes.seqlen_k)


INEXACT = {
    "neighbourhood(5, 1)": "a row of tokens and a column are near, each for itself",
    "block_diffusion(16, 4)": "a clean and a noised copy, whose blocks straddle tiles",
}
"""Masks whose walks come to blocks that show no pair, with the reason."""


@pytest.mark.parametrize("mask", WALKED)
def test_a_walk_comes_to_the_blocks_that_show_a_pair(mask: str) -> None:
    """From right to left, to all that show one and to no other; a block that is not partial shows every pair."""
    case, came_in_vain = LanguageCase(mask), 0
    for block_m, block_n in ((4, 4), (8, 3), (3, 8), (1, 1)):
        plan = lowered("fa2", mask, block_m=block_m, block_n=block_n, declarations=case.declarations)
        spec = attngen.load(case.spec(problem={"head_dim": 64}))
        for seqlen_q, seqlen_k in ((1, 1), (9, 13), (13, 24), (24, 5), (16, 32)):
            sizes = Sizes(2, seqlen_q, seqlen_k, 4, 2)
            passed = case.arguments(Shape(2, 4, 2, seqlen_q, seqlen_k))
            sizes = Sizes(2, seqlen_q, seqlen_k, 4, 2, declared=declared_values(plan, sizes, passed))
            for member in (Member(0, 0, 0, seqlen_q, seqlen_k), Member(1, 3, 1, seqlen_q, seqlen_k)):
                sees = seen_pairs(spec, sizes, member)
                for m, rows in enumerate(sees.split(block_m)):
                    shown = [n for n, keys in enumerate(rows.split(block_n, dim=1)) if keys.any()]
                    walk = walk_of(plan, sizes, m, member)
                    found = [block.n for block in walk]
                    (visited,) = visited_blocks(plan, sizes, [m], member)
                    assert found == sorted(found, reverse=True) == list(visited)
                    assert set(found) >= set(shown)
                    came_in_vain += len(found) - len(shown)
                    for block in walk:
                        keys = rows[:, block.n * block_n : (block.n + 1) * block_n]
                        assert block.is_partial or (bool(keys.all()) and keys.shape[1] == block_n)
    assert (came_in_vain > 0) == (mask in INEXACT), came_in_vain


def test_where_nothing_is_passed_every_block_is_visited_and_none_is_full() -> None:
    """What a tensor hides is not known before a call; a timeline is drawn as if it hid nothing."""
    case = LanguageCase("document(doc)")
    plan = lowered("fa2", case.mask, block_n=4, declarations=case.declarations)
    walk = walk_of(plan, Sizes(1, 8, 13, 1, 1), 0, Member(0, 0, 0, 8, 13))
    assert [(block.n, block.is_partial) for block in walk] == [(3, True), (2, True), (1, True), (0, True)]


def test_heads_whose_walks_differ_are_not_stacked() -> None:
    """A walk that asks for the head is worked out head by head."""
    case = LanguageCase("allow[h, q_idx, kv_idx]")
    plan = lowered("fa2", case.mask, block_m=4, block_n=4, declarations=case.declarations)
    allow = torch.zeros(3, 4, 12, dtype=torch.bool)
    allow[1, 2, 5] = allow[2] = True
    sizes = Sizes(1, 4, 12, 3, 3)
    sizes = Sizes(1, 4, 12, 3, 3, declared=declared_values(plan, sizes, {"allow": allow}))
    found = {tile.members[0].head: tile.walk for tile in tiles(plan, sizes)}
    assert found == {0: (), 1: ((1, True),), 2: ((2, False), (1, False), (0, False))}


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_that_is_no_number_spoils_its_row_alone(kind: str) -> None:
    """A bias of NaN or +inf at one pair makes that row NaN, out and lse; a bias of -inf hides the pair."""
    case = LanguageCase(WINDOW_AND_SINKS, "score + bias[h, q_idx, kv_idx]")
    made = attngen.compile(
        case.spec(
            target="simulator",
            problem={"head_dim": 8},
            precision={"inputs": "f32"},
            tile=TILE,
            schedule={"kind": kind},
        )
    )
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 17, heads, 8, generator=generator) for heads in (4, 2, 2))
    bias = torch.zeros(4, 17, 17, dtype=torch.bfloat16)
    bias[1, 9, 8], bias[2, 16, 1], bias[3, 16, 16] = float("nan"), float("inf"), -float("inf")
    out, lse = made(q, k, v, return_lse=True, bias=bias)
    spoilt = {tuple(at) for at in lse.isnan().nonzero().tolist()}
    assert spoilt == {(0, 1, 9), (0, 2, 16)}
    assert {tuple(at[:3]) for at in out.isnan().nonzero().tolist()} == {(0, 9, 1), (0, 16, 2)}
    hidden = k.clone()
    hidden[0, 16] = 100.0
    again = made(q, hidden, v, bias=bias)
    assert torch.equal(again[0, 16, 3], out[0, 16, 3])


def test_the_default_of_a_scalar_is_its_value() -> None:
    """A scalar that is left out is its default, and another value is another result."""
    case = LanguageCase("causal", "softcap(score, cap)")
    made = attngen.compile(
        case.spec(target="simulator", problem={"head_dim": 8}, precision={"inputs": "f32"}, tile=TILE)
    )
    q = torch.randn(1, 9, 2, 8, generator=torch.Generator().manual_seed(0))
    default = made(q, q, q)
    assert torch.equal(default, made(q, q, q, cap=2.0))
    assert not torch.allclose(default, made(q, q, q, cap=0.1))

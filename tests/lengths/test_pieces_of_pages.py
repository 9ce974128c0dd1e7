"""Pages whose rows the copy engine brings in pieces: kernels for warpgroups, beside those of padded keys."""

import math
from dataclasses import replace

import pytest
import torch

import attngen
from attngen.bind import bind, check_arguments
from attngen.errors import ArgumentError
from attngen.plan import PAGES_BY_ROW, Program, assemble, evaluate_formula, piece_of
from attngen.plan.steps import FindPages, TmaLoad, ZeroTail, walk
from attngen.simulate import SimulationFault, Simulator
from attngen.simulate.launches import run_call
from attngen.simulate.page_table import PageTable
from attngen.simulate.tile_source import Tile
from attngen.simulate.visits import SIMULATED_SMS, Member
from tests.lengths.batches import DIM, batch, compiled
from tests.lengths.paged_batches import paged
from tests.lengths.test_paged import lengths_around
from tests.lengths.test_sequence_ends import variants

KINDS = ("warp_specialized", "pingpong")
PAGED = {"problem": {"head_dim": 64, "keys": "paged"}}


@pytest.mark.parametrize("queries", ["dense", "ragged"])
@pytest.mark.parametrize("page", [8, 16, 24, 64, 128, 528])
def test_pages_of_pieces_hold_what_padded_keys_are(page: int, queries: str) -> None:
    """Bit for bit, in any order and either layout; NaN behind ends, in the same piece too, reaches nobody."""
    seqlens_k = lengths_around(page)
    rows = (5,) * len(seqlens_k) if queries == "dense" else (1, 5, 0, 9, 3, 20, 8)
    of = batch(queries, "padded", rows, seqlens_k, unused=0, poison=math.nan)
    of = replace(of, q=of.q.nan_to_num(0.5))
    cached, kind = paged(of, page), KINDS[page % 3 == 0]
    kernel, padded = (compiled(kind, queries, keys, "causal") for keys in ("paged", "padded"))
    expected, expected_lse = padded(of.q, of.k, of.v, return_lse=True, **of.lengths)
    out, lse = kernel(of.q, cached.k, cached.v, return_lse=True, **cached.passed)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert expected.isfinite().all() and expected.any()
    k, v = (x.transpose(1, 2).contiguous() for x in (cached.k, cached.v))
    assert torch.equal(kernel(of.q, k, v, layout="hnd", **cached.passed), expected)
    other = paged(of, page, seed=7)
    assert torch.equal(kernel(of.q, other.k, other.v, **other.passed), expected)


@pytest.mark.parametrize("mask", ["full", "window(5, 3)", "kv_idx % 3 != q_idx % 2", "kv_idx < limit[b]"])
def test_masks_mean_what_they_mean_of_padded_keys(mask: str) -> None:
    """Closed forms, walks, and masks that hide keys."""
    declared = {"limit": torch.tensor([3, 9, 40, 1], dtype=torch.int32)} if "limit" in mask else {}
    of = batch("ragged", "padded", (5, 1, 30, 4), (33, 0, 50, 2), poison=math.nan)
    cached = paged(of, 8)
    found = compiled(KINDS[0], "ragged", "paged", mask, tokens=False)(
        cached.q, cached.k, cached.v, **cached.passed, **declared
    )
    expected = compiled(KINDS[0], "ragged", "padded", mask, tokens=False)(
        of.q, of.k, of.v, **of.lengths, **declared
    )
    assert torch.equal(found, expected) and found.any()


@pytest.mark.parametrize(
    ("page", "more", "schedule", "why"),
    [
        (64, (), "pingpong", "brings pieces"),
        (24, (), "pingpong", "brings pieces"),
        (12, (), "fa2", "pages of 12 rows are no multiple of 8"),
        (1, (), "fa2", "pages of 1 rows"),
        (64, ("leftpad_k",), "fa2", "with leftpad_k"),
    ],
)
def test_auto_chooses_by_the_page(page: int, more: tuple[str, ...], schedule: str, why: str) -> None:
    """By its size, and by whether keys may begin anywhere in it, which a call says: never by what a tensor holds."""
    kernel = attngen.compile(PAGED, arch="sm_90a")
    with torch.device("meta"):
        q, cache = torch.empty(2, 3, 4, 64).bfloat16(), torch.empty(9, page, 2, 64).bfloat16()
        said = {name: torch.empty(2, dtype=torch.int32) for name in ("seqused_k", *more)}
        said["block_table"] = torch.empty(2, 4, dtype=torch.int32)
    *_, attention = kernel.explain_launch(q, cache, cache, **said)
    assert why in attention.why
    chosen = kernel.call.kernel_of[attention.kernel]
    assert chosen.schedule == schedule  # type: ignore[union-attr]
    assert kernel.call.serving({PAGES_BY_ROW: int(schedule == "fa2")}) is chosen
    if not more:
        assert kernel.serving(cache) is kernel.serving(cache.transpose(1, 2), "hnd") is chosen


def test_auto_gives_either_kernel_the_same_call() -> None:
    """Pages of 3 and of 8 rows of the same keys, on the plans for Hopper; a list made for one serves its page alone."""
    kernel = attngen.compile({**PAGED, "mask": "causal"}, arch="sm_90a")
    of = batch("dense", "padded", (5, 5), (40, 17), poison=math.nan)
    of = replace(of, **{name: getattr(of, name).repeat(1, 1, 1, 64 // DIM) for name in ("q", "k", "v")})
    found = []
    for page in (3, 8):
        cached = paged(of, page)
        out = kernel(cached.q, cached.k, cached.v, **cached.passed)
        work = kernel.work(cached.q, cached.k, cached.v, **cached.passed)
        assert torch.equal(kernel(cached.q, cached.k, cached.v, work=work, **cached.passed), out)
        found.append(out)
        other = paged(of, 11 - page)
        with pytest.raises(ArgumentError, match="work of"):
            kernel(other.q, other.k, other.v, work=work, **other.passed)
    assert (found[0].float() - found[1].float()).abs().max() < 0.02 and found[0].any()


def test_a_named_schedule_refuses_what_the_copy_engine_does_not_take() -> None:
    """Pages of other sizes, and keys that begin anywhere; what would do is said."""
    of = batch("dense", "padded", (3, 3), (20, 5))
    kernel = compiled(KINDS[0], "dense", "paged", "causal")
    cached = paged(of, 12)
    with pytest.raises(ArgumentError, match=r"k: got pages of 12 rows, expected a multiple of 8.*\n.*fa2"):
        kernel(cached.q, cached.k, cached.v, **cached.passed)
    cached = paged(of, 8)
    leftpad = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ArgumentError, match="leftpad_k: got padding"):
        kernel(cached.q, cached.k, cached.v, leftpad_k=leftpad, **cached.passed)


def test_pieces_are_what_pages_and_blocks_share() -> None:
    """The largest power of two that divides both: no piece crosses a page, and each begins where a swizzle does."""
    expected = {(64, 128): 64, (528, 128): 16, (24, 128): 8, (672, 128): 32, (256, 128): 128, (80, 112): 16}
    assert {
        pair: evaluate_formula(piece_of(pair[1]), {"page_size": pair[0]}) for pair in expected
    } == expected


def test_a_piece_beside_the_end_alone_is_looked_up() -> None:
    """Rows behind the last come with its piece; those of the next piece must not be asked for."""
    table = PageTable(torch.tensor([[4, 2]]), None, pages=8, page_size=16)
    tile = Tile(0, None, None, (Member(0, 0, 0, 1, 21),))
    page, row = table.places(tile, 16, 8, piece=8)
    assert page.tolist() == [[2] * 8] and row.tolist() == [list(range(8))]
    with pytest.raises(SimulationFault, match="looked up, of a sequence of 21"):
        table.places(tile, 16, 16, piece=8)
    with pytest.raises(SimulationFault, match="come by 8"):
        table.places(tile, 4, 8, piece=8)


@pytest.mark.parametrize("mask", ["full", "kv_idx % 3 != q_idx % 2"])
@pytest.mark.parametrize("kind", KINDS)
def test_pages_are_found_ahead_of_every_wait_for_a_stage(kind: str, mask: str) -> None:
    """Memory answers under the wait; without one of these Steps a copy has the pages of another block, a fault."""
    kernel = compiled(kind, "dense", "paged", mask)
    plan, *_ = kernel.call.programs
    consumer, producer = plan.roles
    steps = list(walk(producer.program))
    loads = [i for i, step in enumerate(steps) if isinstance(step, TmaLoad)]
    assert all(isinstance(steps[i - 2], FindPages) == (steps[i].src.name != "q") for i in loads)  # type: ignore[attr-defined]
    cached = paged(batch("dense", "padded", (9, 9), (41, 20)), 8)

    def run(program: Program) -> torch.Tensor:
        broken = replace(plan, roles=(consumer, replace(producer, program=program)))
        (out,) = Simulator(assemble((broken,))).make(
            ("out",), cached.q, cached.k, cached.v, declared=cached.passed
        )
        return out

    assert run(producer.program).any()
    found = list(variants(producer.program, lambda program, i: isinstance(program[i], FindPages)))
    assert len(found) == len(loads) - 1
    for _, program in found:
        with pytest.raises(SimulationFault, match="nobody has found the pages of rows"):
            run(program)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_behind_the_last_key_of_a_piece_is_cleared(kind: str) -> None:
    """The copy engine brings whole pieces: without zeros over V's tail its NaN is in the result."""
    of, kernel = (
        batch("dense", "padded", (3, 3), (41, 5), poison=math.nan),
        compiled(kind, "dense", "paged", "full"),
    )
    cached, q = paged(of, 16), of.q.nan_to_num(0.5)
    given = check_arguments(kernel.manifest, q, cached.k, cached.v, declared=cached.passed)
    bound = bind(kernel.manifest, given, ("out",), SIMULATED_SMS)
    assert run_call(kernel.call, bound)["out"].isfinite().all()

    def nothing(step: ZeroTail, role: object) -> None:
        """Leave what is there."""

    assert run_call(kernel.call, bound, steps={ZeroTail: nothing})["out"].isnan().any()

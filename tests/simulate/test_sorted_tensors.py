"""Masks on sorted tensors: boundaries, blocks that are visited, values and gradients, against every pair one by one."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

import attngen
from attngen.errors import ArgumentError
from attngen.expr import Boundary, evaluate, find_boundaries
from attngen.plan import KernelPlan
from attngen.simulate import Sizes, block_bounds
from attngen.simulate.visits import Member, declared_values, visiting_blocks

TENSORS = {"doc": "i32[batch, seqlen_k]", "kinds": "u8[seqlen_q]"}
MASKS = (
    "document(doc)",
    "causal and document(doc)",
    "window(5, 2) and document(doc)",
    "doc[b, kv_idx] <= doc[b, q_pos] and doc[b, kv_idx] > doc[b, q_pos] - 2",
    "doc[b, q_idx] < doc[b, kv_idx]",
    "doc[b, kv_idx] >= -1 and causal",
    "doc[b, q_pos] > 0 and causal",
    "doc[b, kv_idx] == kinds[q_idx]",
    "doc[b, kv_idx] // 2 == doc[b, q_pos] // 2",
    "max(doc[b, kv_idx], 0) <= min(kinds[q_idx], h)",
    "kv_idx < 5 * doc[b, q_idx]",
    "document(doc) and kv_idx <= 2 * q_idx + 3",
)
TIGHT = MASKS[:2]
"""Of these each row sees keys beside those of the next, so that no block between is in vain."""
WALKED = (
    "shared_prefix(doc)",
    "doc[b, kv_idx] != doc[b, q_pos]",
    "doc[b, kv_idx] <= -q_idx",
    "doc[b, kv_idx] - kv_idx <= doc[b, q_pos]",
    "doc[b, (kv_idx - q_idx)] == 1",
    "doc[kv_idx, kv_idx] == doc[b, q_pos]",
    "doc[b, kv_idx] % 3 == doc[b, q_pos] % 3",
)
"""What is no comparison of one number that rises with the key and one that rises with the row."""
LENGTHS = ((1, 1), (13, 13), (9, 24), (24, 9), (17, 40))


def documents(length: int, batch: int = 2) -> Iterator[torch.Tensor]:
    """Each key a document, one document of all, ids below 0 with gaps, and a few cuts; other ones in each batch."""
    yield torch.arange(length).expand(batch, length).int()
    yield torch.full((batch, length), -7, dtype=torch.int32)
    random = torch.Generator().manual_seed(length)
    for fewest, most in ((-9, 9), (-1, 2)):
        yield torch.randint(fewest, most, (batch, length), generator=random).sort()[0].int()


@cache
def kernel(mask: str, schedule: str, is_sorted: bool = True, gradients: bool = False) -> attngen.Kernel:
    of_warpgroups = {"warpgroups": 1} if schedule in ("warp_specialized", "pingpong") else {}
    return attngen.compile(
        {
            "target": "simulator",
            "problem": {"head_dim": 4},
            "precision": {"inputs": "f32"},
            "tensors": {name: text + " sorted" * is_sorted for name, text in TENSORS.items() if name in mask},
            "mask": mask,
            "tile": {"block_m": 8, "block_n": 4},
            "schedule": {"kind": schedule, **of_warpgroups},
            **({"gradients": ["q", "k", "v"]} if gradients else {}),
        }
    )


def passed(mask: str, doc: torch.Tensor, seqlen_q: int) -> dict[str, torch.Tensor]:
    kinds = torch.randint(0, 4, (seqlen_q,), generator=torch.Generator().manual_seed(seqlen_q)).sort()[0]
    return {name: x for name, x in (("doc", doc), ("kinds", kinds.to(torch.uint8))) if name in mask}


def calls(mask: str) -> Iterator[tuple[Sizes, dict[str, torch.Tensor]]]:
    for seqlen_q, seqlen_k in LENGTHS:
        for doc in documents(seqlen_k):
            yield Sizes(2, seqlen_q, seqlen_k, 4, 2), passed(mask, doc, seqlen_q)


def seen(plan: KernelPlan, sizes: Sizes, tensors: dict[str, torch.Tensor], member: Member) -> torch.Tensor:
    """Whether each row of a head sees each key, by the mask itself: (seqlen_q, seqlen_k)."""
    rows, keys = torch.arange(sizes.seqlen_q)[:, None], torch.arange(sizes.seqlen_k)
    names = {**sizes.values, "b": member.batch, "h": member.head, "h_kv": member.head_kv}
    pairs = evaluate(plan.mask, names | {"q_idx": rows, "kv_idx": keys}, tensors)
    return torch.as_tensor(pairs).expand(sizes.seqlen_q, sizes.seqlen_k)


def blocks(pairs: torch.Tensor, block_m: int, block_n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each block of rows sees some, and all that exists, of each block of keys."""
    rows, keys = pairs.split(block_m), [part.split(block_n, 1) for part in pairs.split(block_m)]
    some = [[bool(block.any()) for block in line] for line in keys]
    every = [[bool(block.all()) for block in line] for line in keys]
    return torch.tensor(some).view(len(rows), -1), torch.tensor(every).view(len(rows), -1)


def with_declared(plan: KernelPlan, sizes: Sizes, tensors: dict[str, torch.Tensor]) -> Sizes:
    values = {**vars(sizes), "declared": declared_values(plan, sizes, tensors)}
    return Sizes(**values)


@pytest.mark.parametrize("schedule", ["fa2", "warp_specialized"])
@pytest.mark.parametrize("mask", MASKS)
def test_blocks_of_keys_hold_every_visible_pair(mask: str, schedule: str) -> None:
    """Blocks not visited show no pair, full ones every pair; documents visit nothing in vain and mask nothing in vain.

    Where the program peels the last block off and masks it, that block alone is no longer counted as full.
    """
    plan = kernel(mask, schedule).plan
    assert plan.key_blocks is not None and plan.boundaries and not plan.tables
    peels = plan.key_blocks.last_is_masked
    for sizes, tensors in calls(mask):
        known = with_declared(plan, sizes, tensors)
        for member in (Member(0, 0, 0, *lengths_of(sizes)), Member(1, 3, 1, *lengths_of(sizes))):
            some, every = blocks(seen(plan, sizes, tensors, member), plan.block_m, plan.block_n)
            count = len(some)
            found = block_bounds(plan, known, range(count), member)
            for m, bounds in enumerate(found):
                visited = set(range(bounds.n_min, bounds.n_max))
                full = set(range(bounds.n_full_begin, bounds.n_full_end))
                shown, whole = (set(line[m].nonzero().flatten().tolist()) for line in (some, every))
                assert shown <= visited and full <= whole
                if sizes.seqlen_k % plan.block_n:
                    whole -= {sizes.seqlen_k // plan.block_n}
                if mask in TIGHT and sizes.seqlen_q <= sizes.seqlen_k:
                    assert visited == shown
                    assert full == whole - ({bounds.n_max - 1} if peels else set())


def lengths_of(sizes: Sizes) -> tuple[int, int]:
    return sizes.seqlen_q, sizes.seqlen_k


@pytest.mark.parametrize("mask", MASKS[:-1])
def test_blocks_of_rows_hold_every_visible_pair(mask: str) -> None:
    """Of the rows that see a block of keys none is left out; of documents no block is visited in vain."""
    plan = next(
        each
        for each in kernel(mask, "fa2", gradients=True).call.gradients
        if each.scheduler.kind == "key_blocks"
    )
    assert plan.key_blocks is not None and plan.boundaries and not plan.tables
    for sizes, tensors in calls(mask):
        known = with_declared(plan, sizes, tensors)
        member = Member(1, 2, 1, *lengths_of(sizes))
        some, every = blocks(seen(plan, sizes, tensors, member), plan.block_m, plan.block_n)
        for n in range(some.shape[1]):
            (bounds,) = block_bounds(plan, known, [n], member)
            visited = set(visiting_blocks(plan, known, n, member))
            shown = set(some[:, n].nonzero().flatten().tolist())
            assert shown <= visited
            assert set(range(bounds.n_full_begin, bounds.n_full_end)) <= set(
                every[:, n].nonzero().flatten().tolist()
            )
            if mask in TIGHT and sizes.seqlen_q == sizes.seqlen_k:
                assert visited == shown


def test_rows_are_walked_where_they_alone_have_no_closed_form() -> None:
    """A bound of keys with a factor is none of rows: the kernels that own keys class blocks by tables of extremes."""
    call = kernel(MASKS[-1], "fa2", gradients=True).call
    of = {plan.scheduler.kind: plan for plan in call.gradients}
    assert of["query_blocks"].boundaries and not of["query_blocks"].tables
    assert of["key_blocks"].tables and not of["key_blocks"].boundaries


@pytest.mark.parametrize("mask", WALKED)
def test_what_does_not_rise_is_walked(mask: str) -> None:
    """Comparisons that have no boundary keep the walk, and the values of the spec that says nothing of order."""
    ours, theirs = (kernel(mask, "fa2", is_sorted) for is_sorted in (True, False))
    assert ours.plan.key_blocks is None and not ours.plan.boundaries
    for doc in documents(21):
        q, k, v = inputs(21, 21)
        assert torch.equal(ours(q, k, v, doc=doc), theirs(q, k, v, doc=doc))


def inputs(seqlen_q: int, seqlen_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seqlen_q)
    shapes = ((2, seqlen_q, 4, 4), (2, seqlen_k, 2, 4), (2, seqlen_k, 2, 4))
    q, k, v = (torch.randn(shape, generator=random) for shape in shapes)
    return q, k, v


def results(made: attngen.Kernel, lengths: tuple[int, int], declared: dict[str, Any]) -> list[torch.Tensor]:
    """Out, lse, and the gradients of what the kernel has gradients of."""
    q, k, v = inputs(*lengths)
    out, lse = made(q, k, v, return_lse=True, **declared)
    if not made.spec.gradients:
        return [out, lse]
    return [out, lse, *made.backward(torch.cos(3 * out), q, k, v, out, lse, **declared)]


@pytest.mark.matrix
@pytest.mark.parametrize("schedule", ["serial", "fa2", "warp_specialized", "pingpong"])
@pytest.mark.parametrize("mask", MASKS)
def test_values_are_those_of_the_unsorted_spec(mask: str, schedule: str) -> None:
    """To the bit, for GQA and batches; gradients but for the order of sums, since other tiles may be chosen.

    So are heads that a mask tells apart, which the simulator then works out in other stacks.
    """
    with_gradients = schedule in ("fa2", "warp_specialized")
    ours, theirs = (kernel(mask, schedule, is_sorted, with_gradients) for is_sorted in (True, False))
    assert theirs.plan.key_blocks is None
    for lengths in ((13, 13), (24, 9)):
        has_rows_without_keys = False
        for doc in documents(lengths[1]):
            declared = passed(mask, doc, lengths[0])
            (out, lse, *made), expected = (results(each, lengths, declared) for each in (ours, theirs))
            if "h)" not in mask:
                assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
            for found, other in zip((out, lse, *made), expected, strict=True):
                torch.testing.assert_close(found, other, rtol=1e-5, atol=2e-6)
            assert out.any() or lse.isinf().all()
            has_rows_without_keys |= bool(lse.isinf().any())
        if "causal" in mask and lengths[0] > lengths[1]:
            assert has_rows_without_keys


@pytest.mark.parametrize("mask", MASKS[:4])
def test_calls_without_rows_or_keys(mask: str) -> None:
    """Nothing is looked up where there is nothing: rows without keys are 0, as are gradients of keys without rows."""
    made = kernel(mask, "fa2", gradients=True)
    out, lse, *gradients = results(made, (5, 0), {"doc": torch.zeros(2, 0, dtype=torch.int32)})
    assert not out.any() and (lse == -torch.inf).all() and not gradients[0].any()
    out, _, *gradients = results(made, (0, 5), {"doc": torch.zeros(2, 5, dtype=torch.int32)})
    assert out.numel() == 0 and gradients[1].shape[1] == 5 and not any(each.any() for each in gradients)


@pytest.mark.parametrize("schedule", ["serial", "fa2", "warp_specialized"])
def test_values_that_fall_leave_outputs_finite(schedule: str) -> None:
    """A tensor that is not sorted after all gives some output, finite, and no fault; verify says where it falls."""
    made = kernel("causal and document(doc)", schedule)
    random = torch.Generator().manual_seed(1)
    q, k, v = inputs(33, 33)
    for _ in range(8):
        doc = torch.randint(-3, 4, (2, 33), generator=random).int()
        assert made(q, k, v, doc=doc).isfinite().all()
        with pytest.raises(ArgumentError, match="doc"):
            made.verify(q, k, v, doc=doc)


def test_verify_names_the_place_and_both_values() -> None:
    """The first place in the order of memory; sorted values pass, and what no call could take is refused as there."""
    made = kernel("causal and document(doc)", "fa2")
    q, k, v = inputs(6, 6)
    doc = torch.tensor([[0, 0, 1, 1, 2, 2], [-3, 5, 5, 4, 4, 0]], dtype=torch.int32)
    with pytest.raises(ArgumentError) as refused:
        made.verify(q, k, v, doc=doc)
    assert "argument doc: got 4 at [1, 3], behind 5 at [1, 2]" in str(refused.value)
    assert "sorted" in str(refused.value)
    doc[1] = doc[0]
    made.verify(q, k, v, doc=doc)
    made.verify(*(x.transpose(1, 2) for x in (q, k, v)), layout="bhsd", doc=doc)
    for wrong in ({"doc": doc.long()}, {"doc": doc[:, 1:]}, {}):
        with pytest.raises(ArgumentError, match="doc"):
            made.verify(q, k, v, **wrong)


def test_tables_are_shared_by_calls_and_refused_once_written_to() -> None:
    """Boundaries are tables: made once for many calls, of the same values, and stale when the tensor changes."""
    made = kernel("causal and document(doc)", "fa2")
    q, k, v = inputs(13, 13)
    doc = next(documents(13)).contiguous()
    tables = made.tables(q, k, v, doc=doc)
    assert torch.equal(made(q, k, v, doc=doc, tables=tables), made(q, k, v, doc=doc))
    doc[:] = 0
    with pytest.raises(ArgumentError, match="tables"):
        made(q, k, v, doc=doc, tables=tables)


@pytest.mark.parametrize("mask", MASKS)
def test_a_boundary_is_the_first_index_at_which_its_condition_holds(mask: str) -> None:
    """By looking at each index in turn; it never falls along the rows, and what follows it holds as well."""
    plans = (kernel(mask, "fa2", gradients=True).plan, *kernel(mask, "fa2", gradients=True).call.gradients)
    boundaries = dict.fromkeys(each for plan in plans for each in plan.boundaries)
    assert {each.along for each in boundaries} == {"kv_idx", *(() if mask is MASKS[-1] else ("q_idx",))}
    for sizes, tensors in calls(mask):
        found = find_boundaries(boundaries, sizes.values, {}, tensors)
        for boundary in boundaries:
            expected = one_by_one(boundary, sizes, tensors)
            assert found[boundary.name].dtype == torch.int32
            assert torch.equal(found[boundary.name].long(), expected), boundary
            assert (expected.diff(dim=-1) >= 0).all()


def one_by_one(boundary: Boundary, sizes: Sizes, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    extents = {"b": 2, "h": 4, "h_kv": 2, "q_idx": sizes.seqlen_q, "kv_idx": sizes.seqlen_k}
    shape = [extents[index.name] for index in boundary.indices]
    grids = torch.meshgrid(*map(torch.arange, (*shape, extents[boundary.along])), indexing="ij")
    names = dict(zip((*(index.name for index in boundary.indices), boundary.along), grids, strict=True))
    holds = torch.as_tensor(evaluate(boundary.condition, {**sizes.values, **names}, tensors)).expand(
        grids[0].shape
    )
    assert torch.equal(holds.cummax(-1).values, holds)
    return (~holds).sum(-1)


HEADS = {"batch": 1, "num_heads_q": 1, "num_heads_kv": 1, "group": 1}


def test_kernels_of_a_call_share_boundaries() -> None:
    """One kernel finds those among keys for attention kernels of any length and for dQ, one those among rows."""
    spec = {
        "problem": {"head_dim": 64},
        "tensors": {"doc": "i32[batch, seqlen_k] sorted"},
        "mask": "causal and document(doc)",
        "gradients": ["q", "k", "v"],
    }
    manifest = attngen.compile(spec, arch="sm_90a").manifest
    given = {"q", "k", "v", "tensor.doc"}
    short, long = (
        [
            each.kernel
            for each in manifest.launches_for(given, ("out",), {**HEADS, "seqlen_q": n, "seqlen_k": n})
        ]
        for n in (512, 8192)
    )
    assert short[0] == long[0] and short[0].endswith("_boundaries") and short[1] != long[1]
    back = manifest.launches_for(
        {*given, "dout", "out", "lse"}, ("dq", "dk", "dv"), {**HEADS, "seqlen_q": 512, "seqlen_k": 512}
    )
    finders = [each for each in back if each.kernel.endswith("_boundaries")]
    assert finders[0].kernel == short[0] and len(finders) == 2
    assert {name.partition(".")[0] for each in finders for name in each.writes} == {"keys", "rows"}


@pytest.mark.parametrize(
    ("problem", "doc"),
    [
        ({"queries": "ragged", "keys": "ragged"}, "i32[tokens_k]"),
        ({"keys": "padded"}, "i32[batch, seqlen_k]"),
    ],
    ids=["ragged", "padded"],
)
def test_sequences_of_any_length_are_walked(problem: dict[str, str], doc: str) -> None:
    """Boundaries have no place for them: the values are those of the spec that says nothing of order."""
    mask = "causal and doc[kv_idx] == doc[q_pos]" if "tokens" in doc else "causal and document(doc)"
    ours, theirs = (
        attngen.compile(
            {
                "target": "simulator",
                "problem": {"head_dim": 4, **problem},
                "precision": {"inputs": "f32"},
                "tensors": {"doc": f"{doc}{word}"},
                "mask": mask,
            }
        )
        for word in (" sorted", "")
    )
    assert ours.plan.key_blocks is None and not ours.plan.boundaries
    q, k, v = inputs(20, 20)
    ids = (torch.arange(20) // 6).int().expand(2, 20)
    if "tokens" in doc:
        starts = torch.tensor([0, 20, 40], dtype=torch.int32)
        q, k, v, ids = (x.flatten(0, 1) for x in (q, k, v, ids))
        more = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": 20, "max_seqlen_k": 20}
    else:
        more = {"seqused_k": torch.tensor([20, 13], dtype=torch.int32)}
    assert torch.equal(ours(q, k, v, doc=ids, **more), theirs(q, k, v, doc=ids, **more))
    ours.verify(q, k, v, doc=ids, **more)  # from one sequence to the next ids may fall
    with pytest.raises(ArgumentError, match="argument doc: got 0 at"):
        ours.verify(q, k, v, doc=torch.cat([ids[..., :9], 0 * ids[..., 9:]], -1), **more)


def test_given_blocks_beside_sorted_documents_are_walked() -> None:
    """A map of blocks is no interval: the mask is classed tile by tile, with the values of the unsorted spec."""
    spec = {
        "target": "simulator",
        "problem": {"head_dim": 4},
        "precision": {"inputs": "f32"},
        "mask": "document(doc)",
        "blocks": {"block_m": 8, "block_n": 8},
    }
    ours, theirs = (
        attngen.compile(spec | {"tensors": {"doc": f"i32[batch, seqlen_k]{word}"}})
        for word in (" sorted", "")
    )
    assert ours.plan.key_blocks is None and not ours.plan.boundaries
    q, k, v = inputs(30, 30)
    kept = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    for doc in documents(30):
        assert torch.equal(ours(q, k, v, doc=doc, blocks=kept), theirs(q, k, v, doc=doc, blocks=kept))

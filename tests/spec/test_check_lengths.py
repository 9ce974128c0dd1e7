"""Check shapes of ragged and padded sequences."""

import pytest

import attngen
from attngen.errors import SpecError

RAGGED = "problem: {head_dim: 128, queries: ragged, keys: ragged}\n"
MIXED = "problem: {head_dim: 128, keys: padded}\n"
PAGED = "problem: {head_dim: 128, keys: paged}\n"


def test_lengths_stand_in_place_of_batch_and_seqlen() -> None:
    """Both axes, or the one that is cut; a spec comes back from its text."""
    spec = attngen.load(RAGGED + "check: [{heads: 4, seqlens_q: [5, 0, 130], seqlens_k: [7, 3, 130]}]")
    assert (spec.check[0].seqlens_q, spec.check[0].seqlens_k) == ((5, 0, 130), (7, 3, 130))
    assert attngen.load(spec.to_yaml()) == spec
    mixed = attngen.load(MIXED + "check: [{seqlen_q: 4, seqlens_k: [7, 3]}]")
    assert (mixed.check[0].seqlen_q, mixed.check[0].seqlens_k, mixed.check[0].batch) == (4, (7, 3), 1)
    paged = attngen.load(PAGED + "check: [{seqlen_q: 4, seqlens_k: [7, 3], page: 16}]")
    assert paged.check[0].page == 16 and attngen.load(paged.to_yaml()) == paged


@pytest.mark.parametrize(
    ("text", "message", "marked", "nearest", "rule"),
    [
        (RAGGED + "check: [{seqlens_q: [5, 0]}]", "check[0].seqlens_k must be given", "{seqlens_q: [5, 0]}",
         ("seqlens_k: [5, 0, 130]",), "required-keys"),
        (RAGGED + "check: [{seqlens_q: [5], seqlen_k: 12}]",
         "check[0].seqlen_k = 12 must be seqlens_k: keys are ragged", "12", ("seqlens_k: [12]",), "check-lengths"),
        (MIXED + "check: [{seqlens_q: [5, 9], seqlens_k: [5, 9]}]",
         "check[0].seqlens_q must be seqlen_q: queries are dense", "[5, 9]", ("seqlen_q: 9",), "check-lengths"),
        (RAGGED + "check: [{batch: 2, seqlens_q: [5, 9], seqlens_k: [5, 9]}]",
         "check[0].batch = 2 must be left out beside seqlens_q", "2", (), "check-lengths"),
        (RAGGED + "check: [{seqlens_q: [5, 9], seqlens_k: [5]}]",
         "check[0].seqlens_k must have 2 lengths, as seqlens_q has", "[5]", ("[5, 5]",), "check-lengths"),
        (RAGGED + "check: [{seqlens_q: [5], seqlens_k: [5, 8]}]",
         "check[0].seqlens_k must have 1 lengths, as seqlens_q has", "[5, 8]", ("[5]",), "check-lengths"),
        (RAGGED + "check: [{seqlens_q: [5, -1], seqlens_k: [5, 8]}]",
         "check[0].seqlens_q[1] = -1 must be an integer from 0 to 2^30 - 512", "-1", ("0",), "length"),
        (RAGGED + "check: [{seqlens_q: 5, seqlens_k: [5]}]", "check[0].seqlens_q = 5 must be a list of lengths", "5",
         ("[5, 0, 130]",), "lengths"),
        (RAGGED + "check: [{seqlens_q: [], seqlens_k: []}]", "check[0].seqlens_q must be a list of lengths", "[]",
         ("[5, 0, 130]",), "lengths"),
        (PAGED + "check: [{seqlen_q: 4, seqlens_k: [7, 3]}]", "check[0].page must be given",
         "{seqlen_q: 4, seqlens_k: [7, 3]}", ("page: 16",), "required-keys"),
        (PAGED + "check: [{seqlen_q: 4, seqlen_k: 7, page: 16}]",
         "check[0].seqlen_k = 7 must be seqlens_k: keys are paged", "7", ("seqlens_k: [7]",), "check-lengths"),
        (PAGED + "check: [{seqlen_q: 4, seqlens_k: [7], page: 0}]",
         "check[0].page = 0 must be a positive integer, at most 2^30 - 512", "0", ("1",), "positive-integer"),
        (MIXED + "check: [{seqlen_q: 4, seqlens_k: [7], page: 16}]",
         "check[0].page = 16 must be left out: keys are padded", "16", (), "check-lengths"),
        ("problem: {head_dim: 64, keys: jagged}", "problem.keys = jagged must be one of dense, ragged, padded",
         "jagged", ("ragged", "paged"), "known-lengths"),
    ],
)  # fmt: skip
def test_a_fault_says_where_what_and_what_would_do(
    text: str, message: str, marked: str, nearest: tuple[str, ...], rule: str
) -> None:
    """Lengths where sequences have their own, and only there; as many of queries as of keys."""
    with pytest.raises(SpecError) as caught:
        attngen.load(text)
    fault = caught.value.diagnostics[0]
    assert fault.message.startswith(message) and fault.rule == rule
    assert set(nearest) <= set(fault.nearest) or fault.nearest == nearest
    place = fault.location
    assert place is not None and place.text[place.column - 1 :][: place.length] == marked

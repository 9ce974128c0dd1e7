"""Fuzzing of sequences with lengths of their own: what is drawn, that it holds, and that faults are found."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from attngen.api import compile
from attngen.check.cuts import Cut
from attngen.check.inputs import Shape
from attngen.fuzz.case import Case
from attngen.fuzz.properties import RULES
from attngen.fuzz.properties_of_sequences import dense_spec
from attngen.fuzz.search_faults import CPU_TARGETS, fuzz, reproduce
from attngen.fuzz.strategies import cases, plan_of, specs
from attngen.spec import Spec, load
from tests.effort import examples

QUERIES = Cut("ragged", (5, 0, 3), unused=(2, 0, 1), tail=3)
KEYS = Cut("ragged", (7, 2, 0), skipped=(1, 0, 2), unused=(0, 1, 0), tail=2)
SHAPE = Shape(3, 2, 1, QUERIES.size, KEYS.size, QUERIES, KEYS)
OWN = [name for name, rule in RULES.items() if rule.lengths != "dense"]


def spec_of(queries: str = "ragged", keys: str = "ragged", **more: Any) -> Spec:
    """A spec of the simulator with tiles that every sequence crosses."""
    problem = {"head_dim": {"qk": 2, "v": 3}, "queries": queries, "keys": keys}
    tile = {"block_m": 2, "block_n": 3}
    gradients = ["q", "k", "v"]
    return load({"target": "simulator", "problem": problem, "tile": tile, "gradients": gradients, **more})


@settings(suppress_health_check=list(HealthCheck))
@given(cases(specs(CPU_TARGETS, is_cut=True)))
def test_a_case_survives_its_line_of_json(case: Case) -> None:
    """Writing and reading gives the same case; some axis is cut, and its tensors hold all of its rows."""
    assert Case.from_json(case.to_json()) == case
    plan = plan_of(case.spec)
    assert plan is not None and not plan.lengths.are_dense
    for cut in case.shape.cuts.values():
        rows = 0
        for first, end in cut.spans:
            assert 0 <= first <= end <= cut.rows
            rows += end - first
        assert rows == sum(cut.lengths) and int((~cut.unused_rows).sum()) == rows


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"kind": "padded"}, "queries are ragged in the spec"),
        ({"lengths": [5, 0]}, "sizes are not those of queries"),
        ({"lengths": [5, 0, -1]}, "no integer from 0"),
        ({"unused": [1]}, "as sequences"),
    ],
)
def test_a_line_that_is_no_case_is_refused(change: dict[str, Any], told: str) -> None:
    """By what is wrong with how sequences are cut."""
    data = json.loads(Case(spec_of(), SHAPE).to_json())
    data["shape"]["queries"] |= change
    with pytest.raises(ValueError, match=told):
        Case.from_json(json.dumps(data))


@pytest.mark.parametrize("rule", OWN)
@pytest.mark.parametrize(
    "kinds", [("ragged", "ragged"), ("padded", "padded"), ("dense", "padded"), ("ragged", "dense")]
)
def test_a_right_kernel_holds_each_rule(kinds: tuple[str, str], rule: str) -> None:
    """Rows that do not count everywhere, a mask that asks for b, a gradient of lse."""
    spec = spec_of(*kinds, mask="kv_idx <= q_pos + b", score="score + 0.25 * b")
    cuts = {
        axis: None
        if kind == "dense"
        else replace(cut, kind=kind, unused=cut.unused if kind == "ragged" else ())
        for axis, kind, cut in zip(("queries", "keys"), kinds, (QUERIES, KEYS), strict=True)
    }
    seqlen_q, seqlen_k = (cut.size if cut else 4 for cut in cuts.values())
    shape = replace(SHAPE, seqlen_q=seqlen_q, seqlen_k=seqlen_k, **cuts)
    case = Case(spec, shape, seed=3, rule=rule, layout="bhsd", has_dlse=True)
    assert RULES[rule].may_hold(spec, plan_of(spec)) and Case.from_json(case.to_json()) == case  # type: ignore[arg-type]
    assert (failure := reproduce(case)) is None, str(failure)


def with_blocks(keys: Literal["ragged", "padded"], seed: int, rule: str) -> Case:
    """Sequences that fill several given blocks, one, and none, of a size that tiles lie across; and a sink."""
    spec = spec_of("ragged", keys, blocks={"block_m": 3, "block_n": 2}, sink="per_head")
    cut = replace(KEYS, kind=keys, lengths=(7, 0, 4), unused=() if keys == "padded" else KEYS.unused)
    return Case(spec, replace(SHAPE, keys=cut, seqlen_k=cut.size), seed=seed, rule=rule)


@pytest.mark.parametrize("rule", OWN)
@pytest.mark.parametrize("keys", ["ragged", "padded"])
@pytest.mark.parametrize("seed", [6, 4])
def test_given_blocks_hold_each_rule(seed: int, keys: Literal["ragged", "padded"], rule: str) -> None:
    """A map for each sequence and head, and one for all; each sequence is a dense call with the blocks it fills."""
    assert (failure := reproduce(with_blocks(keys, seed, rule))) is None, str(failure)


def test_the_dense_spec_reads_what_the_other_reads() -> None:
    """Tensors by token are by length, padded ones keep their dimension under another name, all else stays."""
    tensors = {"doc": "i32[tokens_k]", "bias": "f32[num_heads_q, tokens_k]"}
    ragged = spec_of(tensors=tensors, mask="doc[kv_idx] > 3", score="score + bias[h, kv_idx]", gradients=[])
    dense = dense_spec(ragged)
    assert dense.tensors == {"doc": "i32[seqlen_k]", "bias": "f32[num_heads_q, seqlen_k]"}
    assert (dense.mask, dense.tile, dense.problem.keys) == (ragged.mask, ragged.tile, "dense")
    padded = spec_of("dense", "padded", tensors={"doc": "i32[batch, seqlen_k]"}, mask="doc[b, kv_idx] > 3")
    assert dense_spec(padded).tensors == {"doc": "i32[batch, padded_k]"}
    ascending = padded.replace({"tensors.doc": "i32[batch, seqlen_k] sorted"})  # found by fuzzing
    assert dense_spec(ascending).tensors == dense_spec(padded).tensors


def test_a_padded_tensor_without_keys() -> None:
    """What a tensor is declared with may be of no length, but no dimension of another name; found by fuzzing."""
    tensors = {"ids": "i32[batch, seqlen_k]"}
    spec = spec_of("dense", "padded", tensors=tensors, mask="document(ids)", gradients=[])
    case = Case(spec, Shape(1, 1, 1, 1, 0, None, Cut("padded", (0,))), rule="sequences")
    assert (failure := reproduce(case)) is None, str(failure)


def test_no_sequence_and_no_token_has_gradients() -> None:
    """Of nothing, as a batch of none has; found by fuzzing."""
    nothing = Cut("ragged", ())
    case = Case(spec_of(), Shape(0, 1, 1, 0, 0, nothing, nothing), rule="gradients")
    assert (failure := reproduce(case)) is None, str(failure)


@dataclass(frozen=True)
class Slip:
    """A fault as people make them, in what a call is told or returns.

    Attributes:
        passed: what becomes of what is passed by name.
        made: what becomes of out, or of each gradient.
    """

    passed: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda passed: passed
    made: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
    of_gradients: Callable[[torch.Tensor], torch.Tensor] = lambda x: x


def _without(name: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    return lambda passed: {key: x for key, x in passed.items() if key != name}


def _next(passed: Mapping[str, Any]) -> Mapping[str, Any]:
    """Sequences of keys that begin a row late."""
    starts = passed.get("cu_seqlens_k")
    if starts is None or len(starts) < 3:
        return passed
    late = torch.cat((starts[:1], starts[1:-1] + 1, starts[-1:]))
    return {**passed, "cu_seqlens_k": late}


def _first_page(passed: Mapping[str, Any]) -> Mapping[str, Any]:
    """All keys of a request lie in its first page."""
    table = passed.get("block_table")
    return (
        passed
        if table is None or not table.numel()
        else {**passed, "block_table": table[:, :1].expand_as(table)}
    )


def _last_row_left(x: torch.Tensor) -> torch.Tensor:
    """The last token is not written."""
    x = x.clone()
    x[-1:] = torch.nan
    return x


SLIPS = {
    "leftpad is forgotten": Slip(_without("leftpad_k")),
    "used keys are forgotten": Slip(_without("seqused_k")),
    "sequences begin a row late": Slip(_next),
    "one page is read again and again": Slip(_first_page),
    "a tail is not written": Slip(made=_last_row_left),
    "a tail's gradients are not written": Slip(of_gradients=_last_row_left),
}


class Slipping:
    """A kernel with a slip; dense ones are right."""

    def __init__(self, spec: Spec, slip: Slip) -> None:
        self.kernel = compile(spec)
        self.plan = self.kernel.plan
        self.slip = Slip() if self.plan.lengths.are_dense else slip

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        names = {each.name for each in self.plan.lengths.arguments}
        passed = self.slip.passed(options)
        missing = {each.name for each in self.plan.lengths.arguments if not each.is_optional} - set(passed)
        made = self.kernel(*arguments, **(options if missing & names else passed))
        return (self.slip.made(made[0]), *made[1:]) if isinstance(made, tuple) else self.slip.made(made)

    def backward(self, *arguments: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        return tuple(map(self.slip.of_gradients, self.kernel.backward(*arguments, **options)))


def slipped(name: str) -> set[str]:
    """Where a slip is made."""
    return {place for place, right in vars(Slip()).items() if getattr(SLIPS[name], place) is not right}


@pytest.mark.matrix(classes=slipped)
@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_is_found(name: str) -> None:
    """Within 300 cases, and the case fails for the slip alone."""
    slip = SLIPS[name]
    report = fuzz(
        examples=300,
        seed=1,
        targets=("simulator",),
        make=lambda spec: Slipping(spec, slip),
        is_cut=True,
        backward="gradients" in name,
    )
    assert report.failure is not None, "not found"
    assert reproduce(report.failure.case) is None, report


def in_pieces(case: Case) -> bool:
    """Whether keys come by pieces of pages."""
    plan = plan_of(case.spec)
    return plan is not None and plan.takes_pieces


@settings(max_examples=examples(0.25), suppress_health_check=list(HealthCheck))
@given(cases(specs(("simulator",), is_cut=True)).filter(in_pieces))
def test_pages_in_pieces_hold_every_property(case: Case) -> None:
    """Of sizes that the copy engine cuts, and whatever the lengths."""
    assert (failure := reproduce(case)) is None, str(failure)


@pytest.mark.parametrize("rule", ["error", "sequences", "sequence-gradients"])
def test_blocks_of_another_sequence_are_found(rule: str) -> None:
    """All sequences take the blocks of the first."""
    slip = Slip(lambda passed: {**passed, "blocks": passed["blocks"][:1]})
    case = with_blocks("ragged", 6, rule)
    assert reproduce(case, make=lambda spec: Slipping(spec, slip)) is not None

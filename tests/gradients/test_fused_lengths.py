"""The fused backward of sequences with lengths of their own: each is a dense call, and nothing beside it counts."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

import attngen
from attngen.bind import bind, check_arguments
from attngen.lower import fused_gradients
from attngen.plan import GRADIENTS_INTAKE, PADDED_ROWS, FinishSums, PrepareRows, in_f32, padded_start
from attngen.runtime import disassemble
from attngen.simulate import SimulationFault
from attngen.simulate.launches import run_call
from attngen.simulate.simulated_sheets import finish_sums
from attngen.simulate.visits import Sizes
from attngen.spec_call import GRADIENTS
from tests.emit.sass import done_before_waiting
from tests.gradients.test_backward_programs import plans_without_one
from tests.gradients.test_fused_backward import as_registers, run_on_cpu

KINDS = ("ragged ragged", "padded padded", "ragged padded", "dense ragged")
SEQLENS = ((70, 130), (0, 5), (200, 70), (1, 300))
"""Queries and keys: of several blocks, of less than one, and of none."""
HEADS, HEADS_KV = 4, 2
AHEAD, BEHIND = 5, 9
"""Tokens that no sequence has."""


@pytest.fixture(autouse=True)
def _taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fused_gradients, "TAKES_OWN_LENGTHS", True)
    monkeypatch.setattr(fused_gradients, "ORDERED_IS_FASTER", True)
    yield


def fused(kinds: str, mask: str = "causal", head_dim: int = 64, **more: Any) -> attngen.Kernel:
    """A kernel of one program for all gradients."""
    queries, keys = kinds.split()
    spec = {
        "target": "sm_90a",
        "problem": {"head_dim": head_dim, "queries": queries, "keys": keys},
        "mask": mask,
        "gradients": list("qkv"),
        **more,
    }
    kernel = attngen.compile(spec)
    assert [plan.schedule for plan in kernel.call.gradients] == ["fused_gradients"]
    return kernel


class Batch:
    """Inputs of a call, with NaN wherever no sequence has anything, and where each sequence stands in them."""

    def __init__(
        self, kinds: str, head_dim: int = 64, seqlens: tuple[tuple[int, int], ...] = SEQLENS
    ) -> None:
        self.generator = torch.Generator().manual_seed(len(seqlens))
        self.named: dict[str, torch.Tensor] = {}
        self.places: list[list[Any]] = []
        shapes = []
        for letter, kind, lengths in zip("qk", kinds.split(), zip(*seqlens, strict=True), strict=True):
            if kind == "dense":
                lengths = (max(lengths),) * len(lengths)
            starts = torch.tensor([AHEAD, *lengths]).cumsum(0).int()
            if kind == "ragged":
                self.named[f"cu_seqlens_{letter}"] = starts
                places = [slice(int(first), int(end)) for first, end in zip(starts, starts[1:], strict=False)]
                shapes.append((int(starts[-1]) + BEHIND,))
            else:
                places = [(b, slice(0, length)) for b, length in enumerate(lengths)]
                shapes.append((len(lengths), max(lengths) + (3 if kind == "padded" else 0)))
                if kind == "padded":
                    self.named[f"seqused_{letter}"] = torch.tensor(lengths, dtype=torch.int32)
            self.places.append(places)
        sides = (0, 1, 1, 0)
        self.q, self.k, self.v, self.dout = (
            self._drawn((*shapes[side], HEADS_KV if side else HEADS, head_dim), self.places[side])
            for side in sides
        )

    def _drawn(self, shape: tuple[int, ...], places: list[Any]) -> torch.Tensor:
        drawn = torch.randn(shape, generator=self.generator).bfloat16()
        poisoned = torch.full_like(drawn, math.nan)
        for at in places:
            poisoned[at] = drawn[at]
        return poisoned

    def given(self, kernel: attngen.Kernel) -> Any:
        """What a backward pass is given, the forward's results included."""
        out, lse = kernel(self.q, self.k, self.v, return_lse=True, **self.named)
        named = {**self.named, "dout": self.dout, "out": out, "lse": lse}
        return check_arguments(
            kernel.manifest, self.q, self.k, self.v, None, {}, "bshd", named, GRADIENTS_INTAKE
        )


def gradients(kernel: attngen.Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor,
              **named: torch.Tensor) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """dq, dk and dv of a call, f32."""
    out, lse = kernel(q, k, v, return_lse=True, **named)
    held = [torch.full_like(x, math.nan, dtype=torch.float32) for x in (q, k, v)]
    return kernel.backward(dout, q, k, v, out, lse, grads=held, **named)


@pytest.mark.matrix
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("mask", ["full", "causal", "window(100, 30)"])
@pytest.mark.parametrize("kinds", KINDS)
def test_each_sequence_is_a_dense_call(kinds: str, mask: str, head_dim: int, deterministic: bool) -> None:
    """dk and dv to the bit, dq too where additions have one order; 0 in rows that no sequence has."""
    of, order = Batch(kinds, head_dim), {"deterministic": deterministic}
    found = gradients(fused(kinds, mask, head_dim, **order), of.q, of.k, of.v, of.dout, **of.named)
    dense = fused("dense dense", mask, head_dim, **order)
    for rows, keys in zip(*of.places, strict=True):
        q, k, v, dout = (x[at][None] for x, at in ((of.q, rows), (of.k, keys), (of.v, keys), (of.dout, rows)))
        dq, dk, dv = gradients(dense, q, k, v, dout)
        for name, gradient, own, at in zip(GRADIENTS, found, (dq, dk, dv), (rows, keys, keys), strict=True):
            if name == "dq" and not deterministic:
                torch.testing.assert_close(gradient[at], own[0], rtol=2.0**-18, atol=1e-5)
            else:
                assert torch.equal(gradient[at], own[0]), name
            gradient[at] = 0.0
    assert not any(gradient.any() for gradient in found)


def test_there_may_be_no_sequence() -> None:
    """All tokens are nobody's, and their gradients 0."""
    kernel, none = fused("ragged ragged"), torch.zeros(1, dtype=torch.int32)
    x, y = (torch.full((150, heads, 64), math.nan, dtype=torch.bfloat16) for heads in (HEADS, HEADS_KV))
    found = gradients(kernel, x, y, y, x, cu_seqlens_q=none, cu_seqlens_k=none)
    assert not any(gradient.any() for gradient in found)


@pytest.mark.parametrize("kinds", KINDS[:2])
def test_the_same_bits_on_any_number_of_multiprocessors(kinds: str) -> None:
    """With one block at a time, two or three every block comes to its rank."""
    kernel = fused(kinds)
    given, wanted = Batch(kinds).given(kernel), tuple(map(in_f32, GRADIENTS))
    made = [run_call(kernel.call, bind(kernel.call.manifest, given, wanted, count)) for count in (1, 2, 3)]
    assert all(torch.equal(each[name], made[0][name]) for each in made for name in wanted)


@pytest.mark.parametrize("starts", [(0, 200, 50, 310), (0, 0, 0, 310), (300, 200, 100, 0)], ids=str)
def test_lengths_that_lie_hold_nobody_up(starts: tuple[int, ...]) -> None:
    """Sequences that overlap share sums and counts: what comes of them is anything, and it comes."""
    kernel, cut = fused("ragged ragged"), torch.tensor(starts, dtype=torch.int32)
    q, k = (torch.randn(310, heads, 64).bfloat16() for heads in (HEADS, HEADS_KV))
    gradients(kernel, q, k, k, q, cu_seqlens_q=cut, cu_seqlens_k=cut)


def test_every_zero_over_neighbours_is_needed() -> None:
    """Without those over any of the four tensors, or their fence, a gradient is NaN, or the simulator faults."""
    of, left_out = Batch("ragged ragged"), []
    for mask in ("full", "causal"):
        kernel = fused("ragged ragged", mask)
        given, (plan,) = of.given(kernel), kernel.call.gradients
        spare = set()
        for missing, shorter in plans_without_one(plan):
            _, _, step = missing.partition("past the end of ")
            if not step or not any(word in step for word in (": zero ", ": fence")):
                continue
            kernels = tuple(shorter if each is plan else each for each in kernel.call.kernels)
            call = replace(kernel.call, kernels=kernels)
            try:
                made = run_call(call, bind(call.manifest, given, GRADIENTS, 2))
            except SimulationFault:
                continue
            if not any(made[name].isnan().any() for name in GRADIENTS):
                spare.add(missing)
        left_out.append(spare)
    assert set.intersection(*left_out) == set()


# ---- what is emitted ------------------------------------------------------------------------------------------------
@pytest.mark.matrix
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("mask", ["full", "causal", "window(100, 30)"])
@pytest.mark.parametrize("kinds", KINDS[:2])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_kernels_compile_without_spills(
    head_dim: int, kinds: str, mask: str, deterministic: bool, nvdisasm: None
) -> None:
    """What is listed and waited for leaves products in flight; nothing is touched before a kernel has waited."""
    kernel = fused(kinds, mask, head_dim, deterministic=deterministic)
    beside = (each for each in kernel.call.kernels if isinstance(each, FinishSums | PrepareRows))
    for each in (*kernel.call.gradients, *beside):
        compiled = kernel.modules[each.module].compiled
        assert all(used.spill_stores == used.spill_loads == 0 for used in compiled.resources), each.name
        assert "C75" not in str(compiled.warnings), each.name
        assert done_before_waiting(disassemble(compiled.cubin)) == []


CUTS = ((0, 70, 70, 300), (5, 75, 140), (130, 131, 300), (200,), (0,))
"""Where sequences begin among `TOKENS`, and where the last ends."""
TOKENS = 310


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("starts", CUTS, ids=str)
def test_the_text_that_finishes_sums(starts: tuple[int, ...], head_dim: int, accumulates: bool) -> None:
    """By g++: the rows of every sequence, zeros in those of none, wherever they lie, and nothing behind all tokens."""
    (sheet,) = (
        each
        for each in fused("ragged ragged", head_dim=head_dim).call.kernels
        if isinstance(each, FinishSums)
    )
    batch, heads = len(starts) - 1, 3
    padded = (-(-TOKENS // PADDED_ROWS) + batch) * PADDED_ROWS
    sums = torch.randn(heads, padded, head_dim, generator=torch.Generator().manual_seed(0))
    used = torch.zeros(padded, dtype=torch.bool)
    for b, (first, end) in enumerate(pairwise(starts)):
        at = padded_start(first, b)
        used[at : at + end - first] = True
    sums[:, ~used] = 0.0  # as kernels leave rows that no sequence has
    cut, held = torch.tensor(starts, dtype=torch.int32), torch.ones(TOKENS + 9, heads, head_dim).bfloat16()
    sizes = Sizes(batch, 300, 1, heads, heads, softmax_scale=0.25, accumulates=accumulates, tokens_q=TOKENS)
    expected = finish_sums(sheet, {"dq_sums": sums, "dq": held[:TOKENS], "cu_seqlens_q": cut}, sizes)["dq"]
    made, numbers = held.clone(), {"batch": batch, "tokens_q": TOKENS, "num_heads_q": heads}
    numbers |= {"gradient_scale": 0.25, "accumulates": accumulates}
    values = {"dq_sums": as_registers(sums[None], sheet)[0], "dq": made, "cu_seqlens_q": cut}
    run_on_cpu(sheet, values, numbers)
    assert torch.equal(made[:TOKENS], expected)
    assert torch.equal(made[TOKENS:], held[TOKENS:])


def test_the_text_that_prepares_rows_clears_all_sums() -> None:
    """By g++: every element and every count of every head is 0, those of padding too."""
    kernel = fused("ragged ragged")
    (sheet,) = (each for each in kernel.call.kernels if isinstance(each, PrepareRows))
    sums, ranks = sheet.cleared
    heads, starts = 3, torch.tensor([5, 75, 75, 140], dtype=torch.int32)
    padded = (-(-TOKENS // PADDED_ROWS) + 3) * PADDED_ROWS
    x = torch.ones(TOKENS, heads, 64, dtype=torch.bfloat16)
    values = {"out": x, "dout": x, "lse": torch.zeros(heads, TOKENS), "cu_seqlens_q": starts}
    values |= {each: torch.empty(heads, padded) for each in sheet.writes}
    values |= {sums.name: torch.full((heads, padded, 64), math.nan)}
    counts = heads * padded // ranks.block_m * ranks.owners
    memory = values[ranks.name] = torch.full((counts + 64,), 7, dtype=torch.int32)
    run_on_cpu(sheet, values, {"batch": 3, "tokens_q": TOKENS, "num_heads_q": heads})
    assert (values[sums.name] == 0).all()
    assert not memory[:counts].any() and (memory[counts:] == 7).all()

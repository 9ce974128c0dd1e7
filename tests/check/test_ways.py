"""Ways to compute attention with torch: right in f64, with gradients; what each can be asked; what a run costs."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from attngen.check import cost_of_run, ways
from attngen.check.problem import Problem
from attngen.check.reference import attention
from attngen.errors import ToolchainError
from attngen.expr import parse_mask, parse_score
from attngen.expr.declare import read_declarations

HEADS, GROUPS, COLUMNS = 4, 2, 32
DOCUMENTS = {"doc": "i32[batch, seqlen_k]"}
CALLS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "full": ("full", "score", {}),
    "causal": ("causal", "score", {}),
    "window": ("causal and window(20, 0)", "score", {}),
    "documents": ("document(doc)", "score", {"doc": torch.arange(300)[None].expand(2, -1) // 90}),
    "softcap": ("causal", "softcap(score, 3.0)", {}),
    "added": ("causal", "score - 0.1 * abs(f32(q_idx - kv_idx)) * f32(h + 1)", {}),
    "sink": ("causal", "score", {"sink": torch.tensor([0.0, 1.0, -1.0, 3.0])}),
}
OF_SDPA = ("full", "causal", "window", "documents", "added")


def problem(call: str, queries: int = 300, keys: int = 300, dtype: torch.dtype = torch.float64) -> Problem:
    """A call in f64, whose leaves require grad."""
    mask, score, declared = CALLS[call]
    declarations = read_declarations({}, DOCUMENTS if "doc" in declared else {}, {}).declarations
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, HEADS, queries, COLUMNS), (2, GROUPS, keys, COLUMNS), (2, GROUPS, keys, 16))
    q, k, v = (torch.randn(x, generator=generator, dtype=dtype).requires_grad_() for x in shapes)
    expressions = parse_mask(mask, declarations), parse_score(score, declarations)
    return Problem(
        q, k, v, expressions[0], 0.2, "bhsd", queries, torch.arange(queries), expressions[1], declared
    )


def of_sdpa(asked: Problem) -> torch.Tensor:
    return ways.sdpa(asked, SDPBackend.MATH, *ways.sdpa_arguments(asked))()


def gradients(way: Callable[[Problem], torch.Tensor], asked: Problem) -> tuple[torch.Tensor, ...]:
    out = way(asked)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return (out.detach(), *torch.autograd.grad(out, (asked.q, asked.k, asked.v), dout))


@pytest.mark.parametrize("call", CALLS)
def test_every_way_computes_the_same(call: str) -> None:
    """Out is the definition's, written out; chunks of 128 queries, and torch's functions, have its gradients."""
    asked = problem(call)
    inputs = (asked.q, asked.k, asked.v, asked.mask, asked.softmax_scale, "bhsd")
    exact, _ = attention(*inputs, score=asked.score, declared=asked.declared)
    # P is f32, whatever the inputs are.
    expected = gradients(ways.eager, asked)
    torch.testing.assert_close(expected[0], exact, atol=1e-6, rtol=0)
    found = [gradients(ways.query_chunked, asked)]
    found += [gradients(of_sdpa, asked)] if call in OF_SDPA else []
    for each in found:
        for x, y in zip(each, expected, strict=True):
            assert y.abs().max() > 0.05
            torch.testing.assert_close(x, y, atol=1e-5, rtol=0)


def test_torchs_function_is_asked_by_name_or_with_a_mask() -> None:
    """is_causal where lengths make it the same; else a mask of what it depends on; nothing that it does not know."""
    assert ways.sdpa_arguments(problem("full")) == (None, False)
    assert ways.sdpa_arguments(problem("causal")) == (None, True)
    shapes = {"documents": (2, 1, 300, 300), "window": (1, 1, 300, 300), "added": (1, HEADS, 300, 300)}
    for call, shape in shapes.items():
        mask, is_causal = ways.sdpa_arguments(problem(call))
        assert mask is not None and mask.shape == shape and not is_causal
        assert mask.dtype == (torch.float64 if call == "added" else torch.bool)
    mask, _ = ways.sdpa_arguments(problem("causal", queries=10))
    assert mask is not None and mask[0, 0, 0].sum() == 291  # the last query stands beside the last key
    for call, told in (("softcap", "no scores"), ("sink", "no learned sinks")):
        with pytest.raises(ToolchainError, match=told):
            ways.sdpa_arguments(problem(call))


CPU = torch.device("cpu")


def test_memory_is_what_is_allocated_at_once() -> None:
    """Of two tensors that live together both, of two that follow each other one; what was there before is none."""
    before = torch.zeros(10_000, dtype=torch.float32)

    def together() -> list[torch.Tensor]:
        return [torch.empty(1000, dtype=torch.float32), torch.empty(500, dtype=torch.float32)]

    def one_by_one() -> None:
        for size in (1000, 500):
            torch.empty(size, dtype=torch.float32)

    assert cost_of_run.peak_bytes(together, CPU) == 6000
    assert cost_of_run.peak_bytes(one_by_one, CPU) == 4000
    assert cost_of_run.peak_bytes(lambda: before.view(100, 100).mT, CPU) == 0
    assert cost_of_run.peak_bytes(lambda: before.square().sum(), CPU) == pytest.approx(40_000, abs=100)


def test_a_failed_run_ends_its_measurement() -> None:
    """The next one counts from the beginning."""
    with pytest.raises(ZeroDivisionError):
        cost_of_run.peak_bytes(lambda: 1 // 0, CPU)
    assert cost_of_run.peak_bytes(lambda: torch.empty(10, dtype=torch.float32), CPU) == 40


@pytest.mark.parametrize("trains", [False, True], ids=["forward", "forward and backward"])
def test_memory_grows_as_the_field_says(trains: bool) -> None:
    """Eager attention's with the square of the length, that of chunks with the length."""

    def needed(way: Callable[[Problem], torch.Tensor], length: int) -> int:
        asked = problem("full", length, length, torch.float32)

        def run() -> Any:
            with torch.set_grad_enabled(trains):
                return gradients(way, asked) if trains else way(asked)

        run()
        return cost_of_run.peak_bytes(run, CPU)

    short, long = (needed(ways.eager, length) for length in (512, 1024))
    assert 3.5 < long / short < 4.2
    assert long > 2 * HEADS * 1024**2 * 4
    short, long = (needed(ways.query_chunked, length) for length in (512, 1024))
    assert 1.5 < long / short < 2.2


def test_time_is_the_median() -> None:
    """Of some runs; of a long one there are few."""
    assert 0.002 <= cost_of_run.median_seconds(lambda: time.sleep(0.002), CPU) < 0.2
    rounds: list[int] = []
    cost_of_run.median_seconds(lambda: rounds.append(0), CPU)
    assert len(rounds) == cost_of_run.ROUNDS

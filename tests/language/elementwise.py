"""Random expressions on a GPU, element by element, against `attngen.expr.evaluate`.

Everything is compared bit by bit: bool, i32, and the f32 arithmetic of the language, whose every operation is rounded
correctly. What CUDA approximates (`exp`, `sin`, ...) is cut out of the tree: the kernel writes each such value too,
which is held to the error that `functions.py` states for the function, and the rest of the tree is evaluated from
there. So errors never add up, and a comparison of two such values is still compared bit by bit.

Indices reach the largest there may be, so that 32 bits overflow wherever the text lets them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st

from attngen.errors import ExpressionError
from attngen.expr import (
    LARGEST_INDEX,
    LARGEST_LENGTH,
    Expr,
    evaluate,
    nodes,
    parse_mask,
    parse_score,
    scalar,
    with_nodes,
)
from attngen.fuzz.draw_expressions import DECLARATIONS, integers, masks, scores
from attngen.plan import KernelPlan
from tests.language.declared import random_scalars, random_tensors
from tests.language.functions import EXACT, excess
from tests.language.probe import INDICES, Probe, as_f32, moved, parameters, plan_that_reads_all, sample_fields
from tests.language.probe_sources import PROBE_THREADS, elementwise_source

MODULE_SIZE = 200
"""Expressions of a module."""
SAMPLES = 2048
"""Values of (b, h, q_idx, kv_idx) for which an expression is evaluated."""
SIZES = {"batch": 3, "num_heads_q": 6, "num_heads_kv": 3, "seqlen_q": 17, "seqlen_k": 23}
"""Of the tensors; q_idx and kv_idx go far beyond them, and are clamped."""
_ROUND = 100
_SCORES = (0.0, -0.0, 1e-40, -3e38, float("nan"), float("inf"), -float("inf"))


@dataclass(frozen=True)
class Drawn:
    """An expression and its text."""

    text: str
    expr: Expr


@dataclass(frozen=True)
class Mismatch:
    """A value that a GPU gave and should not have.

    Attributes:
        text: of the expression.
        part: of it that is wrong.
        at: the names it reads, and their values.
    """

    text: str
    part: str
    got: float
    expected: float
    at: dict[str, Any]

    def __str__(self) -> str:
        where = ", ".join(f"{name} = {value}" for name, value in self.at.items())
        return f"{self.text}\n{self.part} is {self.got!r} on the GPU, {self.expected!r} is right, at {where}"


@dataclass(frozen=True)
class _Cut:
    """An expression whose approximated calls are names.

    Attributes:
        rest: the expression without them.
        calls: the calls, in an order in which they can be computed.
        arguments: of each, without the calls in it.
    """

    rest: Expr
    calls: tuple[Expr, ...]
    arguments: tuple[Expr, ...]

    @staticmethod
    def of(expr: Expr) -> "_Cut":
        calls = tuple(each for each in nodes(expr) if each.op == "call" and each.name in EXACT)
        names = {each: scalar(f"call {place}", "f32") for place, each in enumerate(calls)}
        arguments = tuple(with_nodes(each.args[0], names) for each in calls)
        return _Cut(with_nodes(expr, names), calls, arguments)


def draw_expressions(count: int, seed: int = 0) -> list[Drawn]:
    """Different expressions of all three types, over `expressions.DECLARATIONS`."""
    found: dict[Expr, Drawn] = {}
    kinds = (("bool", masks), ("i32", integers), ("f32", scores))
    texts = st.one_of(*(st.tuples(st.just(type), of(DECLARATIONS)) for type, of in kinds))

    def collect(drawn: tuple[str, str]) -> None:
        type, text = drawn
        try:
            expr = parse_mask(text, DECLARATIONS) if type == "bool" else parse_score(text, DECLARATIONS)
        except ExpressionError:
            return  # its range may exceed what the language takes
        if type == "i32" and expr.op == "call":
            (expr,) = expr.args
        if expr.op != "const" and len(found) < count:
            found.setdefault(expr, Drawn(text, expr))

    once = settings(
        max_examples=min(count, _ROUND),
        phases=(Phase.generate,),
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    number = 0
    while len(found) < count:
        with_seed(seed * 1_000_003 + number)(once(given(texts)(collect)))()
        number += 1
    return list(found.values())


def modules(drawn: Sequence[Drawn]) -> list[Sequence[Drawn]]:
    """The expressions, as many to each as a module has."""
    return [drawn[start : start + MODULE_SIZE] for start in range(0, len(drawn), MODULE_SIZE)]


def source_of(drawn: Sequence[Drawn], plan: KernelPlan) -> str:
    """The file of a kernel for each expression."""
    kernels = {_kernel(i): (each.expr, *_Cut.of(each.expr).calls) for i, each in enumerate(drawn)}
    return elementwise_source(plan, kernels)


def check_elementwise(
    drawn: Sequence[Drawn], target: str, seed: int = 0, device: str = "cuda"
) -> list[Mismatch]:
    """Evaluate the expressions of one module on a GPU; where each that is wrong is so first."""
    plan = plan_that_reads_all(DECLARATIONS, target)
    probe = Probe(source_of(drawn, plan), target, device)
    generator = torch.Generator().manual_seed(seed)
    tensors = random_tensors(DECLARATIONS, SIZES, generator, is_wild=True)
    scalars = random_scalars(DECLARATIONS, generator, is_wild=True)
    samples = draw_samples(generator)
    cuts = [_Cut.of(each.expr) for each in drawn]
    found = torch.zeros(
        sum(1 + len(cut.calls) for cut in cuts), SAMPLES, dtype=torch.int64, device=probe.device
    )
    on_gpu = moved(tensors, probe.device)
    given_ = parameters(plan, SIZES, scalars, on_gpu)
    there = {name: x.to(probe.device) for name, x in samples.items()}
    for i in range(len(drawn)):
        probe.run(_kernel(i), -(-SAMPLES // PROBE_THREADS), given_, sample_fields(there, found))
    rows = iter(found.cpu())
    wrong = []
    for each, cut in zip(drawn, cuts, strict=True):
        values = [next(rows) for _ in range(1 + len(cut.calls))]
        mismatch = _compare(each, cut, values, samples | scalars, tensors)
        wrong += [mismatch] if mismatch else []
    return wrong


def _kernel(place: int) -> str:
    return f"expression_{place}"


def draw_samples(generator: torch.Generator, count: int = SAMPLES) -> dict[str, torch.Tensor]:
    """Indices from 0 to the largest, and scores with NaN and infinities among them."""
    samples = {
        name: torch.randint(0, SIZES[size], (count,), generator=generator, dtype=torch.int32)
        for name, size in (("b", "batch"), ("h", "num_heads_q"))
    }
    samples["h_kv"] = samples["h"] // (SIZES["num_heads_q"] // SIZES["num_heads_kv"])
    for name in INDICES[3:]:
        highest = LARGEST_LENGTH if name.startswith("seqlen") else LARGEST_INDEX
        ranges = torch.stack(
            [
                torch.randint(0, 40, (count,), generator=generator),
                torch.randint(0, highest + 1, (count,), generator=generator),
                highest - torch.randint(0, 3, (count,), generator=generator),
            ]
        )
        samples[name] = _one_of(ranges, (0.6, 0.8), generator).to(torch.int32)
    rare = torch.tensor(_SCORES)[torch.randint(0, len(_SCORES), (count,), generator=generator)]
    scores = torch.stack([3 * torch.randn(count, generator=generator), rare])
    return samples | {"score": _one_of(scores, (0.9,), generator)}


def _one_of(choices: torch.Tensor, thresholds: tuple[float, ...], generator: torch.Generator) -> torch.Tensor:
    """Of each column one of its rows."""
    picked = torch.bucketize(torch.rand(choices.shape[1], generator=generator), torch.tensor(thresholds))
    return choices.gather(0, picked[None])[0]


def _compare(
    drawn: Drawn, cut: _Cut, values: list[torch.Tensor], env: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> Mismatch | None:
    value, *calls = values
    known = env | {f"call {place}": as_f32(got) for place, got in enumerate(calls)}
    for call, argument, got in zip(cut.calls, cut.arguments, calls, strict=True):
        x = _spread(evaluate(argument, known, tensors))
        too_far = excess(EXACT[call.name], x, as_f32(got)) > 0
        if bool(too_far.any()):
            at = int(too_far.nonzero()[0])
            right = EXACT[call.name].of(x[at].double()).item()
            return _mismatch(drawn, str(call), as_f32(got)[at].item(), right, env, at)
    expected = _spread(evaluate(cut.rest, known, tensors))
    if drawn.expr.type == "f32":
        got, same = as_f32(value), as_f32(value) == expected
        same |= got.isnan() & expected.isnan()
    else:
        got, same = value, value == expected
    if bool(same.all()):
        return None
    at = int((~same).nonzero()[0])
    return _mismatch(drawn, str(drawn.expr), got[at].item(), expected[at].item(), env, at)


def _spread(value: Any) -> torch.Tensor:
    return torch.as_tensor(value).expand(SAMPLES)


def _mismatch(drawn: Drawn, part: str, got: float, expected: float, env: dict[str, Any], at: int) -> Mismatch:
    values = {name: x[at].item() if isinstance(x, torch.Tensor) else x for name, x in env.items()}
    return Mismatch(drawn.text, part, got, expected, values)

"""Learned sinks on the simulator: every schedule against fp64, whatever the sink, and what must not change."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import attngen
from attngen.check.inputs import Shape, random_inputs
from attngen.check.judging import draw, judge
from attngen.check.reference import attention
from attngen.plan.steps import JoinSink, ReadSink, Step
from attngen.simulate import simulate
from attngen.simulate.launches import STEPS_SIMULATED
from attngen.simulate.roles import Event, RoleRun, StepFunction

KINDS = ("serial", "fa2", "warp_specialized", "pingpong")
SOME_SEE_NONE = "kv_idx < q_pos - 2"
SHAPE = Shape(batch=2, heads=4, heads_kv=2, seqlen_q=23, seqlen_k=21)
SINKS: dict[str, tuple[float, ...]] = {
    "random": (0.7, -1.3, 2.5, 4.0),
    "ends": (-math.inf, math.inf, 1e4, -1e4),
    "huge": (3e38, -3e38, 1e30, -1e30),
}
BOUNDED, UNBOUNDED = "softcap(score, 5.0)", "score + 2.0 * tanh(score)"
PADDING = "score if kv_idx < 9 else -1e30"


@dataclass(frozen=True)
class SinkCase:
    """A spec with a sink, on the simulator."""

    kind: str
    score: str = "score"
    mask: str = SOME_SEE_NONE
    inputs: str = "f32"
    precision: tuple[tuple[str, Any], ...] = ()
    stages: int = 2

    def __str__(self) -> str:
        more = ", ".join(str(value) for _, value in self.precision)
        return f"{self.kind} {self.inputs} {self.mask} | {self.score} {more}".strip()

    def kernel(self, sink: str = "per_head") -> attngen.Kernel:
        is_8bit = self.inputs == "e4m3"
        return attngen.compile(
            {
                "target": "simulator",
                "problem": {"head_dim": 16 if is_8bit else 8},
                "precision": {"inputs": self.inputs, **dict(self.precision)},
                "mask": self.mask,
                "score": self.score,
                "sink": sink,
                "tile": {"block_m": 8, "block_n": 16 if is_8bit else 4},
                "schedule": {"kind": self.kind, "stages": 1 if self.kind == "serial" else self.stages},
            }
        )


CASES = (
    *(SinkCase(kind, score) for kind in KINDS for score in ("score", BOUNDED, UNBOUNDED, PADDING)),
    *(SinkCase(kind, inputs=inputs) for kind in KINDS for inputs in ("bf16", "f16")),
    SinkCase("fa2", mask="causal and (window(5, 0) or sinks(2))"),
    SinkCase("pingpong", mask="kv_idx % 3 != q_idx % 2"),
    *(
        SinkCase(kind, score, inputs="e4m3", precision=(("scales", scales), ("promote", promote)))
        for kind, score, scales, promote in (
            ("warp_specialized", "score", "per_block", 1),
            ("warp_specialized", BOUNDED, "per_token", 0),
            ("pingpong", "score", "per_head", 0),
            ("pingpong", UNBOUNDED, "per_tensor", 1),
        )
    ),
)


def sinks(name: str) -> torch.Tensor:
    return torch.tensor(SINKS[name])


def call(
    kernel: attngen.Kernel, sink: torch.Tensor | None = None, **more: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = draw(kernel.plan, SHAPE, seed=3)
    out, lse = kernel(q, k, v, return_lse=True, **({} if sink is None else {"sink": sink}), **more)
    return out, lse


@pytest.mark.matrix
@pytest.mark.parametrize("name", SINKS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_sink_joins_the_sum(case: SinkCase, name: str) -> None:
    """Out and lse are within the rule; a row that sees no key is 0, and its lse the sink to the bit."""
    kernel, sink = case.kernel(), sinks(name)
    inputs = draw(kernel.plan, SHAPE, seed=3)
    out, lse = kernel(*inputs, return_lse=True, sink=sink)
    verdict = judge(kernel.spec, kernel.plan, out, lse, *inputs, declared={"sink": sink})
    assert verdict.ok, verdict
    _, of_keys = attention(*inputs, kernel.spec.mask_expr, score=kernel.spec.score_expr)
    sees_none = of_keys.isneginf()
    assert sees_none.any() or case.mask != SOME_SEE_NONE
    assert not out.transpose(1, 2)[sees_none].any()
    assert torch.equal(lse[sees_none], sink[None, :, None].expand_as(lse)[sees_none])
    assert not out[:, :, sink == math.inf].any() and bool((lse[:, sink == math.inf] == math.inf).all())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_sink_of_minus_infinity_is_none(case: SinkCase) -> None:
    """The same bits come out as of the spec without the key."""
    none = torch.full((4,), -math.inf)
    (out, lse), (plain, plain_lse) = call(case.kernel(), none), call(case.kernel("none"))
    assert torch.equal(out, plain) or case.kind == "serial"  # which normalises once more
    torch.testing.assert_close(out.float(), plain.float(), rtol=2**-7, atol=0.0)
    assert torch.equal(lse, plain_lse)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sink_is_no_score(kind: str) -> None:
    """softmax_scale, a negative one and 0 too, leaves it alone, and so does what a spec makes of scores."""
    for case, scale in ((SinkCase(kind), -0.7), (SinkCase(kind), 0.0), (SinkCase(kind, "score - 40.0"), 1.5)):
        kernel, sink = case.kernel(), torch.tensor([1.0, -30.0, 3.0, -38.0])
        inputs = draw(kernel.plan, SHAPE, seed=3)
        out, lse = kernel(*inputs, scale, return_lse=True, sink=sink)
        verdict = judge(kernel.spec, kernel.plan, out, lse, *inputs, scale, declared={"sink": sink})
        assert verdict.ok, verdict


@pytest.mark.parametrize("kind", KINDS)
def test_formats_and_strides_of_a_sink_are_read(kind: str) -> None:
    """One kernel takes f32, bf16 and f16, any stride and any offset; numbers that all formats have give one result."""
    kernel = SinkCase(kind).kernel()
    wanted = call(kernel, sinks("random").bfloat16().float())
    short = sinks("random").bfloat16()
    spread, reversed_ = torch.full((9,), math.nan), short.flip(0).contiguous()
    spread[1::2] = short.float()
    for sink in (short, spread[1::2], reversed_.flip(0), torch.stack((short, short), 1)[:, 1]):
        assert all(torch.equal(x, y) for x, y in zip(call(kernel, sink), wanted, strict=True))
    whole = torch.tensor([1.5, -2.0, 0.25, 3.0])
    assert torch.equal(call(kernel, whole.half())[1], call(kernel, whole)[1])
    one = torch.tensor([0.5]).expand(4)
    assert torch.equal(call(kernel, one)[0], call(kernel, one.contiguous())[0])


def test_both_layouts_and_a_given_output() -> None:
    """A sink is of heads, whatever the order of dimensions."""
    kernel, sink = SinkCase("pingpong", inputs="bf16").kernel(), sinks("random")
    q, k, v = draw(kernel.plan, SHAPE, seed=3)
    out, lse = kernel(q, k, v, return_lse=True, sink=sink)
    turned = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    into = torch.empty(2, 4, 23, 8, dtype=torch.bfloat16)
    other, other_lse = kernel(*turned, return_lse=True, out=into, layout="bhsd", sink=sink)
    assert other is into and torch.equal(into.transpose(1, 2), out) and torch.equal(other_lse, lse)


def test_operands_take_a_sink() -> None:
    """A call on what was quantised before is the call that quantises."""
    kernel, sink = SinkCase("pingpong", inputs="e4m3").kernel(), sinks("random")
    q, k, v = draw(kernel.plan, SHAPE, seed=3)
    assert torch.equal(kernel(kernel.quantize(q, k, v), sink=sink), kernel(q, k, v, sink=sink))


def test_a_score_of_nan_or_infinity_still_spoils_its_row() -> None:
    """And no other; a sink of NaN spoils all rows of its head."""
    kernel = SinkCase("fa2", mask="full").kernel()
    q, k, v = random_inputs(SHAPE, 8, 8, torch.float32, seed=3)
    q[0, 5, 1] = math.nan
    out, lse = kernel(q, k, v, return_lse=True, sink=torch.tensor([1.0, 2.0, math.nan, 3.0]))
    spoilt = torch.zeros(2, 4, 23, dtype=torch.bool)
    spoilt[0, 1, 5], spoilt[:, 2] = True, True
    assert torch.equal(lse.isnan(), spoilt) and torch.equal(out.isnan().all(-1).transpose(1, 2), spoilt)
    assert torch.equal(out.isnan().any(-1), out.isnan().all(-1))


def test_of_no_keys_there_is_the_sink_alone() -> None:
    """seqlen_k of 0, and sizes of 0 otherwise."""
    kernel, sink = SinkCase("warp_specialized", mask="full").kernel(), sinks("random")
    for rows, keys, batch in ((5, 0, 2), (0, 5, 2), (5, 3, 0)):
        q, k, v = random_inputs(Shape(batch, 4, 2, rows, keys), 8, 8, torch.float32)
        out, lse = kernel(q, k, v, return_lse=True, sink=sink)
        assert not out.any() or keys
        assert torch.equal(lse, sink[None, :, None].expand(batch, 4, rows)) or keys


# ---- mutants --------------------------------------------------------------------------------------------------------
def _forgotten(step: JoinSink, role: RoleRun) -> None:
    role.read(step.sink)


def _scaled_twice(step: ReadSink, role: RoleRun) -> None:
    STEPS_SIMULATED[ReadSink](step, role)
    role.write(step.dst, torch.mul, role.read(step.dst), role.call.scale["softmax_scale_log2"])


def _added_to_the_sum(step: JoinSink, role: RoleRun) -> None:
    """exp(sink) beside sums that are relative to a maximum."""
    by, lse, sink = role.read(step.by), role.read(step.lse), role.read(step.sink)
    role.write(step.by, lambda: (by.reciprocal() + sink.exp()).reciprocal())
    role.write(step.lse, torch.logaddexp, lse, sink)


def _has_a_value(step: JoinSink, role: RoleRun) -> None:
    """O is not told."""
    by = role.read(step.by)
    STEPS_SIMULATED[JoinSink](step, role)
    role.write(step.by, lambda: by)


def _lse_without(step: JoinSink, role: RoleRun) -> None:
    lse = role.read(step.lse)
    STEPS_SIMULATED[JoinSink](step, role)
    role.write(step.lse, lambda: lse)


def _of_the_first_head(step: ReadSink, role: RoleRun) -> None:
    STEPS_SIMULATED[ReadSink](step, role)
    first = role.device.tensors["sink"][0].float()
    role.write(step.dst, lambda: first.expand_as(role.read(step.dst)).clone())


def _without_keys_forgotten(step: JoinSink, role: RoleRun) -> None:
    """A row that saw no key stays at -inf."""
    lse = role.read(step.lse)
    STEPS_SIMULATED[JoinSink](step, role)
    role.write(step.lse, torch.where, lse.isneginf(), lse, role.read(step.lse))


def _from_the_maximum(step: JoinSink, role: RoleRun) -> None:
    """exp(sink) is taken as it is, and overflows."""
    by, lse, sink = role.read(step.by), role.read(step.lse), role.read(step.sink)
    total = lse.exp() + sink.exp()
    role.write(step.by, lambda: by * lse.exp() / total)
    role.write(step.lse, lambda: total.log())


MUTANTS: dict[str, tuple[dict[type[Step], StepFunction], str]] = {
    "forgotten": ({JoinSink: _forgotten}, "random"),
    "scaled twice": ({ReadSink: _scaled_twice}, "random"),
    "added to the sum": ({JoinSink: _added_to_the_sum}, "random"),
    "has a value": ({JoinSink: _has_a_value}, "random"),
    "lse without": ({JoinSink: _lse_without}, "random"),
    "of the first head": ({ReadSink: _of_the_first_head}, "random"),
    "rows without keys forgotten": ({JoinSink: _without_keys_forgotten}, "random"),
    "overflows": ({JoinSink: _from_the_maximum}, "ends"),
}


@pytest.mark.parametrize("kind", ["fa2", "pingpong"])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_what_is_nearly_right_is_refused(mutant: str, kind: str) -> None:
    """Each mutant fails the rule that the kernel passes."""
    steps, name = MUTANTS[mutant]
    kernel, sink = SinkCase(kind).kernel(), sinks(name)
    inputs = draw(kernel.plan, SHAPE, seed=3)

    def is_right(**changed: Any) -> bool:
        out, lse = simulate(kernel.plan, *inputs, return_lse=True, declared={"sink": sink}, **changed)
        return judge(kernel.spec, kernel.plan, out, lse, *inputs, declared={"sink": sink}).ok

    assert is_right() and not is_right(steps=steps)


def test_a_sink_joins_once_a_tile() -> None:
    """Whatever the blocks of keys."""
    kernel, joined = SinkCase("fa2", mask="full").kernel(), 0

    def observe(event: Event) -> None:
        nonlocal joined
        joined += isinstance(event.step, JoinSink)

    inputs = random_inputs(Shape(1, 1, 1, 8, 21), 8, 8, torch.float32)
    simulate(kernel.plan, *inputs, declared={"sink": torch.zeros(1)}, observer=observe)
    assert joined == 1

"""The gradient of a learned sink, and gradients beside one: within the rule, against autograd and differences."""

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import attngen
from attngen.check.gradients import GradientAccuracy, declared_gradients
from attngen.check.inputs import Shape, random_like
from attngen.check.judging import draw, judge_gradients
from attngen.check.reference import attention
from attngen.emit import emit_module
from attngen.errors import ArgumentError, SpecError
from attngen.plan import SumSink, evaluate_formula
from attngen.runtime import DiskCache, disassemble
from attngen.simulate import simulated_sheets
from attngen.simulate.simulated_sheets import SHEETS_SIMULATED, Values
from attngen.simulate.visits import Declared, Sizes
from tests.emit.sass import done_before_waiting
from tests.quantize.on_cpu import CpuKernels

SOME_SEE_NONE = "kv_idx < q_pos - 2"
SHAPE = Shape(batch=2, heads=4, heads_kv=2, seqlen_q=70, seqlen_k=61)
RANDOM, ENDS = (0.7, -1.3, 2.5, 4.0), (-math.inf, math.inf, 1e4, -1e4)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class SinkCase:
    """A spec with a sink whose gradient is wanted, and the sink of a call."""

    kind: str = "fa2"
    target: str = "simulator"
    inputs: str = "bf16"
    score: str = "score"
    mask: str = SOME_SEE_NONE
    sink: tuple[float, ...] = RANDOM
    sink_dtype: str = "f32"
    shape: Shape = SHAPE
    has_dlse: bool = True
    lengths: str = "dense"

    def __str__(self) -> str:
        return f"{self.kind} {self.target} {self.inputs} {self.mask} | {self.score} {self.sink_dtype} {self.sink}"

    def kernel(self, gradients: tuple[str, ...] = ("q", "k", "v", "sink")) -> attngen.Kernel:
        return attngen.compile(
            {
                "target": self.target,
                "problem": {"head_dim": 32, "queries": self.lengths, "keys": self.lengths},
                "precision": {"inputs": self.inputs},
                "mask": self.mask,
                "score": self.score,
                "sink": "per_head",
                "schedule": {"kind": self.kind},
                "gradients": list(gradients),
            }
        )

    @property
    def logits(self) -> torch.Tensor:
        return torch.tensor(self.sink).to(DTYPES[self.sink_dtype])

    def run(self, kernel: attngen.Kernel) -> tuple[tuple[torch.Tensor, ...], GradientAccuracy]:
        """The gradients, and the rule on them."""
        inputs, sink = draw(kernel.plan, self.shape, seed=5), self.logits
        out, lse = kernel(*inputs, return_lse=True, sink=sink)
        dout, dlse = random_like(out, 6), random_like(lse, 7) if self.has_dlse else None
        made = kernel.backward(dout, *inputs, out, lse, dlse, sink=sink)
        verdict = judge_gradients(kernel.spec, made, inputs, dout, out, lse, dlse, declared={"sink": sink})
        return made, verdict


CASES = (
    *(SinkCase(kind) for kind in ("serial", "fa2", "warp_specialized", "pingpong")),
    *(SinkCase(kind, "sm_90a") for kind in ("fa2", "pingpong")),
    *(SinkCase(sink=ENDS, inputs=inputs) for inputs in ("f32", "bf16")),
    *(SinkCase(sink_dtype=dtype) for dtype in ("bf16", "f16")),
    SinkCase(inputs="f16", score="softcap(score, 5.0)", has_dlse=False),
    SinkCase(inputs="f32", mask="full", has_dlse=False),
    SinkCase("pingpong", "sm_90a", inputs="e4m3"),
    SinkCase(mask="full", shape=replace(SHAPE, seqlen_k=0)),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_within_the_rule(case: SinkCase) -> None:
    """dQ, dK, dV and dsink, which has the sink's shape and type; some of it is not 0."""
    kernel = case.kernel()
    made, verdict = case.run(kernel)
    assert verdict.ok, verdict
    *_, dsink = made
    assert verdict.by_name.keys() == {"dq", "dk", "dv", "dsink"}
    assert (dsink.shape, dsink.dtype) == ((4,), DTYPES[case.sink_dtype]) and dsink.any()
    bounds = torch.tensor(case.sink)
    assert not dsink[bounds.isinf()].any()


def test_rows_that_see_no_key_have_no_gradients_but_the_sinks() -> None:
    """Their lse is finite, and the gradient of it is the sink's alone."""
    case = SinkCase()
    kernel = case.kernel()
    q, k, v = draw(kernel.plan, SHAPE, seed=5)
    out, lse = kernel(q, k, v, return_lse=True, sink=case.logits)
    _, of_keys = attention(q, k, v, kernel.spec.mask_expr)
    sees_none = of_keys.isneginf()
    assert 0 < sees_none.sum() < sees_none.numel() and lse.isfinite().all()
    dlse = random_like(lse, 7).masked_fill(~sees_none, 0.0)
    only = random_like(out, 6).masked_fill(~sees_none.transpose(1, 2)[..., None], 0.0)
    dq, dk, dv, dsink = kernel.backward(only, q, k, v, out, lse, dlse, sink=case.logits)
    assert not (dq.any() or dk.any() or dv.any())
    torch.testing.assert_close(dsink, dlse.sum((0, 2)), rtol=1e-6, atol=1e-6)


def by_autograd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and lse by operations of torch that know nothing of attngen, causal, in fp64."""
    group = q.shape[2] // k.shape[2]
    keys, values = (x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    scores = q.transpose(1, 2) @ keys.mT / math.sqrt(q.shape[-1])
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + k.shape[1] - q.shape[1])
    column = sink.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    every = torch.cat((scores.masked_fill(hidden, -math.inf), column), -1)
    return (every.softmax(-1)[..., :-1] @ values).transpose(1, 2), every.logsumexp(-1)


@pytest.mark.parametrize("inputs", ["f32", "bf16"])
def test_autograd_gives_what_it_gives_of_torchs_own_operations(inputs: str) -> None:
    """Of a loss of out and lse, for q, k, v and the sink; fp64 by torch, near within the format."""
    case = SinkCase(inputs=inputs, mask="causal", sink_dtype=inputs)
    kernel = case.kernel()
    drawn, sink = draw(kernel.plan, SHAPE, seed=5), case.logits
    leaves = [x.clone().requires_grad_() for x in (*drawn, sink)]
    out, lse = kernel(*leaves[:3], return_lse=True, sink=leaves[3])
    dout, dlse = random_like(out, 6), random_like(lse, 7)
    torch.autograd.backward((out, lse), (dout, dlse))
    exact = [x.double().requires_grad_() for x in (*drawn, sink)]
    torch.autograd.backward(by_autograd(*exact), (dout.double(), dlse.double()))
    tolerance = 2e-5 if inputs == "f32" else 2e-2
    for got, expected in zip(leaves, exact, strict=True):
        assert got.grad is not None and expected.grad is not None and got.grad.dtype == got.dtype
        apart = (got.grad.double() - expected.grad).abs().max() / expected.grad.abs().max()
        assert apart < tolerance, apart


def test_the_reference_agrees_with_finite_differences() -> None:
    """The oracle's own gradient of a sink, in fp64, of a loss of out and lse."""
    q, k, v = (x.double() for x in draw(SinkCase(inputs="f32").kernel().plan, SHAPE, seed=5))
    mask = SinkCase().kernel().spec.mask_expr
    sink = torch.tensor(RANDOM, dtype=torch.float64)
    out, lse = attention(q, k, v, mask, declared={"sink": sink})
    dout, dlse = random_like(out, 6), random_like(lse, 7)

    def loss(sink: torch.Tensor) -> float:
        out, lse = attention(q, k, v, mask, declared={"sink": sink})
        return float((out * dout).sum() + (lse * dlse).sum())

    about: dict[str, Any] = {"dlse": dlse, "declared": {"sink": sink}}
    found = declared_gradients(["sink"], q, k, v, dout, mask, **about)["sink"]
    for head in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[head] = 1e-6
        difference = (loss(sink + step) - loss(sink - step)) / 2e-6
        assert found[head].item() == pytest.approx(difference, rel=1e-6)


def test_gradients_come_in_the_order_of_the_spec() -> None:
    """A sink among what is declared: before it or behind."""
    for names in (("slopes", "sink"), ("sink", "slopes")):
        kernel = attngen.compile(
            {
                "target": "simulator",
                "problem": {"head_dim": 8},
                "tensors": {"slopes": "f32[num_heads_q]"},
                "score": "score + alibi(slopes)",
                "sink": "per_head",
                "gradients": ["q", "k", "v", *names],
            }
        )
        inputs = draw(kernel.plan, SHAPE, seed=5)
        declared = {"sink": torch.tensor(RANDOM).bfloat16(), "slopes": torch.tensor([0.1, 0.2, 0.3, 0.4])}
        out, lse = kernel(*inputs, return_lse=True, **declared)
        dout = random_like(out, 6)
        made = kernel.backward(dout, *inputs, out, lse, **declared)
        verdict = judge_gradients(kernel.spec, made, inputs, dout, out, lse, declared=declared)
        assert verdict.ok, verdict
        assert [x.dtype for x in made[3:]] == [declared[name].dtype for name in names]


def test_a_spec_may_leave_the_gradient_of_its_sink_out() -> None:
    """Then there is none to return, and a sink that requires grad is refused with the cure."""
    kernel = SinkCase().kernel(gradients=("q", "k", "v"))
    q, k, v = draw(kernel.plan, SHAPE, seed=5)
    sink = torch.tensor(RANDOM)
    out, lse = kernel(q, k, v, return_lse=True, sink=sink)
    whole = SinkCase().kernel().backward(out, q, k, v, out, lse, sink=sink)
    made = kernel.backward(out, q, k, v, out, lse, sink=sink)
    assert len(made) == 3 and all(torch.equal(x, y) for x, y in zip(made, whole, strict=False))
    for inputs in ((q, k, v), (q.requires_grad_(), k, v)):
        with pytest.raises(ArgumentError, match=r"(?s)argument sink: .*gradients: \[q, k, v, sink\]"):
            kernel(*inputs, sink=sink.clone().requires_grad_())


def test_attention_differentiates_a_sink() -> None:
    """`attngen.attention` asks for the gradient where the sink requires one, also where it alone does."""
    q, k, v = draw(SinkCase().kernel().plan, SHAPE, seed=5)
    sink = torch.tensor(RANDOM, requires_grad=True)
    attngen.attention(q, k, v, "causal", sink=sink).float().square().sum().backward()
    assert sink.grad is not None and sink.grad.any() and (sink.grad < 0).all()  # more sink, less out
    plain = attngen.attention(q, k, v, "causal")
    assert torch.equal(attngen.attention(q, k, v, "causal", sink=None), plain)


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        ({"gradients": ["q", "k", "v", "sink"]}, "gradient-of-sink"),
        ({"sink": "none", "gradients": ["q", "k", "v", "sink"]}, "gradient-of-sink"),
        ({"sink": "per_head", "gradients": ["q", "sink"]}, "all-gradients"),
        ({"sink": "per_head", "gradients": ["q", "k", "v", "sink", "sink"]}, "unique-gradients"),
    ],
    ids=str,
)
def test_a_gradient_of_no_sink_is_refused(spec: dict[str, Any], rule: str) -> None:
    """With what to write instead."""
    with pytest.raises(SpecError) as caught:
        attngen.load({"problem": {"head_dim": 64}, **spec})
    (fault,) = caught.value.diagnostics
    assert fault.rule == rule and fault.nearest


# ---- the sheet ------------------------------------------------------------------------------------------------------
def sheet() -> SumSink:
    return next(each for each in SinkCase(target="sm_90a").kernel().call.kernels if isinstance(each, SumSink))


@pytest.mark.parametrize("dtype", DTYPES)
def test_text_and_torch_function_agree(dtype: str) -> None:
    """The text by g++, of a strided sink; what is infinite or of weight 0 gives nothing. Its gradient is f32 here."""
    of, (batch, heads, rows) = sheet(), (3, 4, 300)
    sizes = {"batch": batch, "seqlen_q": rows, "num_heads_q": heads}
    generator = torch.Generator().manual_seed(3)
    delta, lse_log2 = torch.zeros(batch, heads, 384), torch.full((batch, heads, 384), math.inf)
    delta[..., :rows] = torch.randn(batch, heads, rows, generator=generator)
    lse_log2[..., :rows] = 3 * torch.randn(batch, heads, rows, generator=generator)
    delta[:, :, 7], lse_log2[:, :, 7] = 0.0, math.inf
    spread = torch.tensor(RANDOM).repeat_interleave(2).to(DTYPES[dtype])
    spread[2], delta[:, 1] = -math.inf, math.inf
    sink, made = spread[::2], torch.full((4,), math.nan)
    carried = {
        **sizes, "delta.ptr": delta.data_ptr(), "lse_log2.ptr": lse_log2.data_ptr(),
        f"sink_{dtype}.ptr": sink.data_ptr(), f"sink_{dtype}.stride_0": 2, "gradient.sink_f32.ptr": made.data_ptr(),
    }  # fmt: skip
    c_types = {"pointer": ctypes.c_void_p, "i64": ctypes.c_int64, "i32": ctypes.c_int32}

    class Params(ctypes.Structure):
        _fields_ = [(param.name, c_types[param.ctype]) for param in of.params]

    params = Params(*(carried.get(param.value, 0) for param in of.params))
    text = emit_module((of,))
    for pack in (
        "(u16)Bf16::pack(sum, 0.f)",
        "(u16)F16::pack(sum, 0.f)",
    ):  # g++ knows no conversion to 16 bits
        assert text.count(pack) == 1
        text = text.replace(pack, "0")
    CpuKernels(text).function(of.name, 0, False).run(
        ctypes.byref(params), evaluate_formula(of.grid, sizes), of.threads
    )
    values = {
        "delta": delta, "lse_log2": lse_log2, f"sink_{dtype}": sink, "gradient.sink_f32": made
    }  # fmt: skip
    call = Sizes.of({**sizes, "seqlen_k": 1, "num_heads_kv": heads, "num_sms": 2, "group": 1}, Declared())
    expected = SHEETS_SIMULATED[SumSink](of, values, call)["gradient.sink_f32"]
    assert expected[1] == 0 and expected[[0, 2, 3]].abs().min() > 1
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("nvdisasm")
@pytest.mark.parametrize("lengths", ["dense", "ragged"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_the_text_compiles_without_spills(target: str, lengths: str) -> None:
    """And reads nothing before it has waited for the kernel that makes the rows."""
    kernel = SinkCase(target=target, lengths=lengths).kernel()
    of = next(each for each in kernel.call.kernels if isinstance(each, SumSink))
    compiled = DiskCache().get(emit_module((of,)), target)
    (used,) = compiled.resources
    assert compiled.warnings == () and (used.spill_stores, used.spill_loads, used.stack_bytes) == (0, 0, 0)
    assert target == "sm_80" or not done_before_waiting(disassemble(compiled.cubin))


# ---- mutants --------------------------------------------------------------------------------------------------------
def _mutant(change: Callable[[Values, torch.Tensor], torch.Tensor]) -> Callable[..., dict[str, torch.Tensor]]:
    def sum_sink(sheet: SumSink, values: Values, sizes: Sizes) -> dict[str, torch.Tensor]:
        (name,) = (name for name in sheet.writes if name in values)
        right = simulated_sheets.sum_sink(sheet, values, sizes)[name]
        return {name: change(values, right)}

    return sum_sink


MUTANTS: dict[str, Callable[[Values, torch.Tensor], torch.Tensor]] = {
    "zeros": lambda values, right: torch.zeros_like(right),
    "of the other sign": lambda values, right: -right,
    "of the first sequence": lambda values, right: right / 2,
    "without the weight": lambda values, right: -values["delta"].sum((0, 2)),
    "of the head beside": lambda values, right: right.roll(1),
    "without dlse": lambda values, right: (
        -(
            ((values["sink_f32"] * math.log2(math.e))[:, None] - values["lse_log2"]).exp2()
            * torch.nn.functional.pad((values["out"].float() * values["dout"].float()).sum(-1).mT, (0, 58))
        ).sum((0, 2))
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_what_is_nearly_right_is_refused(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mutant of the sum fails the rule, and no other gradient does."""
    monkeypatch.setitem(SHEETS_SIMULATED, SumSink, _mutant(MUTANTS[mutant]))
    _, verdict = SinkCase().run(SinkCase().kernel())
    assert verdict.failures and all(failure.startswith("dsink") for failure in verdict.failures)

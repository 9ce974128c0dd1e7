"""A backward pass launches, allocates and writes what is wanted of it: by autograd, of what requires grad."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

import attngen
from attngen.bind import Bound
from attngen.check.judging import draw
from attngen.plan import Call
from attngen.simulate import simulator
from attngen.simulate.traffic import Traffic
from tests.gradients.backward_cases import BackwardCase
from tests.gradients.declared_cases import everything
from tests.gradients.test_sink_gradients import SHAPE, SinkCase
from tests.lengths.batches import batch, compiled
from tests.runtime.test_declared import Recorder

SUBSETS = ("q", "k", "v", "qk", "qv", "kv", "qkv")
TOGETHER = {"query_gradients": "q", "key_gradients": "kv"}
APART = {"query_gradients": "q", "dv_gradients": "v", "dk_gradients": "k"}
"""Kernels of narrow heads and of wide ones, and the gradients that they make."""
PLANS: dict[str, tuple[str, int, Mapping[str, str]]] = {
    "simulator": ("simulator", 64, TOGETHER),
    "warps": ("sm_80", 64, TOGETHER),
    "warps, wide": ("sm_80", 192, APART),
    "warpgroups": ("sm_90a", 32, TOGETHER),
    "warpgroups, wide": ("sm_90a", 192, APART),
}


@dataclass
class Watched:
    """What simulated calls do.

    Attributes:
        launched: the kernels of the last call, by what their names end with.
        allocated: bytes of each value that it made.
        written: bytes that its programs wrote to each place.
    """

    launched: list[str] = field(default_factory=list)
    allocated: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    found, run_call = Watched(), simulator.run_call

    def watch(
        call: Call, bound: Bound, *rest: Any, memory: Traffic, **options: Any
    ) -> dict[str, torch.Tensor]:
        digest = call.manifest.spec_digest[:8]
        found.launched = [kernel.name.partition(f"_{digest}_")[2] for kernel, _ in bound.kernels()]
        found.allocated = {name: each.size_bytes for name, each in bound.made.items()}
        made = run_call(call, bound, *rest, memory=memory, **options)
        found.written = dict(memory.written)
        return made

    monkeypatch.setattr(simulator, "run_call", watch)
    yield found


def leaves(case: BackwardCase, wanted: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Q, K and V, some of which require grad, and dO."""
    (*inputs, dout), _ = case.inputs_on("cpu")
    return [x.requires_grad_(name in wanted) for name, x in zip("qkv", inputs, strict=True)], dout


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("wanted", SUBSETS)
def test_what_requires_grad_is_made_and_nothing_else(plan: str, wanted: str, watched: Watched) -> None:
    """Kernels, memory and bytes written are those of the wanted gradients, whose bits are those beside the others.

    A kernel of two gradients makes both, and has memory for the wanted one alone.
    """
    target, head_dim, kernels = PLANS[plan]
    case = BackwardCase("causal", lengths=(70, 90), heads=(4, 2), head_dim=(head_dim, head_dim))
    kernel = case.kernel(target)
    inputs, dout = leaves(case, "qkv")
    every = torch.autograd.grad(kernel(*inputs), inputs, dout)
    inputs, dout = leaves(case, wanted)
    kernel(*inputs).backward(dout)
    assert watched.launched == ["rows", *(name for name, makes in kernels.items() if {*makes} & {*wanted})]
    sizes = {f"d{name}": 2 * x.numel() for name, x in zip("qkv", inputs, strict=True) if name in wanted}
    rows = 4 * 2 * 4 * 128  # f32, padded to 128
    assert watched.allocated == {**sizes, "lse_log2": rows, "delta": rows}
    assert watched.written == sizes
    for name, x, expected in zip("qkv", inputs, every, strict=True):
        assert x.grad is None if name not in wanted else torch.equal(x.grad, expected) and x.grad.any()


@pytest.mark.parametrize("wanted", SUBSETS[:-1])
@pytest.mark.parametrize("schedule", ["fa2", "pingpong"])
def test_sequences_have_what_requires_grad_too(schedule: str, wanted: str) -> None:
    """Of ragged sequences, rows that none uses included, the bits are those beside the others."""
    of = batch("ragged", "ragged", (5, 0, 13), (5, 7, 20), unused=2, tail=3)
    kernel = compiled(schedule, "ragged", "ragged", "causal", True)
    inputs = dict(zip("qkv", (of.q, of.k, of.v), strict=True))

    def gradients(names: str) -> dict[str, torch.Tensor]:
        passed = {name: x.detach().requires_grad_(name in names) for name, x in inputs.items()}
        out = kernel(**passed, **of.lengths)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        found = torch.autograd.grad(out, [passed[name] for name in names], upstream)
        return dict(zip(names, found, strict=True))

    every = gradients("qkv")
    assert all(torch.equal(x, every[name]) and x.any() for name, x in gradients(wanted).items())


DECLARED = everything(64, "bf16", "causal", (20, 30), (4, 2))
OWNERS = {
    "bias": ["pair_sums_of_bias"],
    "slopes": ["query_sums_of_slopes", "slopes_sums"],
    "u": ["key_sums_of_u", "u_sums"],
    "t": ["query_sums_of_t", "t_sums"],
    "table": ["table_sums_of_table", "table_sums"],
    "cap": ["query_sums_of_cap", "cap_sums"],
}


@pytest.mark.parametrize("name", OWNERS)
@pytest.mark.parametrize("beside", [(), ("k",)], ids=["alone", "beside k"])
def test_a_declared_gradient_runs_its_own_kernels(
    name: str, beside: tuple[str, ...], watched: Watched
) -> None:
    """Those that sum it over its pairs, not those of q, k and v nor of other names; its bits are those of all."""
    kernel = DECLARED.kernel("simulator")
    drawn, declared = DECLARED.inputs_on("cpu")
    *inputs, dout = drawn
    out, lse = kernel(*inputs, return_lse=True, **declared)
    made = kernel.backward(dout, *inputs, out, lse, **declared)
    every = dict(zip(kernel.gradients_of(declared), made, strict=True))
    passed = dict(zip("qkv", inputs, strict=True)) | {n: torch.as_tensor(x) for n, x in declared.items()}
    for each in (name, *beside):
        passed[each].requires_grad_()
    kernel(**passed).backward(dout)
    own = [each for each in watched.launched if each not in ("rows", "key_gradients")]
    assert len(own) == len(OWNERS[name]) and all(name in each for each in own)
    assert ("key_gradients" in watched.launched) == bool(beside)
    gradients = {each for each in watched.allocated if each in every}
    assert gradients == {f"gradient.{name}", *(f"d{each}" for each in beside)}
    for each, x in passed.items():
        value = f"d{each}" if each in "qkv" else f"gradient.{each}"
        assert (
            x.grad is None
            if not x.requires_grad
            else torch.equal(x.grad, every[value].to(x)) and x.grad.any()
        )


def test_a_sink_alone_is_summed_over_rows(watched: Watched) -> None:
    """No kernel of pairs runs for it, and its bits are those beside dq, dk and dv."""
    case = SinkCase("pingpong", "sm_90a")
    kernel = case.kernel()
    inputs, sink = draw(kernel.plan, SHAPE, seed=5), case.logits.requires_grad_()
    out = kernel(*inputs, sink=sink)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    (alone,) = torch.autograd.grad(out, sink, upstream)
    assert watched.launched == ["rows", "sink"] and not watched.written
    assert set(watched.allocated) == {"gradient.sink_f32", "delta", "lse_log2"}
    every = [x.requires_grad_() for x in inputs]
    *_, beside = torch.autograd.grad(kernel(*every, sink=sink), [*every, sink], upstream)
    assert torch.equal(alone, beside) and alone.any()


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_a_gpu_is_told_by_an_address_of_0(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one gradient of two, by a recorder for the driver: the other has neither memory nor strides."""
    case = BackwardCase("causal", lengths=(70, 90), heads=(4, 2), head_dim=(32, 32))
    kernel = case.kernel("sm_90a")
    recorder = Recorder(monkeypatch, kernel)
    monkeypatch.setattr(attngen.Kernel, "_machine", lambda kernel, q: recorder.launcher)
    for wanted in ("k", "v"):
        inputs, dout = leaves(case, wanted)
        called = [x.transpose(1, 2) for x in inputs] if layout == "bhsd" else inputs
        out = kernel(*called, layout=layout)
        recorder.sent.clear()
        (grad,) = torch.autograd.grad(out, inputs["qkv".index(wanted)], torch.zeros_like(out))
        (rows, *_), (keys, _, sent) = recorder.sent
        assert rows.endswith("_rows") and keys.endswith("_key_gradients")
        assert sent[f"d{wanted}.ptr"] == grad.data_ptr() != 0 and sent[f"d{wanted}.stride_head"] > 0
        other = "k" if wanted == "v" else "v"
        for name in (f"d{other}", "dk_f32", "dv_f32"):
            assert sent[f"{name}.ptr"] == sent[f"{name}.stride_head"] == 0


MIXED = {
    "target": "simulator",
    "problem": {"head_dim": 32},
    "score": "softcap(score * t[h], cap)",
    "tensors": {"t": "f32[num_heads_q]"},
    "scalars": {"cap": "f32"},
    "gradients": ["q", "k", "v", "t", "cap"],
}
NAMES = ("q", "k", "v", "t", "cap")


def arguments(trained: str) -> dict[str, torch.Tensor]:
    """Arguments of a call, one of which requires grad."""
    torch.manual_seed(0)
    passed = {name: torch.randn(1, 9, 2, 32).bfloat16() for name in "qkv"}
    passed |= {"t": torch.rand(2), "cap": torch.tensor(2.0)}
    passed[trained].requires_grad_()
    return passed


@pytest.mark.parametrize("trained", NAMES)
def test_whichever_is_trained_second_derivatives_are_refused(trained: str) -> None:
    kernel, passed = attngen.compile(MIXED), arguments(trained)
    out = kernel(**passed)
    with pytest.raises(attngen.ArgumentError, match=r"argument create_graph: .*no second derivatives"):
        torch.autograd.grad(out.float().square().sum(), passed[trained], create_graph=True)


@pytest.mark.parametrize("trained", NAMES)
@pytest.mark.parametrize("moved", NAMES)
def test_a_tangent_of_one_beside_a_gradient_of_another_is_refused(moved: str, trained: str) -> None:
    """By name, of what is declared as of inputs; so is one where no gradients are wanted at all."""
    kernel, passed = attngen.compile(MIXED), arguments(trained)
    with forward_ad.dual_level():
        passed[moved] = forward_ad.make_dual(passed[moved], torch.ones_like(passed[moved]))
        for wanted in (torch.enable_grad, torch.no_grad):
            with (
                wanted(),
                pytest.raises(attngen.ArgumentError, match=f"argument {moved}: got a tensor with a tangent"),
            ):
                kernel(**passed)


@pytest.mark.parametrize("trained", NAMES)
def test_what_nobody_records_has_no_gradient(trained: str) -> None:
    """Under no_grad and inference_mode a call gives the bits of a recorded one, and no backward pass."""
    kernel, passed = attngen.compile(MIXED), arguments(trained)
    recorded = kernel(**passed)
    assert recorded.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = kernel(**passed)
        assert not out.requires_grad and torch.equal(out, recorded)


@pytest.mark.parametrize("frozen", NAMES)
def test_what_autograd_cannot_keep_is_named(frozen: str) -> None:
    """A tensor of inference mode beside one that is trained; where nothing is trained it is taken."""
    trained = "k" if frozen == "q" else "q"
    kernel, passed = attngen.compile(MIXED), arguments(trained)
    with torch.inference_mode():
        passed[frozen] = passed[frozen].clone()
    with pytest.raises(
        attngen.ArgumentError, match=f"argument {frozen}: got an inference tensor.*\n.*{frozen}.clone"
    ):
        kernel(**passed)
    with torch.no_grad():
        kernel(**passed)
    passed[frozen] = passed[frozen].clone()
    assert kernel(**passed).requires_grad

"""The operators by themselves: torch's own checks of them, and what export, checkpoints and tracers make of them."""

import io
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import attngen
from attngen import op
from attngen.capture import pack
from attngen.errors import ToolchainError
from tests.runtime.test_declared import Recorder
from tests.torch_compile.captured import HEAD_DIM, HEADS, inputs

OPERATORS = torch.ops.attngen
SPEC = {
    "target": "simulator",
    "problem": {"head_dim": HEAD_DIM},
    "mask": "causal and document(doc)",
    "score": "softcap(score, cap) + alibi(slopes) * gain",
    "scalars": {"cap": "f32", "gain": "i32 = 1"},
    "tensors": {"doc": "i32[batch, seqlen_k]", "slopes": "f32[num_heads_q]"},
    "gradients": ["q", "k", "v", "slopes", "cap"],
}
KERNEL = attngen.compile(SPEC)
CAUSAL = attngen.compile(
    {**{key: SPEC[key] for key in ("target", "problem")}, "mask": "causal", "gradients": ["q", "k", "v"]}
)


def declared(length: int, requires_grad: bool = False) -> dict[str, Any]:
    """What a call of KERNEL passes by name."""
    return {
        "doc": torch.arange(length, dtype=torch.int32).expand(2, -1) // 4,
        "slopes": torch.full((HEADS,), 0.1, requires_grad=requires_grad),
        "cap": torch.tensor(3.0, requires_grad=requires_grad),
        "gain": 2,
    }


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize(
    ("name", "requires_grad"),
    [
        ("attention", False),
        ("attention_with_lse", False),
        ("attention_with_lse", True),
        ("attention_backward", False),
    ],
)
def test_torch_finds_no_fault(name: str, requires_grad: bool, layout: str) -> None:
    """Of schema, registrations, fake forms and what AOTAutograd makes of it: torch.library.opcheck."""
    q, k, v = inputs(9, batch=2)
    named = declared(9, requires_grad)
    if layout == "bhsd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    call = [x.detach().requires_grad_(requires_grad) for x in (q, k, v)]
    packed = pack(0.3, layout, None, named)
    before: tuple[Any, ...] = ()
    if name == "attention_backward":
        out, lse = KERNEL(q, k, v, 0.3, True, layout=layout, **named)
        before = (torch.ones_like(out), None, out, lse, [True, False, True, True, True])
    torch.library.opcheck(getattr(OPERATORS, name).default, (*before, *call, KERNEL.text, *packed))


class Model(torch.nn.Module):
    """One layer whose queries have a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = KERNEL
        self.weight = torch.nn.Parameter(torch.ones(HEAD_DIM, dtype=torch.bfloat16))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, doc: torch.Tensor) -> Any:
        named = declared(q.shape[1]) | {"doc": doc}
        return self.kernel(q * self.weight, k, v, **named)


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No kernel of this process has a text, as in another one that loads a graph."""
    monkeypatch.setattr(op, "LIVE", {})
    op._compiled.cache_clear()
    yield
    op._compiled.cache_clear()


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_is_saved_loaded_and_trained(strict: bool, forgotten: None) -> None:
    """With a length that varies; the text in it makes its kernel anew, and gradients are those of the module."""
    model, length = Model(), torch.export.Dim("length", min=2, max=4096)
    axes = ({1: length},) * 4
    example = (*inputs(9, batch=2), declared(9)["doc"])
    exported = torch.export.export(model, example, dynamic_shapes=axes, strict=strict)
    file = io.BytesIO()
    torch.export.save(exported, file)
    loaded = torch.export.load(io.BytesIO(file.getvalue())).module()
    given = (*inputs(13, batch=2), declared(13)["doc"])
    out, right = loaded(*given), model(*given)
    assert torch.equal(out, right) and op._compiled.cache_info().currsize == 1
    (found,) = torch.autograd.grad(out.float().square().sum(), list(loaded.parameters()))
    (expected,) = torch.autograd.grad(right.float().square().sum(), [model.weight])
    assert torch.equal(found, expected) and found.any()


def test_a_program_without_gradients_refuses_to_be_trained() -> None:
    """Where torch would give zeros."""
    with torch.no_grad():
        made = make_fx(lambda *given: CAUSAL(*given))(*inputs(9))
    out = made(*inputs(9, requires_grad=True))
    with pytest.raises(attngen.ArgumentError, match="nothing required grad where torch captured this call"):
        out.sum().backward()


def test_the_text_of_an_edited_source_is_of_its_process_alone(forgotten: None) -> None:
    """Two kernels of one spec, of which one is edited, have different texts, and no other process makes that one."""
    edited = attngen.Kernel(CAUSAL.spec, CAUSAL.call, source="// edited")
    assert edited.text != CAUSAL.text
    with pytest.raises(ToolchainError, match="edited source"):
        op.find(edited.text)
    assert op.find(CAUSAL.text).plan.name == CAUSAL.plan.name


def saves_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """As TorchTitan's list of operators to save, or axolotl's names that hold a word."""
    is_attention = "attention" in str(operator)
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("saves", [False, True])
def test_selective_checkpoints_save_attention(
    saves: bool, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy on the operator has the forward pass run once, eager and compiled; without one it runs twice."""
    runs = []
    make = type(CAUSAL._simulator).make

    def counted(self: Any, wanted: tuple[str, ...], *args: Any, **kwargs: Any) -> Any:
        runs.append(wanted)
        return make(self, wanted, *args, **kwargs)

    monkeypatch.setattr(type(CAUSAL._simulator), "make", counted)
    options = {"context_fn": partial(create_selective_checkpoint_contexts, saves_attention)} if saves else {}

    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return CAUSAL(q.sin(), k, v).sin()

    def step(*given: torch.Tensor) -> Any:
        return checkpoint(block, *given, use_reentrant=False, **options)

    torch._dynamo.reset()
    run = torch.compile(step, backend="aot_eager", fullgraph=True) if is_compiled else step
    leaves = inputs(9, requires_grad=True)
    found = torch.autograd.grad(run(*leaves).float().square().sum(), leaves)
    forward = [wanted for wanted in runs if "out" in wanted]
    assert len(forward) == (1 if saves else 2)
    right = torch.autograd.grad(block(*leaves).float().square().sum(), leaves)
    assert all(torch.equal(x, y) and x.any() for x, y in zip(found, right, strict=True))


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_tracers_write_both_passes_down(tracing_mode: str) -> None:
    """make_fx of a step finds operators in it, not the numbers of the tensors that it was traced with."""

    def step(*leaves: torch.Tensor) -> Any:
        return torch.autograd.grad(CAUSAL(*leaves).float().square().sum(), leaves)

    traced = make_fx(step, tracing_mode=tracing_mode)(*inputs(9, requires_grad=True))
    targets = [node.target for node in traced.graph.nodes]
    assert OPERATORS.attention_with_lse.default in targets and OPERATORS.attention_backward.default in targets
    others = [2 * x.detach() for x in inputs(9)]
    found, right = traced(*others), step(*(x.requires_grad_() for x in others))
    assert all(torch.equal(x, y) for x, y in zip(found, right, strict=True))


def test_eager_calls_go_past_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward: an operator costs more than a launch, and only who looks on pays for it."""

    def never(*args: Any) -> None:
        raise AssertionError("an operator was called")

    monkeypatch.setattr(op, "_run", never)
    monkeypatch.setattr(op, "needed_gradients", never)
    leaves = inputs(9, requires_grad=True)
    assert CAUSAL(*inputs(9)).any() and attngen.attention(*inputs(9), "causal").any()
    assert all(x.any() for x in torch.autograd.grad(CAUSAL(*leaves).float().square().sum(), leaves))
    with FlopCounterMode(display=False), pytest.raises(AssertionError, match="an operator was called"):
        CAUSAL(*inputs(9))


def test_an_operator_keeps_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of an eager call stay for the next one; those of a graph are torch's, which takes all back."""
    kernel = attngen.compile({**SPEC, "target": "sm_90a"})
    launcher = Recorder(monkeypatch, kernel).launcher
    monkeypatch.setattr(kernel, "_machine", lambda q: launcher)
    (q, k, v), named = inputs(9, batch=2), declared(9)
    forward = pack(None, "bshd", None, named)
    out, lse = OPERATORS.attention_with_lse(q, k, v, kernel.text, *forward)
    needed = [True] * len(kernel.gradients)
    OPERATORS.attention_backward(out, None, out, lse, needed, q, k, v, kernel.text, *forward)
    assert not launcher._kept_memory._kept
    kernel(q, k, v, **named)
    assert len(launcher._kept_memory._kept) == 1


def test_fake_tensors_have_fake_results() -> None:
    """Sizes, types and strides of a call cost no call."""
    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(x.transpose(1, 2)) for x in inputs(9, batch=2))
        out, lse = CAUSAL(q, k, v, return_lse=True, layout="bhsd")
    right = CAUSAL(*(x.transpose(1, 2) for x in inputs(9, batch=2)), return_lse=True, layout="bhsd")
    for found, expected in zip((out, lse), right, strict=True):
        assert (found.shape, found.stride(), found.dtype) == (
            expected.shape,
            expected.stride(),
            expected.dtype,
        )

"""The peers that `attngen bench` measures against, as far as a CPU shows them."""

from collections.abc import Callable

import pytest
import torch

from attngen.check import timing
from attngen.check.accuracy import compare
from attngen.check.declared_inputs import declared_inputs
from attngen.check.gradients import compare_gradients
from attngen.check.inputs import Shape, random_inputs, random_like
from attngen.errors import ToolchainError
from attngen.expr import parse_mask, parse_score, read_declarations

MASKS = [
    "full",
    "causal",
    "kv_idx >= q_pos - 20 and causal",
    "kv_idx + h != q_idx",
    "kv_idx <= b + h_kv",
    "seqlen_q >= 3",
]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """flex_attention as plain torch: what it computes, without half a minute of compiling."""

    def as_it_is(function: Callable[..., object], **_: object) -> Callable[..., object]:
        return function

    monkeypatch.setattr(torch, "compile", as_it_is)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("mask", MASKS)
def test_flex_computes_what_the_mask_says(mask: str) -> None:
    """Unequal lengths, grouped heads and other columns in V than in K: flex gives the reference's values."""
    q, k, v = random_inputs(Shape(2, 4, 2, 33, 70), 32, 48, torch.bfloat16)
    expr = parse_mask(mask)
    out = timing.peer("flex", q, k, v, expr)().transpose(1, 2)
    accuracy = compare(out, None, q, k, v, expr)
    assert accuracy.ok, str(accuracy)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.usefixtures("uncompiled")
def test_flex_reads_what_is_declared() -> None:
    """A mask that looks up documents and a scalar, and a score with slopes and a cap, give the reference's values."""
    scalars, tensors = {"cap": "f32 = 2.0"}, {"doc": "i32[batch, seqlen_k]", "slopes": "f32[num_heads_q]"}
    declarations = read_declarations(scalars, tensors, {}).declarations
    mask = parse_mask("document(doc) or kv_idx < 3", declarations)
    score = parse_score("softcap(score, cap) + alibi(slopes)", declarations)
    shape = Shape(2, 4, 2, 33, 70)
    q, k, v = random_inputs(shape, 32, 48, torch.bfloat16)
    declared = declared_inputs(declarations, shape)
    out = timing.peer("flex", q, k, v, mask, score, declared)().transpose(1, 2)
    accuracy = compare(out, None, q, k, v, mask, score=score, declared=declared)
    assert accuracy.ok, str(accuracy)


def test_the_back_ends_of_torch_know_no_scores() -> None:
    """A modified score is refused by name, so that no figure stands beside another problem's."""
    q, k, v = random_inputs(Shape(1, 2, 2, 16, 16), 32, 32, torch.bfloat16)
    with pytest.raises(ToolchainError, match="^flash does not take part: it knows no modified scores"):
        timing.peer("flash", q, k, v, timing.CAUSAL, parse_score("softcap(score, 30.0)"))


def test_a_peer_that_refuses_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's reason comes with the name, be it a back end, a mask it does not know or a compiler that is missing."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Cannot find a working triton installation.\nSee there.")

    q, k, v = random_inputs(Shape(1, 2, 2, 16, 16), 32, 32, torch.bfloat16)
    full, window = parse_mask("full"), parse_mask("kv_idx >= q_pos - 4")
    with pytest.raises(ToolchainError, match="^cudnn does not take part: No "):
        timing.peer("cudnn", q, k, v, full)
    with pytest.raises(ToolchainError, match="^flash does not take part: it knows the masks full and"):
        timing.peer("flash", q, k, v, window)
    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(ToolchainError) as missing:
        timing.peer("flex", q, k, v, full)
    assert missing.value.message == "flex does not take part: Cannot find a working triton installation."


def test_causal_of_unequal_lengths_is_another_mask_for_the_back_ends() -> None:
    """Torch aligns causal to the top left, so that there is nothing to compare with."""
    q, k, v = random_inputs(Shape(1, 2, 2, 16, 24), 32, 32, torch.bfloat16)
    with pytest.raises(ToolchainError, match="of equal lengths"):
        timing.peer("flash", q, k, v, timing.CAUSAL)
    equal = timing.peer("flash", q, k[:, :16], v[:, :16], timing.CAUSAL)().transpose(1, 2)
    assert compare(equal, None, q, k[:, :16], v[:, :16], timing.CAUSAL).ok


def test_those_present_are_a_choice_of_those_named() -> None:
    """`peers` leaves out what refuses."""
    q, k, v = random_inputs(Shape(1, 2, 2, 16, 16), 32, 32, torch.bfloat16)
    assert list(timing.peers(q, k, v, True, ("cudnn", "flash"))) == ["flash"]


@pytest.mark.gpu
@pytest.mark.timeout(180)
@pytest.mark.parametrize("mask", ["full", "causal", "kv_idx >= q_pos - 20 and causal"])
def test_compiled_flex_is_right(mask: str) -> None:
    """What is timed as flex computes attention."""
    q, k, v = random_inputs(Shape(2, 4, 2, 256, 256), 64, 64, torch.bfloat16, "cuda")
    expr = parse_mask(mask)
    out = timing.peer("flex", q, k, v, expr)().transpose(1, 2)
    accuracy = compare(out, None, q, k, v, expr)
    assert accuracy.ok, str(accuracy)


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_a_peer_has_gradients(mask: str) -> None:
    """The backward pass of flash, again and again, gives the gradients of the reference; inputs stay as they were."""
    q, k, v = random_inputs(Shape(2, 4, 4, 64, 64), 32, 32, torch.bfloat16)
    dout, expr = random_like(q, 5), parse_mask(mask)
    run = timing.backward_peer("flash", q, k, v, dout, expr)
    for got in (run(), run()):
        verdict = compare_gradients(got, q, k, v, dout, expr)
        assert verdict.ok, str(verdict)
    assert not q.requires_grad


@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_a_peer_without_gradients_is_told(name: str) -> None:
    """What the peer cannot do is a fault with its name, as of its forward."""
    q, k, v = random_inputs(Shape(1, 2, 2, 8, 8), 32, 32, torch.bfloat16)
    with pytest.raises(ToolchainError, match=f"{name} does not take part"):
        timing.backward_peer(name, q, k, v, q, parse_mask("kv_idx <= q_idx + 1"))

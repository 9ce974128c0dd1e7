"""`attngen.sdpa` on the simulator: what torch documents, gradients too, and nothing left to torch in silence."""

import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn.attention import bias
from torch.nn.functional import scaled_dot_product_attention as attend

import attngen
from attngen import sdpa
from attngen.errors import Diagnostic
from attngen.sdpa import flash_backend, translation
from tests.faces.attention64 import assert_near, draw

DENSE = ((2, 4, 9, 24), (2, 4, 13, 24), (2, 4, 13, 16))


@pytest.fixture(autouse=True)
def _disabled() -> Iterator[None]:
    """Each test ends with torch's own function."""
    yield
    sdpa.disable()


def holds(shapes: tuple[tuple[int, ...], ...], mask: torch.Tensor | None = None, **asked: Any) -> None:
    """Out and gradients, that of the mask too, are torch's own in f64; whatever is left to torch raises."""
    given = [x.requires_grad_() for x in draw(*shapes)]
    exact = [x.detach().double().requires_grad_() for x in given]
    masks: tuple[torch.Tensor | None, torch.Tensor | None] = (mask, mask)
    if mask is not None and mask.is_floating_point():
        drawn = mask.requires_grad_()
        masks = (drawn, drawn.detach().double().requires_grad_())
    out64 = attend(*exact, attn_mask=masks[1], **asked)
    with sdpa.enabled(devices=("cpu",), strict=True):
        out = attend(*given, attn_mask=masks[0], **asked)
    assert_near(out, out64.detach())
    (dout,) = draw(out.shape, seed=1)
    leaves, leaves64 = (
        [*inputs, *([own] if own is not None and own.requires_grad else [])]
        for inputs, own in ((given, masks[0]), (exact, masks[1]))
    )
    found = torch.autograd.grad(out, leaves, dout)
    expected = torch.autograd.grad(out64, leaves64, dout.double())
    for x, y in zip(found, expected, strict=True):
        assert_near(x, y, 1e-4, is_zero=x.shape[-1] == 1)  # what all keys have in common changes nothing


@pytest.mark.parametrize(
    "asked", [{}, {"is_causal": True}, {"scale": 0.4}], ids=["full", "is_causal", "scale"]
)
def test_calls_are_what_torch_documents(asked: dict[str, Any]) -> None:
    """is_causal stands at the top left, for fewer queries than keys and for more."""
    holds(DENSE, **asked)
    holds(((2, 4, 20, 24), *DENSE[1:]), **asked)


SHAPES = (
    (9, 13),
    (1, 13),
    (9, 1),
    (1, 1),
    (4, 9, 13),
    (2, 1, 9, 13),
    (2, 4, 9, 13),
    (2, 1, 1, 13),
    (1, 4, 9, 1),
    (2, 4, 1, 1),
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masks_of_any_broadcast_shape(shape: tuple[int, ...]) -> None:
    """Of numbers with their gradient, and of truth values, rows that see nothing among them."""
    (numbers,) = draw(shape, seed=2)
    holds(DENSE, numbers)
    keys = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.6
    keys[..., :1, :] = shape[-2] == 1
    holds(DENSE, keys)


def test_an_expanded_mask_is_read_once_for_all() -> None:
    """A dimension without a stride is none of the tensor that is declared, but where each element has a gradient."""
    (row,) = draw((2, 1, 1, 13))
    whole = row.expand(2, 4, 9, 13)
    assert whole.stride(1) == 0
    holds(DENSE, whole.clone().as_strided(whole.shape, whole.stride()))
    holds(DENSE, whole > 0)
    question = sdpa.question.Question(*draw(*DENSE), whole)
    form = translation.translated(question).form
    assert form.score == "score + attn_mask[b, kv_idx]"
    assert form.tensors == {"attn_mask": "f32[batch, seqlen_k]"}


OTHERS = {
    "2-D": ((9, 24), (13, 24), (13, 16)),
    "3-D": ((4, 9, 24), (4, 13, 24), (4, 13, 16)),
    "5-D": ((2, 3, 4, 9, 24), (2, 3, 4, 13, 24), (2, 3, 4, 13, 16)),
    "batches that go together": ((2, 1, 4, 9, 24), (3, 4, 13, 24), (1, 1, 4, 13, 16)),
    "one head of keys": ((2, 4, 9, 24), (2, 1, 13, 24), (2, 1, 13, 16)),
    "one head of queries": ((2, 1, 9, 24), (2, 4, 13, 24), (2, 1, 13, 16)),
}


@pytest.mark.parametrize("which", OTHERS)
def test_dimensions_that_torch_takes(which: str) -> None:
    """Two to five, with what is 1 standing for all."""
    holds(OTHERS[which], is_causal=True)
    (mask,) = draw((9, 13), seed=4)
    holds(OTHERS[which], mask)


def test_masks_of_five_dimensions() -> None:
    """One for each pair of leading dimensions, or one for all."""
    for shape in ((2, 3, 1, 9, 13), (1, 1, 4, 9, 1), (3, 1, 9, 13)):
        holds(OTHERS["5-D"], draw(shape)[0])


def test_heads_of_keys_are_shared() -> None:
    """With enable_gqa, under a mask of each query head."""
    shapes = ((2, 4, 9, 24), (2, 2, 13, 24), (2, 2, 13, 16))
    holds(shapes, is_causal=True, enable_gqa=True)
    holds(shapes, draw((4, 9, 13))[0], enable_gqa=True)


@pytest.mark.parametrize("make", [bias.causal_lower_right, bias.causal_upper_left])
def test_causal_biases_are_not_written_out(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both variants are texts, of out and of gradients."""
    given = [x.requires_grad_() for x in draw(*DENSE)]
    exact = [x.detach().double().requires_grad_() for x in given]
    mask = make(9, 13)
    out64 = attend(*exact, mask._materialize())
    expected = torch.autograd.grad(out64.sum(), exact)
    monkeypatch.setattr(bias.CausalBias, "_materialize", lambda *_: pytest.fail("was written out"))
    with sdpa.enabled(devices="cpu", strict=True):
        out = attend(*given, mask)
        assert_near(out, out64.detach())
        for x, y in zip(torch.autograd.grad(out.sum(), given), expected, strict=True):
            assert_near(x, y, 1e-4)
        with pytest.raises(attngen.RefusedError, match="causal bias of \\(9, 12\\)"):
            attend(*given, bias.causal_lower_right(9, 12))


def test_nested_tensors_are_ragged_sequences() -> None:
    """Each sequence is a dense call, causal too, which torch has not on a CPU; gradients reach the nested tensors."""
    lengths = (5, 9, 1)
    tokens = draw((15, 2, 24), (15, 2, 24), (15, 2, 16))
    offsets = torch.tensor([0, 5, 14, 15])
    first = torch.nested.nested_tensor_from_jagged(tokens[0], offsets)
    nested = [
        first.requires_grad_(),
        *(torch.nested.nested_tensor_from_jagged(x, first.offsets()).requires_grad_() for x in tokens[1:]),
    ]
    for is_causal in (False, True):
        with sdpa.enabled(devices="cpu", strict=True):
            out = attend(*(x.transpose(1, 2) for x in nested), is_causal=is_causal)
        found = torch.autograd.grad(out.values().sum(), nested)
        exact = [[x.double().requires_grad_() for x in row.split(lengths)] for row in tokens]
        rows = [
            attend(*(x.transpose(0, 1) for x in each), is_causal=is_causal)
            for each in zip(*exact, strict=True)
        ]
        assert_near(out.transpose(1, 2).values(), torch.cat([x.transpose(0, 1) for x in rows]).detach())
        for x, parts in zip(found, exact, strict=True):
            y = torch.autograd.grad(sum(row.sum() for row in rows), parts, retain_graph=True)
            assert_near(x.values(), torch.cat(y), 1e-4)
    with sdpa.enabled(devices="cpu", strict=True), pytest.raises(attngen.RefusedError, match="dropout_p"):
        attend(*(x.transpose(1, 2) for x in nested), dropout_p=0.1)


def test_outputs_lie_as_those_of_torchs_kernels() -> None:
    """Heads behind rows in memory, so that joining heads copies nothing."""
    with sdpa.enabled(devices="cpu", strict=True):
        out = attend(*draw(*((2, 4, 9, 32),) * 3))
    assert out.transpose(1, 2).is_contiguous()


def test_what_is_left_to_torch_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """A line for each reason, from the logger `attngen.sdpa`; the call has torch's own result and gradients."""
    q, k, v = (x.requires_grad_() for x in draw(*DENSE))
    expected = attend(q, k, v, torch.ones(9, 13, dtype=torch.bool), dropout_p=1e-9)
    with sdpa.enabled(devices="cpu"), caplog.at_level(logging.WARNING, "attngen"):
        for _ in range(3):
            out = attend(q, k, v, torch.ones(9, 13, dtype=torch.bool), dropout_p=1e-9)
            assert torch.equal(out, expected) and out.requires_grad
            attend(q.double(), k.double(), v.double())
        attend(q, k, v)
    told = [record.getMessage() for record in caplog.records if record.name == "attngen.sdpa"]
    assert len(told) == 2 and all("\n" not in line for line in told)
    assert "left to torch: dropout_p: there is no dropout" in told[0]
    assert "argument query: got dtype torch.float64" in told[1]


def test_strict_calls_raise_with_all_reasons() -> None:
    """In place of going on to torch; the error is a ValueError, and lists what it found."""
    q, k, v = draw(*DENSE)
    with (
        sdpa.enabled(devices="cpu", strict=True),
        pytest.raises(ValueError, match="no kernel takes") as caught,
    ):
        attend(q.double(), k.double(), v, torch.zeros(9, 13), dropout_p=0.5, is_causal=True)
    assert isinstance(caught.value, attngen.RefusedError)
    starts = ("dropout_p:", "query, key, value: more than one type", "argument query: got dtype")
    assert len(caught.value.reasons) == len(starts)
    assert all(reason.startswith(start) for reason, start in zip(caught.value.reasons, starts, strict=True))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a mask beside is_causal": (
        {"attn_mask": torch.zeros(9, 13), "is_causal": True},
        "attn_mask: a tensor beside",
    ),
    "a mask of f64": ({"attn_mask": torch.zeros(9, 13, dtype=torch.float64)}, "attn_mask: torch.float64"),
    "a mask of another shape": ({"attn_mask": torch.zeros(9, 12)}, "attn_mask: shape"),
    "a mask of one dimension": ({"attn_mask": torch.zeros(13)}, "attn_mask: 1 dimensions"),
    "a mask of five": ({"attn_mask": torch.zeros(1, 1, 1, 9, 13)}, "attn_mask: shape"),
    "a sparse key": ({"key": torch.zeros(2, 4, 13, 24).to_sparse()}, "argument key: got layout"),
    "other heads": ({"query": torch.zeros(2, 8, 9, 24)}, "query, key, value: \\[8, 4, 4\\] heads"),
    "other batches": ({"query": torch.zeros(3, 4, 9, 24)}, "dimensions before heads"),
    "other columns": ({"key": torch.zeros(2, 4, 13, 32)}, "argument key: got head_dim 32, expected 24"),
    "other rows": ({"value": torch.zeros(2, 4, 12, 16)}, "value: 12 rows beside 13 of key"),
    "wide heads": ({"value": torch.zeros(2, 4, 13, 257)}, "argument value: got head_dim 257"),
    "a vector": ({"value": torch.zeros(16)}, "value: 1 dimensions"),
    "a scale that is no number": ({"scale": float("nan")}, "argument scale: got nan"),
}


@pytest.mark.parametrize("which", REFUSED)
def test_refusals_are_told_by_the_names_of_the_function(which: str) -> None:
    """By `explain` and by strict calls alike."""
    wrong, reason = REFUSED[which]
    arguments = dict(zip(("query", "key", "value"), draw(*DENSE), strict=True)) | wrong
    with sdpa.enabled(devices="cpu", strict=True), pytest.raises(attngen.RefusedError, match=reason):
        attend(**arguments)


def test_a_search_that_finds_no_kernel_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every further call of its kind has the reason at hand."""
    calls = []

    def search(*rows: torch.Tensor, **_: Any) -> None:
        calls.append(rows)
        raise attngen.PlanError((Diagnostic("no plan\nat all", "rule"),))

    monkeypatch.setattr(translation, "_NO_KERNEL", {})
    monkeypatch.setattr(translation, "attention", search)
    q, k, v = draw(*DENSE)
    with sdpa.enabled(devices="cpu"):
        for _ in range(3):
            assert attend(q, k, v).any()
        assert len(calls) == 1
        attend(q, k, v, is_causal=True)
    assert len(calls) == 2


def test_cpu_tensors_are_left_alone_unless_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    """What `enable()` takes by itself is CUDA tensors; CPU tensors have torch's bits, without a word."""
    q, k, v = draw(*DENSE)
    expected = attend(q, k, v)
    sdpa.enable()
    with caplog.at_level(logging.DEBUG, "attngen"):
        assert torch.equal(attend(q, k, v), expected)
    assert caplog.records == []
    assert "it is enabled for cuda" in str(sdpa.explain(q, k, v))


def test_scopes_give_back_what_was_before() -> None:
    """Also from inside one another, and after an error."""
    q, k, v = (x.double() for x in draw(*DENSE))
    sdpa.enable(devices=("cpu", "cuda"), strict=True)
    with sdpa.enabled(devices="cpu"):
        attend(q, k, v)
    for _ in range(2):
        with pytest.raises(attngen.RefusedError), sdpa.enabled(devices="cpu", strict=True):
            attend(q, k, v)
    sdpa.disable()
    attend(q, k, v)
    sdpa.disable()


@pytest.mark.parametrize("wrong", [{"devices": "tpu"}, {"devices": ()}, {"strict": 1}], ids=str)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    """By their names, and nothing is enabled."""
    (name,) = wrong
    with pytest.raises(attngen.ArgumentError, match=f"argument {name}"):
        sdpa.enable(**wrong)
    assert sdpa.override.standing() is None


def test_every_way_to_call_is_taken() -> None:
    """Other threads, inference mode, and modules of torch that end in the function."""
    q, k, v = (x.requires_grad_() for x in draw(*DENSE))
    expected = attend(q, k, v)
    found: list[torch.Tensor] = []
    module = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    (x,) = draw((2, 7, 32))
    of_module = module(x, x, x, need_weights=False)[0]
    with sdpa.enabled(devices="cpu", strict=True):
        thread = threading.Thread(target=lambda: found.append(attend(q, k, v)))
        thread.start()
        thread.join()
        with torch.inference_mode():
            found.append(attend(q, k, v))
        own = module(x, x, x, need_weights=False)[0]
    for out in found:
        assert_near(out, expected.detach().double())
    assert_near(own, of_module.detach().double())


def test_explain_prints_who_takes_a_call(capsys: pytest.CaptureFixture[str]) -> None:
    """The kernel and its texts, or the reasons, beside torch's choice."""
    q, k, v = draw(*DENSE)
    (mask,) = draw((4, 9, 13))
    with sdpa.enabled(devices="cpu"):
        report = sdpa.explain(q, k, v, mask)
    printed = capsys.readouterr().out
    assert printed == f"{report}\n" and report.taken and report.answer is not None
    name = report.answer.kernel
    assert name.startswith("attn_fwd_simulator_f32_d32_")
    assert f"taken by attngen\n  kernel: {name}\n  mask: full\n" in printed
    assert "  score: score + attn_mask[h, q_idx, kv_idx]\n  torch would take: " in printed
    report = sdpa.explain(q, k, v, bias.causal_lower_right(9, 13))
    assert not report.taken and report.answer is not None and report.answer.mask == "causal"
    assert "taken by torch (" in str(report) and "it is not enabled: attngen.sdpa.enable()" in str(report)
    with pytest.raises(attngen.ArgumentError, match="argument key: got list"):
        sdpa.explain(q, [1.0], v)  # type: ignore[arg-type]
    report = sdpa.explain(q, k, v, dropout_p=0.3)
    assert report.answer is None and report.reasons[0].startswith("dropout_p")
    nested = torch.nested.nested_tensor([torch.zeros(5, 2, 32)], layout=torch.jagged).transpose(1, 2)
    report = sdpa.explain(nested, nested, nested, is_causal=True)
    assert report.answer is not None and report.answer.mask == "causal_top_left"


def test_torchs_flash_operators_may_be_attngens() -> None:
    """Registered when asked, under its name; dense, ragged, forward and backward, by torch's own autograd."""
    sdpa.register_flash_attention()
    assert "attngen" in torch.nn.attention.list_flash_attention_impls()
    assert torch.nn.attention.current_flash_attention_impl() is None
    given = [x.requires_grad_() for x in draw((2, 4, 9, 24), (2, 4, 13, 24), (2, 4, 13, 24))]
    exact = [x.detach().double().requires_grad_() for x in given]
    out64 = attend(*exact, bias.causal_lower_right(9, 13)._materialize())
    expected = torch.autograd.grad(out64.sum(), exact)
    sequences = [x.requires_grad_() for x in draw(*((14, 2, 32),) * 3)]
    starts = torch.tensor([0, 5, 14], dtype=torch.int32)
    ours = attngen.varlen_attn(*sequences, starts, starts, 9, 9, window_size=(3, 0))
    of_ours = torch.autograd.grad(ours.sum(), sequences)  # type: ignore[union-attr]
    handle = flash_backend.activate("CPU")
    try:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*given, 0.0, True)
        assert_near(out, out64.detach())
        assert lse.shape == (2, 4, 9)
        for x, y in zip(torch.autograd.grad(out.sum(), given), expected, strict=True):
            assert_near(x, y, 1e-4)
        rest = (starts, starts, 9, 9, 0.0, False, False)
        windows = {"window_size_left": 3, "window_size_right": 0}
        theirs = torch.ops.aten._flash_attention_forward(*sequences, *rest, **windows)[0]
        assert torch.equal(theirs, ours)  # type: ignore[arg-type]
        for x, y in zip(torch.autograd.grad(theirs.sum(), sequences), of_ours, strict=True):
            assert torch.equal(x, y)
        with pytest.raises(attngen.ArgumentError, match="dropout_p"):
            torch.ops.aten._scaled_dot_product_flash_attention(*given, 0.1, True)
        used = torch.tensor([2, 9], dtype=torch.int32)
        with pytest.raises(attngen.ArgumentError, match="seqused_k"):
            torch.ops.aten._flash_attention_forward(*sequences, *rest, seqused_k=used)
        with pytest.raises(attngen.ArgumentError, match="block_table"):
            torch.ops.aten._flash_attention_forward(*sequences, *rest, block_table=used[:, None])
    finally:
        handle.remove()
    with pytest.raises(
        NotImplementedError, match="flash_attention"
    ):  # torch's word: there is no kernel any more
        torch.ops.aten._scaled_dot_product_flash_attention(*given, 0.0, True)


def test_importing_attngen_loads_none_of_it() -> None:
    """Torch's biases load seconds of compilers; they come with the first use of `attngen.sdpa`."""
    program = "import sys, attngen; assert 'torch.nn.attention.bias' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)

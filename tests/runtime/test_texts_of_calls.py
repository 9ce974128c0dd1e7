"""What is passed for a mask or a score: a text, an Expression, or a sentence that says what to pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

import attngen


def causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx >= kv_idx


def call(**texts: Any) -> None:
    attngen.attention(*(torch.zeros(1, 8, 2, 32, dtype=torch.bfloat16) for _ in range(3)), **texts)


def compile(**texts: Any) -> None:
    attngen.compile({"target": "simulator", "problem": {"head_dim": 32}, **texts})


@pytest.mark.parametrize("run", [call, compile])
@pytest.mark.parametrize("argument", ["mask", "score"])
@pytest.mark.parametrize(
    ("value", "got", "hint"),
    [
        (causal, "function", "attngen.expression(f)"),
        (None, "None", "leave it out"),
        (torch.ones(8, 8), "Tensor of shape (8, 8)", "x[q_idx, kv_idx]"),
        (torch.ones(2, 1, 8, 8), "Tensor of shape (2, 1, 8, 8)", "[batch, 1, seqlen_q, seqlen_k]"),
        (torch.ones(()).numpy(), "ndarray of shape ()", "declare it"),
        (create_block_mask, "BlockMask", "attngen.expression(x.mask_mod)"),
        (object(), "object", ""),
    ],
)
def test_what_is_no_text_is_refused_with_what_to_pass(
    run: Callable[..., None], argument: str, value: Any, got: str, hint: str
) -> None:
    """A function, nothing, a tensor, torch's block mask: by attention, and by a spec in a dict."""
    if value is create_block_mask:  # which takes torch a second
        value = create_block_mask(causal, 1, 1, 128, 128, "cpu")
    with pytest.raises(attngen.ArgumentError) as caught:
        run(**{argument: value})
    error = caught.value
    assert error.argument == argument and got in str(error.got) and hint in (error.hint or "")
    assert "attngen.Expression" in str(error)


def test_the_hint_for_a_tensor_does_what_it_says() -> None:
    """Its text and its declaration are those of a call that takes the tensor."""
    allowed = torch.ones(8, 8).tril().bool()
    with pytest.raises(attngen.ArgumentError) as caught:
        call(mask=allowed)
    said = eval(
        f"dict({(caught.value.hint or '').removeprefix('declare it: ').replace('x=...', 'x=allowed')})"
    )
    q, k, v = (
        torch.randn(1, 8, 2, 32, generator=torch.Generator().manual_seed(0)).bfloat16() for _ in range(3)
    )
    assert torch.equal(
        attngen.attention(q, k, v, **said), attngen.attention(q, k, v, attngen.expression(causal))
    )


def test_data_of_another_kind_is_told_in_the_spec() -> None:
    """What a text of YAML can hold is drawn at its place, in a dict too."""
    for value in (True, 3, ["causal"]):
        with pytest.raises(attngen.SpecError):
            compile(mask=value)

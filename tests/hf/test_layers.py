"""Single layers: masks and biases that are tensors, and what layers of a model share."""

from collections import Counter
from typing import Any

import pytest
import torch

import attngen
from attngen.hf.model_attention import attend
from tests.hf.exact_attention import exact_attention
from tests.hf.tiny_models import LAYERS, decoder, hold_to_eager, padding, tokens

BATCH, QUERIES, KEYS = 2, 5, 7


class Layer(torch.nn.Module):
    """A layer without a mask of its own."""

    is_causal = False


def inputs() -> list[torch.Tensor]:
    """q of four heads, k and v of two, which require grad."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((BATCH, 4, QUERIES, 8), (BATCH, 2, KEYS, 8), (BATCH, 2, KEYS, 8))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("shape", [(BATCH, 4, QUERIES, KEYS), (1, 1, QUERIES, KEYS), (BATCH, 1, 1, KEYS)])
def test_a_tensor_of_truth_values_hides_pairs(shape: tuple[int, ...], launches: Counter[str]) -> None:
    """Of whatever it is shared by; keys behind those of the call are not looked at."""
    seen = random(*shape) > -0.5
    longer = torch.cat([seen, torch.zeros_like(seen)], -1)
    q, k, v = (x.detach() for x in inputs())
    exact, _ = exact_attention(Layer(), q.double(), k.double(), v.double(), seen)
    for mask in (seen, longer):
        made, _ = attend(Layer(), q, k, v, mask)
        hold_to_eager(made, exact.float(), exact)
    assert launches == {"forward": 2}


@pytest.mark.parametrize("shape", [(BATCH, 4, QUERIES, KEYS), (1, 4, QUERIES, KEYS), (1, 1, QUERIES, KEYS)])
@pytest.mark.parametrize("name", ["attention_mask", "position_bias"])
def test_a_tensor_of_numbers_is_added_and_learns(
    name: str, shape: tuple[int, ...], launches: Counter[str]
) -> None:
    """As a mask of a user's, or as the bias of positions: its gradient is summed over what shares it."""
    found: list[list[torch.Tensor]] = []
    for function, dtype in ((exact_attention, torch.float64), (attend, torch.float32)):
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs())
        bias = random(*shape).to(dtype).requires_grad_()
        given: dict[str, Any] = {"attention_mask": None, name: bias}
        if function is exact_attention:  # which has one name for what is added
            given = {"attention_mask": None, "position_bias": bias}
        out, _ = function(Layer(), q, k, v, scaling=0.5, softcap=2.0, **given)
        out.square().sum().backward()
        found.append([out.detach(), *[x.grad for x in (q, k, v, bias)]])
    for exact, made in zip(*found, strict=True):
        assert made.shape == exact.shape
        hold_to_eager(made, exact.float(), exact)
    assert launches == {"forward": 1, "backward": 1}


def test_layers_share_tables(monkeypatch: pytest.MonkeyPatch, launches: Counter[str]) -> None:
    """What a kernel wants to know of padding is worked out once a forward pass; in inference mode by each layer."""
    made: list[object] = []
    tables = attngen.Kernel.tables
    monkeypatch.setattr(
        attngen.Kernel, "tables", lambda *these, **named: made.append(these) or tables(*these, **named)
    )
    model = decoder("llama")
    model.set_attn_implementation("attngen")
    ids = tokens()
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found.append(model(ids, attention_mask=padding("left", ids)).logits.clone())
        assert len(made) == 1
    assert torch.equal(*found)
    assert launches == {"forward": 2 * LAYERS}

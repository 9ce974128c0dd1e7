"""`attngen.torchtitan` on the simulator, over stand-ins: documents in f64, gradients, the config, refusals."""

import re
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import attngen
from tests.faces.attention64 import assert_near, attention64, draw, starts
from tests.faces.frameworks import (
    VarlenAttention,
    VarlenMetadata,
    assert_same_signatures,
    lines_of_page,
    standing_in,
)

LENGTHS = (3, 17, 1, 12)
TOKENS = sum(LENGTHS)
HEADS, HEADS_KV, COLUMNS, COLUMNS_V = 4, 2, 24, 16
WINDOWS = {(-1, 0): "causal", (-1, -1): "full", (5, 0): "a window", (5, 2): "both sides"}


@pytest.fixture(scope="module")
def titan() -> Iterator[ModuleType]:
    with standing_in("attngen.torchtitan") as face:
        yield face


def documents(lengths: tuple[int, ...] = LENGTHS) -> VarlenMetadata:
    at = starts(*lengths)
    return VarlenMetadata(at, at, max(lengths), max(lengths))


def tokens() -> list[torch.Tensor]:
    shapes = ((TOKENS, HEADS, COLUMNS), (TOKENS, HEADS_KV, COLUMNS), (TOKENS, HEADS_KV, COLUMNS_V))
    return [x.requires_grad_() for x in draw(*shapes)]


def seen(window: tuple[int, int], length: int) -> torch.Tensor:
    """The pairs of one document that a window shows."""
    before = torch.arange(length)[:, None] - torch.arange(length)[None]
    left, right = (length if size < 0 else size for size in window)
    return (before <= left) & (before >= -right)


def exact(inputs: list[torch.Tensor], window: tuple[int, int], scale: float | None) -> list[torch.Tensor]:
    """Out, (tokens, heads, head_dim_v), and lse, (tokens, heads), of all documents, f64."""
    made = [
        attention64(*rows, seen(window, rows[0].shape[0]), scale=scale)
        for rows in zip(*(x.split(LENGTHS) for x in inputs), strict=True)
    ]
    return [torch.cat([out for out, _ in made]), torch.cat([lse.transpose(0, 1) for _, lse in made])]


def test_signatures_are_torchtitans(titan: ModuleType) -> None:
    """Parameters, their order, kinds and defaults are those of the class in whose place it stands."""
    assert_same_signatures(titan.InnerAttention, VarlenAttention)
    assert issubclass(titan.InnerAttention.Config, VarlenAttention.Config)
    assert titan.InnerAttention.Config().window_size == VarlenAttention.Config().window_size


@pytest.mark.parametrize("window", WINDOWS, ids=WINDOWS.values())
@pytest.mark.parametrize("scale", [None, 0.3])
def test_each_document_is_alone(
    titan: ModuleType, window: tuple[int, int], scale: float | None, launches: dict[str, int]
) -> None:
    """Out and gradients in f64, heads grouped, by one launch forward and one backward."""
    inputs = tokens()
    module = titan.InnerAttention.Config(window_size=window).build()
    out = module(*inputs, attention_masks=documents(), scale=scale, enable_gqa=True)
    inputs64 = [x.detach().double().requires_grad_() for x in inputs]
    out64, _ = exact(inputs64, window, scale)
    assert_near(out, out64)
    (dout,) = draw(out.shape, seed=1)
    found = torch.autograd.grad(out, inputs, dout)
    for x, y in zip(found, torch.autograd.grad(out64, inputs64, dout.double()), strict=True):
        assert_near(x, y, 5e-5)
    assert launches == {"forward": 1, "backward": 1}


def test_sinks_are_made_of_lse(titan: ModuleType) -> None:
    """out_transform has lse by token with its gradient: gpt-oss's sinks are right, and so is their gradient."""
    inputs, sinks = tokens(), draw((HEADS,), seed=2)[0].requires_grad_()

    def with_sinks(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        assert lse.shape == (TOKENS, HEADS)
        return out * torch.sigmoid(lse - sinks)[..., None]

    module = titan.InnerAttention.Config(window_size=(7, 0)).build()
    out = module(*inputs, attention_masks=documents(), enable_gqa=True, out_transform=with_sinks)
    inputs64 = [x.detach().double().requires_grad_() for x in (*inputs, sinks)]
    made = [
        attention64(*rows, seen((7, 0), rows[0].shape[0]), sink=inputs64[3])[0]
        for rows in zip(*(x.split(LENGTHS) for x in inputs64[:3]), strict=True)
    ]
    assert_near(out, torch.cat(made))
    (dout,) = draw(out.shape, seed=1)
    found = torch.autograd.grad(out, [*inputs, sinks], dout)
    expected = torch.autograd.grad(torch.cat(made), inputs64, dout.double())
    for x, y in zip(found, expected, strict=True):
        assert_near(x, y, 5e-5)


def test_a_layer_is_captured(titan: ModuleType) -> None:
    """torch.compile has it in one graph, other documents in the same, with the bits of the eager call."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    module, counted = titan.InnerAttention.Config().build(), CompileCounterWithBackend("aot_eager")
    captured = torch.compile(module, fullgraph=True, backend=counted)
    for lengths in (LENGTHS, (9, 20, 3, 1), (1, 1, 1, 30)):
        inputs = tokens()
        options: dict[str, Any] = {"attention_masks": documents(lengths), "enable_gqa": True}
        out, eager = captured(*inputs, **options), module(*inputs, **options)
        assert torch.equal(out, eager) and eager.any()
        found, expected = (torch.autograd.grad(x.sum(), inputs) for x in (out, eager))
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert counted.frame_count <= 2


MISTAKES: dict[str, dict[str, Any]] = {
    "attention_masks: got dict, expected VarlenMetadata": {"attention_masks": {}},
    "attention_masks.cu_seq_q: got dtype": {
        "attention_masks": documents()._replace(cu_seq_q=starts(*LENGTHS).float())
    },
    "score_mod: got": {"score_mod": abs},
    "is_causal: got False": {"is_causal": False},
    "k_TNH: got 2 heads beside 4": {"enable_gqa": False},
    "q_TNH: got 4 dimensions": {"q_TNH": torch.zeros(1, TOKENS, HEADS, COLUMNS)},
    "v_TNH: got dtype torch.float64": {"v_TNH": torch.zeros(TOKENS, HEADS_KV, 16, dtype=torch.float64)},
    "k_TNH: got head_dim 32": {"k_TNH": torch.zeros(TOKENS, HEADS_KV, 32)},
    "q_TNH: got 9 tokens beside 33": {
        "q_TNH": torch.zeros(9, HEADS, COLUMNS),
    },
    "scale: got nan": {"scale": float("nan")},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_told_by_the_names_of_the_call(titan: ModuleType, message: str) -> None:
    """As ValueErrors; nothing that a caller passes is passed over."""
    arguments = dict(zip(("q_TNH", "k_TNH", "v_TNH"), tokens(), strict=True))
    arguments |= {"attention_masks": documents(), "enable_gqa": True, **MISTAKES[message]}
    with pytest.raises(ValueError, match=f"argument {re.escape(message)}") as caught:
        titan.InnerAttention.Config().build()(**arguments)
    assert isinstance(caught.value, attngen.ArgumentError)


def test_a_window_is_checked_where_the_module_is_made(titan: ModuleType) -> None:
    """Before any token comes."""
    with pytest.raises(attngen.ArgumentError, match="window_size"):
        titan.InnerAttention.Config(window_size=(1.5, 0)).build()


def test_the_page_shows_what_is_written(titan: ModuleType) -> None:
    """Its lines put attngen's module where a config has TorchTitan's, with the window of that."""
    layer = SimpleNamespace(inner_attention=VarlenAttention.Config(window_size=(31, 0)))
    found = [("layers.0.inner_attention", layer.inner_attention, layer, "inner_attention")]
    exec(lines_of_page("attngen.torchtitan"), {"model_config": SimpleNamespace(traverse=lambda kind: found)})
    module = layer.inner_attention.build()
    assert type(module) is titan.InnerAttention and module.window_size == (31, 0)

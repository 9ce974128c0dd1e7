"""`attngen.megatron` on the simulator, over stand-ins: masks, packed sequences and offsets in f64, and refusals."""

import re
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import attngen
from tests.faces.attention64 import assert_near, attention64, draw, starts
from tests.faces.frameworks import (
    AttnMaskType,
    DotProductAttention,
    PackedSeqParams,
    TransformerConfig,
    assert_same_signatures,
    lines_of_page,
    standing_in,
)

BATCH, HEADS, GROUPS, COLUMNS, COLUMNS_V, LENGTH = 2, 4, 2, 32, 16, 21


@pytest.fixture(scope="module")
def megatron() -> Iterator[ModuleType]:
    with standing_in("attngen.megatron") as face:
        yield face


def made(
    megatron: ModuleType, kind: str = "causal", scale: float | None = None, layer: int = 1, **config: Any
) -> Any:
    """A core attention that trains, of a config without dropout unless it says otherwise."""
    about: dict[str, Any] = {"attention_dropout": 0.0, **config}
    options = TransformerConfig(HEADS, GROUPS, COLUMNS, **about)
    return megatron.CoreAttention(options, layer, AttnMaskType[kind], "self", softmax_scale=scale)


def inputs(queries: int = LENGTH, keys: int = LENGTH) -> list[torch.Tensor]:
    """Query, key and value as layers pass them, (seqlen, batch, heads, columns)."""
    shapes = (
        (queries, BATCH, HEADS, COLUMNS),
        (keys, BATCH, GROUPS, COLUMNS),
        (keys, BATCH, GROUPS, COLUMNS_V),
    )
    return [x.requires_grad_() for x in draw(*shapes)]


def doubled(leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.detach().double().requires_grad_() for x in leaves]


def assert_right(
    out: torch.Tensor, out64: torch.Tensor, leaves: list[torch.Tensor], leaves64: list[torch.Tensor]
) -> None:
    """Out, and the gradients of all leaves."""
    assert_near(out, out64)
    (dout,) = draw(out.shape, seed=1)
    found = torch.autograd.grad(out, leaves, dout)
    expected = torch.autograd.grad(out64, leaves64, dout.double())
    for x, y in zip(found, expected, strict=True):
        assert_near(x, y, 1e-4)


def exact(rows: list[torch.Tensor], seen: torch.Tensor | None = None, **about: Any) -> torch.Tensor:
    """(seqlen_q, batch, heads * head_dim_v), f64."""
    out, _ = attention64(*(x.transpose(0, 1) for x in rows), seen, **about)
    return out.transpose(0, 1).flatten(2)


PLACE, KEY = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
ALL = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
CAUSAL = ALL.tril()
HIDDEN = (torch.arange(LENGTH) >= torch.tensor([[16], [20]]))[:, None, None]
"""(batch, 1, 1, seqlen_k): keys of padding, as Megatron has them, True where they are none."""
DENSE: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "causal": ("causal", {}, {}, {"seen": CAUSAL}),
    "full": ("no_mask", {}, {}, {}),
    "padding": ("padding", {}, {"attention_mask": HIDDEN}, {"seen": ~HIDDEN}),
    "causal and padding": ("padding_causal", {}, {"attention_mask": HIDDEN}, {"seen": CAUSAL & ~HIDDEN}),
    "arbitrary": (
        "arbitrary",
        {},
        {"attention_mask": (PLACE // 8 != KEY // 8)[None, None]},
        {"seen": PLACE // 8 == KEY // 8},
    ),
    "of the call": ("padding", {}, {"attn_mask_type": AttnMaskType.causal}, {"seen": CAUSAL}),
    "window": ("causal", {"window_size": (4, 0)}, {}, {"seen": CAUSAL & (KEY >= PLACE - 4)}),
    "window without a bound": ("causal", {"window_size": (-1, 3)}, {}, {"seen": CAUSAL}),
    "window of both sides": (
        "no_mask",
        {"window_size": (4, 2)},
        {},
        {"seen": (KEY >= PLACE - 4) & (KEY <= PLACE + 2)},
    ),
    "scale": ("causal", {"scale": 0.3}, {}, {"seen": CAUSAL, "scale": 0.3}),
    "scale by layer": ("causal", {"apply_query_key_layer_scaling": True, "layer": 3}, {}, {"seen": CAUSAL}),
    "off by one": (
        "causal",
        {"softmax_type": "off-by-one"},
        {},
        {"seen": CAUSAL, "sink": torch.zeros(HEADS)},
    ),
}


def test_signatures_are_megatrons(megatron: ModuleType) -> None:
    """Parameters, their order, kinds and defaults are those of the class in whose place it stands."""
    assert_same_signatures(megatron.CoreAttention, DotProductAttention)


@pytest.mark.parametrize("case", DENSE)
def test_dense_calls(megatron: ModuleType, case: str, launches: dict[str, int]) -> None:
    """Out and gradients in f64, heads grouped, by one launch forward and one backward."""
    kind, config, passed, meant = DENSE[case]
    leaves, module = inputs(), made(megatron, kind, **config)
    out = module(*leaves, **{"attention_mask": None, **passed})
    assert out.is_contiguous()
    leaves64 = doubled(leaves)
    assert_right(out, exact(leaves64, **meant), leaves, leaves64)
    assert launches == {"forward": 1, "backward": 1}


def test_windows_are_of_some_layers(megatron: ModuleType) -> None:
    """Those that Megatron says."""
    leaves = inputs()
    for layer, seen in ((1, CAUSAL & (KEY >= PLACE - 4)), (2, CAUSAL)):
        module = made(megatron, layer=layer, window_size=(4, 0), window_attn_skip_freq=2)
        assert_near(module(*leaves, None), exact(leaves, seen))


def test_steps_with_a_cache(megatron: ModuleType) -> None:
    """One query sees all keys, several stand at the end of them where the call says so, with a window too."""
    for queries, kind in ((1, "causal"), (1, "no_mask"), (5, "causal_bottom_right")):
        leaves = inputs(queries=queries)
        place = torch.arange(queries)[:, None] + LENGTH - queries
        module = made(megatron, kind, window_size=(9, 0)).eval()
        assert_near(module(*leaves, None), exact(leaves, (place >= KEY) & (place - 9 <= KEY)))


def test_a_bias_has_a_gradient(megatron: ModuleType) -> None:
    """Of a head and of all pairs, beside a mask."""
    for shape in ((1, HEADS, LENGTH, LENGTH), (BATCH, 1, 1, LENGTH)):
        leaves = [*inputs(), *(x.requires_grad_() for x in draw(shape, seed=3))]
        leaves64 = doubled(leaves)
        out = made(megatron, "padding_causal")(*leaves[:3], HIDDEN, attention_bias=leaves[3])
        out64, _ = attention64(*(x.transpose(0, 1) for x in leaves64[:3]), CAUSAL & ~HIDDEN, bias=leaves64[3])
        assert_right(out, out64.transpose(0, 1).flatten(2), leaves, leaves64)


def test_a_learned_offset_is_trained_and_saved(megatron: ModuleType) -> None:
    """It joins the softmax's sum, has a gradient, and stands in the state by Megatron's name."""
    module, leaves = made(megatron, softmax_type="learnable"), inputs()
    with torch.no_grad():
        module.softmax_offset.copy_(torch.tensor([2.0, -1.0, 0.0, 1.0]))
    leaves64 = doubled([*leaves, module.softmax_offset])
    out64 = exact(leaves64[:3], CAUSAL, sink=leaves64[3])
    assert_right(module(*leaves, None), out64, [*leaves, module.softmax_offset], leaves64)
    assert list(module.state_dict()) == ["softmax_offset"]


LENGTHS, GAPS = (3, 17, 12), (1, 0, 4)


@pytest.mark.parametrize("has_gaps", [False, True], ids=["tokens", "tokens with gaps"])
@pytest.mark.parametrize("kind", ["causal", "padding", "padding_causal", "causal_bottom_right"])
def test_packed_sequences(megatron: ModuleType, kind: str, has_gaps: bool, launches: dict[str, int]) -> None:
    """Each is alone; what memory has between them is 0, and has no gradient."""
    rooms = [length + gap * has_gaps for length, gap in zip(LENGTHS, GAPS, strict=True)]
    shapes = (sum(rooms), HEADS, COLUMNS), (sum(rooms), GROUPS, COLUMNS), (sum(rooms), GROUPS, COLUMNS_V)
    leaves = [x.requires_grad_() for x in draw(*shapes)]
    padded = {f"cu_seqlens_{axis}_padded": starts(*rooms) for axis in ("q", "kv")} if has_gaps else {}
    about = {"max_seqlen_q": max(LENGTHS), "max_seqlen_kv": max(LENGTHS), **padded}
    packed = PackedSeqParams("thd", starts(*LENGTHS), starts(*LENGTHS), **about)
    out = made(megatron, kind, window_size=(6, -1))(*leaves, None, packed_seq_params=packed)
    leaves64, parts = doubled(leaves), []
    for rows, length in zip(zip(*(x.split(rooms) for x in leaves64), strict=True), LENGTHS, strict=True):
        seen = torch.ones(length, length, dtype=torch.bool).triu(-6)
        part, _ = attention64(*(x[:length] for x in rows), seen if kind == "padding" else seen.tril())
        parts += [part.flatten(1), part.new_zeros(rows[0].shape[0] - length, HEADS * COLUMNS_V)]
    assert_right(out, torch.cat(parts), leaves, leaves64)
    assert launches == {"forward": 1, "backward": 1}


def test_a_layer_is_captured(megatron: ModuleType) -> None:
    """torch.compile has dense and packed calls in one graph each, with the bits of the eager ones."""
    packed = PackedSeqParams("thd", starts(3, 18), starts(3, 18), max_seqlen_q=18, max_seqlen_kv=18)
    module = made(megatron, softmax_type="learnable")
    calls = {
        "dense": lambda q, k, v: module(q, k, v, HIDDEN),
        "packed": lambda q, k, v: module(q[:, 0], k[:, 0], v[:, 0], None, packed_seq_params=packed),
    }
    for call in calls.values():
        torch._dynamo.reset()
        leaves = [*inputs(), module.softmax_offset]
        out, eager = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves[:3]), call(*leaves[:3])
        assert torch.equal(out, eager) and eager.any()
        found, expected = (torch.autograd.grad(x.sum(), leaves) for x in (out, eager))
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def thd(**fields: Any) -> PackedSeqParams:
    return PackedSeqParams(
        **{"qkv_format": "thd", "cu_seqlens_q": starts(3), "cu_seqlens_kv": starts(3), **fields}
    )


THREE = {"query": torch.zeros(3, 4, 32), "key": torch.zeros(3, 2, 32), "value": torch.zeros(3, 2, 16)}
MISTAKES: dict[str, dict[str, Any]] = {
    "attention_dropout: got 0.1, expected 0 in training": {"config": {"attention_dropout": 0.1}},
    "attn_mask_type: got 'causal'": {"attn_mask_type": "causal"},
    "attn_mask_type: got causal of 5 queries and 21 keys": {"query": torch.zeros(5, 2, 4, 32)},
    "window_size: got (4, 0.5)": {"config": {"window_size": (4, 0.5)}},
    "query: got 3 dimensions": {"query": torch.zeros(21, 4, 32)},
    "query: got 4 dimensions": {"packed_seq_params": thd()},
    "key: got head_dim 40": {"key": torch.zeros(21, 2, 2, 40)},
    "value: got dtype torch.float64": {"value": torch.zeros(21, 2, 2, 16, dtype=torch.float64)},
    "attention_mask: got dtype torch.float32": {"attention_mask": torch.zeros(1, 1, 21, 21)},
    "attention_mask: got shape (1, 1, 21, 20)": {"attention_mask": torch.zeros(1, 1, 21, 20).bool()},
    "attention_bias: got dtype torch.bool": {"attention_bias": torch.zeros(1, 1, 21, 21).bool()},
    "attention_bias: got Tensor, expected None": {
        **THREE, "packed_seq_params": thd(), "attention_bias": torch.zeros(1, 1, 3, 3)
    },
    "attention_mask: got Tensor, expected None": {
        **THREE, "packed_seq_params": thd(), "attention_mask": torch.zeros(1, 1, 3, 3).bool()
    },
    "packed_seq_params.qkv_format: got 'sbhd'": {**THREE, "packed_seq_params": thd(qkv_format="sbhd")},
    "packed_seq_params.cp_group: got 2 processes": {**THREE, "packed_seq_params": thd(local_cp_size=2)},
    "packed_seq_params.cp_group: got a group": {**THREE, "packed_seq_params": thd(cp_group=object())},
    "packed_seq_params.cu_seqlens_kv: got NoneType": {**THREE, "packed_seq_params": thd(cu_seqlens_kv=None)},
    "packed_seq_params.cu_seqlens_q: got dtype": {**THREE, "packed_seq_params": thd(cu_seqlens_q=starts(3).long())},
}  # fmt: skip


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_told_by_the_names_of_the_call(megatron: ModuleType, message: str) -> None:
    """As ValueErrors; nothing that a layer passes is passed over."""
    passed = dict(MISTAKES[message])
    module = made(megatron, **passed.pop("config", {}))
    arguments = dict(zip(("query", "key", "value"), inputs(), strict=True)) | {"attention_mask": None}
    with pytest.raises(ValueError, match=f"argument {re.escape(message)}") as caught:
        module(**arguments | passed)
    assert isinstance(caught.value, attngen.ArgumentError)


def test_dropout_is_refused_in_training_alone(megatron: ModuleType) -> None:
    """Evaluation drops nothing."""
    module, leaves = made(megatron, attention_dropout=0.5).eval(), inputs()
    assert_near(module(*leaves, None), exact(leaves, CAUSAL))


@pytest.mark.parametrize(
    "config", [{"context_parallel_size": 2}, {"qk_clip": True}, {"log_max_attention_logit": True}], ids=str
)
def test_what_needs_another_module_is_refused_where_it_is_made(
    megatron: ModuleType, config: dict[str, Any]
) -> None:
    """By an error that Megatron can make anew of its text, as it does with what comes out of a spec."""
    with pytest.raises(ValueError, match=f"config.{next(iter(config))}") as caught:
        made(megatron, **config)
    assert str(type(caught.value)(str(caught.value))) == str(caught.value)


def test_the_page_shows_what_is_written(megatron: ModuleType) -> None:
    """Its lines put attngen's module into the spec of a layer."""
    attention = SimpleNamespace(submodules=SimpleNamespace(core_attention=DotProductAttention))
    layer_spec = SimpleNamespace(submodules=SimpleNamespace(self_attention=attention))
    exec(lines_of_page("attngen.megatron"), {"layer_spec": layer_spec})
    assert attention.submodules.core_attention is megatron.CoreAttention

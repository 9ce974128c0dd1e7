"""Mask functions of transformers, and of users, as texts: each hides what it hides as a tensor."""

from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig
from transformers import masking_utils as of_transformers

import attngen
from attngen.hf.mask_functions import MaskFunction, read_mask
from attngen.hf.model_masks import ModelMask, make_mask

BATCH, TOKENS = 2, 9
LEFT = torch.tensor([0, 3])
IDS = torch.tensor([[-1, 0, 0, -1, 1, 1, 1, -1, -1]]).expand(BATCH, -1)
PLACES = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0]]).expand(BATCH, -1)
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2]]).expand(BATCH, -1)
AHEAD = torch.tensor(2)


def every_other(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
    """A user's function without anything but numbers."""
    return (q_idx - kv_idx) % 2 == 0


def ahead(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
    """A user's function with a tensor of one number, which stays on its device."""
    return kv_idx <= q_idx + AHEAD


def held(number: torch.Tensor) -> MaskFunction:
    """The same in a closure, as a cache holds its length."""
    return lambda batch_idx, head_idx, q_idx, kv_idx: kv_idx <= q_idx + number


def packed(function: MaskFunction) -> MaskFunction:
    """A function of places in a document, of documents only, as newer versions of transformers pack them."""
    remap = getattr(of_transformers, "remap_positions_for_packed_sequence", None)
    function = remap(function, PLACES) if remap else function
    return of_transformers.and_masks(function, of_transformers.packed_sequence_mask_function(DOCUMENTS))


CAUSAL = of_transformers.causal_mask_function
FUNCTIONS: dict[str, MaskFunction] = {
    "causal": CAUSAL,
    "full": of_transformers.bidirectional_mask_function,
    "window": of_transformers.sliding_window_causal_mask_function(3),
    "window on both sides": of_transformers.sliding_window_bidirectional_mask_function(2),
    "chunks": of_transformers.chunked_causal_mask_function(3, LEFT),
    "images": of_transformers.or_masks(CAUSAL, of_transformers.blockwise_overlay(IDS)),
    "window over images": of_transformers.and_masks(
        of_transformers.or_masks(CAUSAL, of_transformers.blockwise_overlay(IDS)),
        of_transformers.sliding_window_overlay(4),
    ),
    "a user's": of_transformers.and_masks(CAUSAL, every_other),
    "a number of a global": ahead,
    "a number of a closure": held(AHEAD),
    "what is always so": of_transformers.or_masks(CAUSAL, lambda *places: torch.tensor(True)),
}
OF_PACKED = {
    "packed": packed(CAUSAL),
    "packed with a window": packed(of_transformers.sliding_window_causal_mask_function(2)),
    "packed in chunks": packed(of_transformers.chunked_causal_mask_function(2, LEFT)),
}
SIZES = {
    "a prompt": (TOKENS, TOKENS, 0, 0),
    "a step": (1, TOKENS, TOKENS - 1, 0),
    "some steps": (3, TOKENS, TOKENS - 3, 0),
    "a window's cache": (2, 5, TOKENS - 2, TOKENS - 5),
    "a prompt in a static cache": (4, TOKENS, 0, 0),
    "a step in a static cache": (1, TOKENS, torch.tensor(5), 0),
    "steps in a window's static cache": (2, 6, 5, 2),
}
"""Rows of q and of k, and where they begin."""


def shown_by(mask: ModelMask) -> torch.Tensor:
    """What a mask shows, (batch, rows of q, rows of k): the columns of V that reach a row, of equal scores."""
    batch, _, queries, keys = mask.shape
    q, k = torch.zeros(batch, queries, 1, 8), torch.zeros(batch, keys, 1, 8)
    v = torch.eye(keys).expand(batch, 1, keys, keys).transpose(1, 2).contiguous()
    return attngen.attention(q, k, v, mask.text, tensors=mask.tensors, **mask.values)[:, :, 0] > 0


def shown_as_tensor(function: MaskFunction, sizes: tuple[int, int, Any, int]) -> torch.Tensor:
    """The same by transformers."""
    queries, keys, q_offset, kv_offset = sizes
    made = of_transformers.sdpa_mask(
        batch_size=BATCH,
        q_length=queries,
        kv_length=keys,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=function,
        allow_is_causal_skip=False,
    )
    return made.expand(BATCH, 1, queries, keys)[:, 0]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_text_hides_what_its_function_hides(
    function: MaskFunction, sizes: tuple[int, int, Any, int]
) -> None:
    """Wherever the first query and the first key of a call stand."""
    queries, keys, *offsets = sizes
    mask = ModelMask(function, (BATCH, 1, queries, keys), None, *offsets)
    assert torch.equal(shown_by(mask), shown_as_tensor(function, sizes))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_torch_compile_looks_into_windows(sizes: tuple[int, int, Any, int]) -> None:
    """Its graph has the mask made inside, with what that reads."""
    queries, keys, *offsets = sizes

    def made(function: MaskFunction, *offsets: Any) -> tuple[Any, ...]:
        mask = ModelMask(function, (BATCH, 1, queries, keys), None, *offsets, looks_nothing_up=True)
        return mask.text, mask.tensors, mask.values

    torch.compiler.reset()
    function, mask = FUNCTIONS["window"], ModelMask(CAUSAL, (BATCH, 1, queries, keys))
    captured = torch.compile(made, backend="eager", fullgraph=True)
    mask.text, mask.tensors, mask.values = captured(function, *offsets)
    assert torch.equal(shown_by(mask), shown_as_tensor(function, sizes))


@pytest.mark.parametrize("function", OF_PACKED.values(), ids=OF_PACKED)
def test_packed_sequences(function: MaskFunction) -> None:
    """A sequence sees no other, and counts from its own begin where that matters."""
    mask = ModelMask(function, (BATCH, 1, TOKENS, TOKENS))
    shown = shown_by(mask)
    assert torch.equal(shown, shown_as_tensor(function, SIZES["a prompt"]))
    assert not shown[0, 3:8, :3].any() and shown[0, 3:8, 3:8].sum() > 5


@pytest.mark.parametrize("side", [slice(3), slice(6, None)], ids=["left", "right"])
@pytest.mark.parametrize("sizes", [(TOKENS, TOKENS, 0, 0), (1, TOKENS + 2, torch.tensor(8), 0), (2, 5, 7, 4)])
def test_padding_is_looked_up(side: slice, sizes: tuple[int, int, Any, int]) -> None:
    """By the place of the key in the sequence; what lies behind the mask, as in a static cache, is padding."""
    seen = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    seen[0, side] = False
    queries, keys, q_offset, kv_offset = sizes
    named = {
        "batch_size": BATCH,
        "q_length": queries,
        "kv_length": keys,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "attention_mask": seen,
        "mask_function": CAUSAL,
        "allow_is_causal_skip": False,
    }
    wanted = of_transformers.sdpa_mask(**named)[:, 0]
    assert torch.equal(shown_by(make_mask(config=PreTrainedConfig(), **named)), wanted)


def test_steps_share_a_text() -> None:
    """A prompt and all steps of a dynamic cache have one, where a window's cache is full too; static caches another."""

    def texts(function: MaskFunction, *sizes: tuple[int, int, Any, int]) -> set[str]:
        calls = [((BATCH, 1, *each[:2]), None, *each[2:]) for each in sizes]
        return {read_mask(function, *call).text for call in calls}

    window = of_transformers.sliding_window_causal_mask_function(4)
    full = [(1, 4, 11, 8), (1, 4, 12, 9)]
    steps = [(9, 9, 0, 0), (1, 10, 9, 0), (1, 11, 10, 0), *full]
    assert len(texts(CAUSAL, *steps)) == len(texts(window, *steps)) == 1
    assert len(texts(FUNCTIONS["chunks"], *full)) == 1
    assert len(texts(window, *((1, 16, torch.tensor(length), 0) for length in (9, 10)))) == 1
    assert len(texts(CAUSAL, (2, 9, 3, 0), (2, 9, 4, 0))) == 1


CLOSED = ["causal", "full", "window", "window on both sides", "packed", "packed with a window"]


@pytest.mark.parametrize("name", CLOSED)
def test_usual_masks_have_a_closed_form(name: str) -> None:
    """No block of keys is classed while the kernel runs."""
    read = read_mask({**FUNCTIONS, **OF_PACKED}[name], (BATCH, 1, TOKENS, TOKENS))
    spec = {"problem": {"head_dim": 64}, "mask": read.text, "tensors": dict(read.tensors)}
    kernel = attngen.compile(spec, arch="simulator")
    assert kernel.plan.tile_classes is None


STARTS = torch.tensor([0, 2, 2, 6, 8], dtype=torch.int32)
OTHERS = torch.tensor([0, 3, 4, 5, 9], dtype=torch.int32)
WINDOW = of_transformers.sliding_window_causal_mask_function(2)


def everywhere(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
    """Every pair, of whatever place: a query may stand before all keys of its document."""
    return kv_idx >= 0


@pytest.mark.parametrize("function", [CAUSAL, WINDOW, everywhere])
@pytest.mark.parametrize(
    "starts_q, starts_k, queries",
    [(STARTS, STARTS, 9), (STARTS, STARTS.long(), 9), (STARTS, OTHERS, 8), (OTHERS, STARTS, 9)],
    ids=["the same", "a copy", "more keys", "more queries"],
)
def test_documents_by_their_lengths(
    function: MaskFunction, starts_q: torch.Tensor, starts_k: torch.Tensor, queries: int
) -> None:
    """Each is a call by itself, whose last query stands beside its last key."""
    mask = ModelMask(function, (1, 1, queries, 9)).of_documents(starts_q, starts_k)
    assert mask.shape == (1, 1, queries, 9)
    wanted = torch.zeros(queries, 9, dtype=torch.bool)
    for (first_q, end_q), (first_k, end_k) in zip(
        *(zip(starts.tolist(), starts.tolist()[1:], strict=False) for starts in (starts_q, starts_k)),
        strict=True,
    ):
        q, k = torch.arange(first_q, end_q)[:, None] + end_k - end_q, torch.arange(first_k, end_k)
        wanted[first_q:end_q, first_k:end_k] = function(0, 0, q, k)
    places = mask.values.get("mask_q_places", torch.zeros(1))
    assert bool((places.diff() >= 0).all())  # as is declared
    counted = starts_q[-1]
    assert torch.equal(shown_by(mask)[0, :counted], wanted[:counted])


def test_lengths_are_read_once_for_all_layers() -> None:
    """The mask of the same tensors is the same; of others it is made anew."""
    mask = ModelMask(CAUSAL, (1, 1, 9, 9))
    assert mask.of_documents(STARTS, STARTS) is mask.of_documents(STARTS, STARTS)
    assert mask.of_documents(STARTS, STARTS) is not mask.of_documents(STARTS, OTHERS)


@pytest.mark.parametrize("function", [CAUSAL, WINDOW], ids=["causal", "window"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_cache_counts_on_in_its_own_tensor(function: MaskFunction, dtype: torch.dtype) -> None:
    """Before the first layer reads the mask, which stays what it was, as the mask of its first keys does."""
    length = torch.tensor(5, dtype=dtype)
    mask = ModelMask(function, (BATCH, 1, 1, 9), None, length)
    length.add_(1)
    wanted = shown_as_tensor(function, (1, 9, 5, 0))
    assert torch.equal(shown_by(mask), wanted)
    assert torch.equal(shown_by(mask[:, :, :, :7]), wanted[..., :7])


def test_masks_pass_for_masks() -> None:
    """A mask has four dimensions, the first keys of it are one, and moving it moves what it reads."""
    mask = ModelMask(FUNCTIONS["images"], (BATCH, 1, 4, 9), None, torch.tensor(3))
    assert isinstance(mask, BlockMask) and len(mask.shape) == mask.ndim == 4
    assert mask[:, :, :, :9] is mask[:, :] is mask
    assert torch.equal(shown_by(mask[:, :, :, :7]), shown_by(mask)[..., :7])
    assert "mask_block_sequence_ids" in repr(mask)
    assert {x.device.type for x in mask.to("meta").values.values()} == {"meta"}
    for index in (
        0,
        (slice(None), 0),
        (..., slice(3)),
        (slice(None),) * 3 + (slice(1, 4),),
        torch.tensor([0]),
    ):
        with pytest.raises(attngen.ArgumentError, match=r"a mask of attngen is a text"):
            mask[index]

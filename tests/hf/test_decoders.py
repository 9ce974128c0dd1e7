"""Causal language models with attngen in them: logits, packed and padded batches, greedy generation with each cache."""

from collections import Counter
from inspect import signature
from typing import Any

import pytest
import torch
from transformers.masking_utils import create_chunked_causal_mask

from tests.hf.tiny_models import DECODERS, LAYERS, decoder, hold_logits, hold_tokens, padding, tokens

CHUNKED_TAKES = signature(create_chunked_causal_mask).parameters
families = pytest.mark.parametrize("family", DECODERS)


@families
def test_logits(family: str, launches: Counter[str]) -> None:
    """Every layer is a launch, and logits are those of eager attention."""
    hold_logits(decoder(family), lambda model: model(tokens()), launches, LAYERS)


@families
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_padded_batches(family: str, side: str, launches: Counter[str]) -> None:
    """Tokens that are no padding have the logits that they have by eager attention."""
    seen = padding(side, tokens())
    hold_logits(decoder(family), lambda model: model(tokens(), attention_mask=seen), launches, LAYERS, seen)


@families
def test_logits_of_packed_batches(family: str, launches: Counter[str]) -> None:
    """Where places begin anew, so does a sequence that sees no other."""
    places = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0]])
    hold_logits(
        decoder(family),
        lambda model: model(tokens(1), position_ids=places, use_cache=False),
        launches,
        LAYERS,
    )


@families
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_generation(family: str, cache: str, launches: Counter[str]) -> None:
    """A left-padded batch goes on with the same tokens, past the end of windows and chunks; every step is launches."""
    if (family, cache) == ("llama4", "static") and "block_sequence_ids" not in CHUNKED_TAKES:
        pytest.skip("this transformers makes no chunked mask for a static cache")
    steps = 4
    options: dict[str, Any] = {"min_new_tokens": steps, "max_new_tokens": steps, "do_sample": False}
    if cache == "static":
        options["cache_implementation"] = "static"
    seen = padding("left", tokens())
    hold_tokens(
        decoder(family),
        lambda model: model.generate(tokens(), attention_mask=seen, **options),
        launches,
        LAYERS * steps,
    )

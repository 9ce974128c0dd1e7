"""Encoders, cross attention and images with attngen in them."""

from collections import Counter
from typing import Any

import pytest
import torch
import transformers

from tests.hf.tiny_models import (
    BOTH_KINDS,
    GROUPED,
    LAYERS,
    SMALL,
    TOKENS,
    bert,
    hold_logits,
    hold_tokens,
    modern_bert,
    padding,
    randomised,
    t5,
    tokens,
)

STEPS: dict[str, Any] = {"min_new_tokens": 3, "max_new_tokens": 3, "do_sample": False}
IMAGE = 46
"""The token that stands for a part of an image."""


@pytest.mark.parametrize("make", [bert, modern_bert])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_logits_of_encoders(make: Any, side: str | None, launches: Counter[str]) -> None:
    """Every token sees every other, or those in a window on both sides, but for padding."""
    seen = padding(side, tokens()) if side else None
    hold_logits(make(), lambda model: model(tokens(), attention_mask=seen), launches, LAYERS, seen)


def test_logits_of_cross_attention(launches: Counter[str]) -> None:
    """A decoder of Bert sees an encoder's tokens, fewer than its own and padded; a launch for each of the two."""
    config = transformers.BertConfig(**SMALL, is_decoder=True, add_cross_attention=True)
    states = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(3))
    seen = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])

    def call(model: Any) -> Any:
        return model(tokens(), encoder_hidden_states=states.to(model.dtype), encoder_attention_mask=seen)

    hold_logits(randomised(transformers.BertLMHeadModel(config)), call, launches, 2 * LAYERS)


def test_logits_of_t5(launches: Counter[str]) -> None:
    """Scores get a bias of each pair, and are not scaled."""
    seen = padding("right", tokens())
    decoded = tokens(length=5)

    def call(model: Any) -> Any:
        return model(tokens(), attention_mask=seen, decoder_input_ids=decoded)

    hold_logits(t5(), call, launches, 3 * LAYERS)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_of_t5(cache: str, launches: Counter[str]) -> None:
    """The encoder runs once, the decoder every step; cross attention has a cache of its own."""
    options = {**STEPS, **({"cache_implementation": "static"} if cache == "static" else {})}
    seen = padding("right", tokens())
    hold_tokens(
        t5(),
        lambda model: model.generate(tokens(), attention_mask=seen, **options),
        launches,
        LAYERS + STEPS["max_new_tokens"] * 2 * LAYERS,
    )


def whisper() -> transformers.PreTrainedModel:
    config = transformers.WhisperConfig(
        **TOKENS,
        num_mel_bins=8,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=10,
        max_target_positions=32,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return randomised(transformers.WhisperForConditionalGeneration(config))


SOUND = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(4))


def test_logits_of_whisper(launches: Counter[str]) -> None:
    """An encoder without masks, a causal decoder and cross attention."""
    hold_logits(
        whisper(),
        lambda model: model(SOUND.to(model.dtype), decoder_input_ids=tokens(length=5)),
        launches,
        3,
    )


def test_generation_of_whisper(launches: Counter[str]) -> None:
    """The encoder runs once, the decoder every step."""
    hold_tokens(
        whisper(), lambda model: model.generate(SOUND, **STEPS), launches, 1 + STEPS["max_new_tokens"] * 2
    )


VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 4,
    "vision_use_head": False,
}


def paligemma() -> transformers.PreTrainedModel:
    config = transformers.PaliGemmaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "image_size": 8,
            "projection_dim": 64,
            **VISION,
        },
        text_config={"model_type": "gemma", **GROUPED},
        image_token_id=IMAGE,
        projection_dim=64,
        hidden_size=64,
    )
    return randomised(transformers.PaliGemmaForConditionalGeneration(config))


def gemma3() -> transformers.PreTrainedModel:
    text = {**GROUPED, "sliding_window": 4, "query_pre_attn_scalar": 32, "layer_types": BOTH_KINDS}
    config = transformers.Gemma3Config(
        vision_config={"image_size": 16, **VISION},
        text_config=text,
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
    )
    return randomised(transformers.Gemma3ForConditionalGeneration(config))


IDS = torch.tensor([[5, *[IMAGE] * 4, 6, 7, 8]])
OF_IMAGES: dict[str, tuple[Any, int, int, dict[str, torch.Tensor]]] = {
    "paligemma": (paligemma, 8, LAYERS, {"token_type_ids": (torch.arange(8) > 5).long()[None]}),
    "gemma3": (gemma3, 16, LAYERS, {"token_type_ids": (IDS == IMAGE).long()}),
}


@pytest.mark.parametrize("name", OF_IMAGES)
def test_logits_of_images(name: str, launches: Counter[str]) -> None:
    """Tokens of an image, or of a prompt, see each other; the image's own encoder sees all of it."""
    make, size, layers, types = OF_IMAGES[name]
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(5))
    hold_logits(
        make(),
        lambda model: model(
            IDS, pixel_values=image.to(model.dtype), attention_mask=torch.ones_like(IDS), **types
        ),
        launches,
        1 + layers,
    )


@pytest.mark.parametrize("name", OF_IMAGES)
def test_generation_of_images(name: str, launches: Counter[str]) -> None:
    """The image is encoded once."""
    make, size, layers, types = OF_IMAGES[name]
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(5))
    hold_tokens(
        make(),
        lambda model: model.generate(IDS, pixel_values=image, **types, **STEPS),
        launches,
        1 + STEPS["max_new_tokens"] * layers,
    )

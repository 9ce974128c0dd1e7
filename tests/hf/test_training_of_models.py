"""Training steps of models with attngen in them: every parameter's gradient is as good as that of eager attention."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from tests.hf.tiny_models import (
    LAYERS,
    Call,
    computed,
    decoder,
    hold_to_eager,
    modern_bert,
    padding,
    t5,
    tokens,
)


def gradients(model: transformers.PreTrainedModel, call: Call, attention: str) -> dict[str, torch.Tensor]:
    """The gradient of each parameter that has one, of a call's loss."""

    def step(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
        model.train()
        model.zero_grad()
        call(model).loss.backward()
        return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}

    return computed(model, step, attention)


def hold_gradients(
    model: transformers.PreTrainedModel, call: Call, launches: Counter[str], layers: int, forwards: int = 1
) -> dict[str, torch.Tensor]:
    """Hold the gradients of a call's loss to the error rule, and the launches to their number; they are returned."""
    exact, eager = (gradients(model, call, name) for name in ("exact", "eager"))
    assert not launches
    made = gradients(model, call, "attngen")
    assert launches == {"forward": forwards * layers, "backward": layers}
    assert made.keys() == eager.keys() == exact.keys()
    largest = max(x.abs().max() for x in exact.values()).item()
    for name, x in made.items():
        hold_to_eager(x, eager[name], exact[name], largest)
    return made


def labels(ids: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """What is to be said: of padding nothing, and nothing that is said beside padding."""
    wanted = ids.masked_fill(seen == 0, -100)
    wanted[:, 1:].masked_fill_(seen[:, :-1] == 0, -100)
    return wanted


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "llama4", "deepseek_v3"])
def test_gradients(family: str, launches: Counter[str]) -> None:
    """Of a left-padded batch: with windows, caps of scores, learned sinks and chunks."""
    seen = padding("left", tokens())
    wanted = labels(tokens(), seen)
    made = hold_gradients(
        decoder(family),
        lambda model: model(tokens(), attention_mask=seen, labels=wanted),
        launches,
        LAYERS,
    )
    if family == "gpt_oss":
        assert all(made[f"model.layers.{layer}.self_attn.sinks"].abs().min() > 0 for layer in range(LAYERS))


def test_gradients_of_a_bias(launches: Counter[str]) -> None:
    """T5's table of relative positions learns by all layers that share it."""
    seen = padding("right", tokens())
    wanted = tokens(length=5)
    made = hold_gradients(
        t5(), lambda model: model(tokens(), attention_mask=seen, labels=wanted), launches, 3 * LAYERS
    )
    tables = [x for name, x in made.items() if "relative_attention_bias" in name]
    assert len(tables) == 2 and all(x.abs().max() > 0 for x in tables)


def test_gradients_of_an_encoder(launches: Counter[str]) -> None:
    """ModernBert's windows have two sides."""
    hold_gradients(modern_bert(), lambda model: model(tokens(), labels=tokens()), launches, LAYERS)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("make", [lambda: decoder("gpt_oss"), t5], ids=["gpt_oss", "t5"])
def test_gradients_with_checkpoints(make: Callable[[], Any], launches: Counter[str]) -> None:
    """Layers are computed once more on the way back, with the same mask."""
    model = make()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, layers = tokens(), 3 * LAYERS if model.config.model_type == "t5" else LAYERS
    hold_gradients(model, lambda model: model(ids, labels=ids), launches, layers, forwards=2)


@pytest.mark.parametrize("is_copied", [False, True], ids=["the same", "a copy"])
@pytest.mark.parametrize("restarts", [True, False], ids=["places restart", "places go on"])
def test_documents_of_a_packed_batch(is_copied: bool, restarts: bool, launches: Counter[str]) -> None:
    """Cumulative lengths keep documents apart, whatever places say: each has the gradients that it has by itself."""
    ids, starts = tokens(1), torch.tensor([0, 4, 9], dtype=torch.int32)
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]) if restarts else torch.arange(9)[None]
    wanted = ids.clone()
    wanted[0, 4] = -100
    others = {"cu_seq_lens_q": starts, "max_length_q": 5, "max_length_k": 5}
    others["cu_seq_lens_k"] = starts.clone() if is_copied else starts

    def call(model: Any) -> Any:
        if model.config._attn_implementation == "attngen":
            return model(ids, position_ids=places, labels=wanted, use_cache=False, **others)
        pieces = (slice(0, 4), slice(4, 9))
        logits = [model(ids[:, piece], position_ids=places[:, piece]).logits for piece in pieces]
        loss = model.loss_function(torch.cat(logits, 1), wanted, model.config.vocab_size)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss)

    hold_gradients(decoder("mistral"), call, launches, LAYERS)

"""Random models of transformers' families, of one or two layers, and what they are judged by."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

LAYERS = 2
TOKENS = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    **TOKENS,
}
GROUPED = {**SMALL, "num_key_value_heads": 1, "head_dim": 32}
BOTH_KINDS = ["sliding_attention", "full_attention"]

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED),
    "qwen3": ("Qwen3", GROUPED),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 4}),
    "gemma2": ("Gemma2", {**GROUPED, "sliding_window": 4, "query_pre_attn_scalar": 32}),
    "gemma3": (
        "Gemma3",
        {**GROUPED, "sliding_window": 4, "query_pre_attn_scalar": 32, "layer_types": BOTH_KINDS},
    ),
    "gpt_oss": (
        "GptOss",
        {
            **GROUPED,
            "sliding_window": 4,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "layer_types": BOTH_KINDS,
        },
    ),
    "llama4": (
        "Llama4",
        {
            **GROUPED,
            "attention_chunk_size": 4,
            "num_local_experts": 2,
            "intermediate_size_mlp": 64,
            "layer_types": ["chunked_attention", "full_attention"],
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **SMALL,
            "num_key_value_heads": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
        },
    ),
}
"""The name of each family's classes, and its config. Windows and chunks are shorter than the inputs."""


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """The model with weights that leave no layer without a say; nothing is dropped, whatever its mode."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.eval()


def decoder(family: str) -> PreTrainedModel:
    """A causal language model."""
    name, options = DECODERS[family]
    is_text = name in ("Gemma3", "Llama4")
    config = getattr(transformers, f"{name}TextConfig" if is_text else f"{name}Config")(**options)
    model = randomised(getattr(transformers, f"{name}ForCausalLM")(config))
    model.set_experts_implementation("eager")  # which has f64
    return model


def bert() -> PreTrainedModel:
    """An encoder."""
    return randomised(transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)))


def modern_bert() -> PreTrainedModel:
    """An encoder with windows on both sides."""
    config = transformers.ModernBertConfig(
        **SMALL, cls_token_id=1, sep_token_id=2, local_attention=4, global_attn_every_n_layers=2
    )
    return randomised(transformers.ModernBertForMaskedLM(config))


def t5() -> PreTrainedModel:
    """Two layers in the encoder and two in the decoder, which have two attentions each."""
    options = {name: TOKENS[name] for name in ("vocab_size", "pad_token_id", "eos_token_id")}
    options |= {"decoder_start_token_id": 0, "dropout_rate": 0.0}
    config = transformers.T5Config(d_model=64, d_kv=32, d_ff=64, num_layers=LAYERS, num_heads=2, **options)
    return randomised(transformers.T5ForConditionalGeneration(config))


def tokens(batch: int = 2, length: int = 9) -> torch.Tensor:
    """Random tokens, none of them special."""
    return torch.randint(3, 47, (batch, length), generator=torch.Generator().manual_seed(2))


def padding(side: str, ids: torch.Tensor) -> torch.Tensor:
    """Which tokens count: of the first row all but three on one side."""
    counts = torch.ones_like(ids)
    counts[0, slice(3) if side == "left" else slice(-3, None)] = 0
    return counts


Call = Callable[[PreTrainedModel], Any]


def computed(model: PreTrainedModel, call: Call, attention: str) -> Any:
    """What a call gives with an implementation of attention: `attngen`, `eager`, or `exact`, in f64."""
    for part in model.modules():  # older versions do not tell the stacks of T5
        if isinstance(part, PreTrainedModel):
            part.set_attn_implementation(attention)
    result = call(model.double() if attention == "exact" else model)
    model.float()
    return result


def hold_to_eager(
    made: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, largest: float | None = None
) -> None:
    """The error rule: a result is as good as that of eager attention in f32, up to a factor of two.

    Both are compared with attention in f64. Besides, some last bits of the largest number (of all that are worked out
    together) may differ: errors of another order of sums reach a result through all layers behind.
    """
    largest = exact.abs().max().item() if largest is None else largest
    assert largest > 1e-3
    error, yardstick = ((x.double() - exact).abs().max().item() for x in (made, eager))
    assert error <= 2 * yardstick + 2.0**-20 * largest, f"{error:.2e} beside {yardstick:.2e} of eager"


def hold_logits(
    model: PreTrainedModel, call: Call, launches: Counter[str], count: int, seen: torch.Tensor | None = None
) -> None:
    """Hold the logits of a call, or those of some tokens, to the error rule, and the launches to their number."""
    seen = slice(None) if seen is None else seen.bool()
    with torch.no_grad():
        exact, eager = (computed(model, call, name).logits[seen] for name in ("exact", "eager"))
        assert not launches
        made = computed(model, call, "attngen").logits[seen]
    assert launches == {"forward": count}
    hold_to_eager(made, eager, exact)


def hold_tokens(model: PreTrainedModel, call: Call, launches: Counter[str], count: int) -> None:
    """Hold the tokens of greedy generation to those of eager attention."""
    eager, made = (computed(model, call, name) for name in ("eager", "attngen"))
    assert launches == {"forward": count}
    assert torch.equal(made, eager)

"""Models of transformers with random weights for `bench_hf.py`: their shapes, and what goes through them.

Attention has a say in what they give: projections out of it are larger than usual, and those out of the layers between
are smaller. Else logits would hardly show what attention does.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from error_rule import Exact
from figures import Tensors
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel

OUT_OF_ATTENTION, OUT_OF_MLP = 4.0, 1 / 16
"""What the weights of these projections are multiplied by, after transformers has drawn them."""
_NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


@dataclass(frozen=True)
class Shape:
    """A model, and how many tokens it is measured with; batches have one row.

    Attributes:
        config: of the model.
        tokens: of a prefill.
        trained: of a training step.
        lengths: for which it is compiled, from the least to the largest.
    """

    config: PreTrainedConfig
    tokens: int
    trained: int = 0
    lengths: tuple[int, ...] = ()

    @property
    def facts(self) -> dict[str, Any]:
        """What of the config a figure depends on."""
        named = (
            *("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"),
            *("num_key_value_heads", "head_dim", "vocab_size", "sliding_window", "attn_logit_softcapping"),
        )
        return {name: getattr(self.config, name) for name in named if hasattr(self.config, name)}


LLAMA: dict[str, Any] = dict(
    num_hidden_layers=8, hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, vocab_size=512, max_position_embeddings=8192, **_NO_TOKENS,
)  # fmt: skip
"""Layers of Llama 3 8B, eight of them, and few tokens."""
GEMMA: dict[str, Any] = dict(
    num_hidden_layers=4, hidden_size=3584, intermediate_size=14336, num_attention_heads=16,
    num_key_value_heads=8, head_dim=256, query_pre_attn_scalar=256, sliding_window=4096, vocab_size=512,
    max_position_embeddings=8192, **_NO_TOKENS,
)  # fmt: skip
"""Layers of Gemma 2 9B, two with its window and two without; its caps, of 50 and 30, are the config's own."""
_TINY = dict(
    num_hidden_layers=2, hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1,
    head_dim=32, vocab_size=64, initializer_range=0.16,
)  # fmt: skip
SHAPES = {
    "llama": Shape(LlamaConfig(**LLAMA), 8192, 4096, (512, 1024, 2048, 4096, 8192)),
    "gemma": Shape(Gemma2Config(**GEMMA), 8192),
}
TINY_SHAPES = {
    "llama": Shape(LlamaConfig(**LLAMA | _TINY), 48, 32, (16, 32, 64)),
    "gemma": Shape(Gemma2Config(**GEMMA | _TINY | {"sliding_window": 16, "query_pre_attn_scalar": 32}), 48),
}
"""What the simulator gets done in seconds; queries and keys are as large as those of the others."""


def random_model(config: PreTrainedConfig, device: str) -> PreTrainedModel:
    """A model in bf16 with attngen's attention."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.bfloat16, attn_implementation="attngen"
        )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name:
                weight.mul_(OUT_OF_ATTENTION)
            elif "down_proj" in name:
                weight.mul_(OUT_OF_MLP)
    return model.eval()


def with_attention(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """A model of the same weights, which are not copied, with another implementation of attention."""
    twin = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    twin.set_attn_implementation(attention)
    return twin


def random_tokens(config: PreTrainedConfig, count: int, device: str) -> torch.Tensor:
    """(1, count), the same in every run."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.vocab_size, (1, count), generator=generator).to(device)


def prefill(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The logits of all tokens, (1, tokens, vocabulary), with the cache that generation would go on with."""
    with torch.no_grad():
        logits: torch.Tensor = model(ids, use_cache=True).logits
    return logits


def gradients(model: PreTrainedModel, ids: torch.Tensor) -> Tensors:
    """Those of all weights after a training step's forward and backward pass, which begins without any."""
    model.train().zero_grad(set_to_none=True)
    model(ids, labels=ids, use_cache=False).loss.backward()
    return tuple(weight.grad for weight in model.parameters())


def exact_and_eager(model: PreTrainedModel, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits by eager attention in f32, and in bf16."""
    eager = with_attention(model, "eager")
    return prefill(copy.deepcopy(eager).float(), ids), prefill(eager, ids)


def exact_gradients(model: PreTrainedModel, ids: torch.Tensor) -> Exact:
    """What gradients are held against, weight by weight."""
    eager = with_attention(model, "eager")
    return Exact(gradients(copy.deepcopy(eager).float(), ids), gradients(eager, ids))

"""What models ask for and no kernel serves: a sentence with model, layer and reason, before anything runs."""

import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch.nn.attention.flex_attention import create_block_mask
from transformers.masking_utils import causal_mask_function

import attngen
from attngen.errors import ToolchainError
from attngen.hf.model_attention import attend
from attngen.hf.model_masks import ModelMask, make_mask
from tests.hf.tiny_models import GROUPED, decoder, tokens


class LayerAttention(torch.nn.Module):
    """A layer as `attend` knows it."""

    config = SimpleNamespace(model_type="tiny")
    layer_idx = 3
    is_causal = True


Q, K = (torch.randn(2, heads, 5, 8, generator=torch.Generator().manual_seed(1)) for heads in (2, 1))
STARTS = torch.tensor([0, 2, 5])
MASK_OF_PAIRS = torch.ones(2, 1, 5, 5).bool()


@pytest.mark.parametrize(
    "passed, reason",
    [
        ({"dropout": 0.1}, "dropout: got 0.1"),
        ({"output_attentions": True}, "output_attentions: .* eager attention has them"),
        ({"indices": STARTS}, "indices: got Tensor"),
        ({"sinks": STARTS}, "sinks: got Tensor"),
        ({"block_table": STARTS}, "block_table: got Tensor"),
        ({"s_aux": torch.zeros(3)}, "sink"),
        ({"attention_mask": torch.ones(2, 5)}, r"attention_mask: got torch.float32 of shape \(2, 5\)"),
        ({"attention_mask": torch.ones(2, 3, 5, 5)}, r"attention_mask: .*expected 2 or 1 for num_heads_q"),
        ({"attention_mask": torch.ones(1, 1, 5, 4)}, r"attention_mask: .*expected 5 or 1 for seqlen_k"),
        ({"attention_mask": torch.ones(1, 1, 5, 5).double()}, "attention_mask: got torch.float64"),
        ({"attention_mask": torch.ones(1, 1, 5, 5).long()}, "attention_mask: got torch.int64"),
        ({"position_bias": torch.ones(1, 2, 4, 5)}, "position_bias: .*expected 5 or 1 for seqlen_q"),
        ({"attention_mask": {}}, "attention_mask: got dict"),
        (
            {"attention_mask": create_block_mask(causal_mask_function, 1, 1, 5, 5, device="cpu")},
            "attention_mask: got BlockMask",
        ),
        (
            {"attention_mask": ModelMask(causal_mask_function, (3, 1, 5, 5))},
            "one of 3 x 5 queries and 5 keys",
        ),
        (
            {"attention_mask": ModelMask(causal_mask_function, (2, 1, 4, 5))},
            "one of 2 x 4 queries and 5 keys",
        ),
        (
            {"attention_mask": ModelMask(causal_mask_function, (2, 1, 5, 4))},
            "one of 2 x 5 queries and 4 keys",
        ),
        ({"sliding_window": 3}, "attention_mask: got None, with a sliding_window of 3"),
        ({"cu_seq_lens_q": STARTS}, "cu_seq_lens_k: got None"),
        ({"cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS}, "documents in a batch of 2"),
        (
            {"attention_mask": MASK_OF_PAIRS, "cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS},
            "attention_mask: got a tensor beside cu_seq_lens_q",
        ),
        ({"scaling": float("nan")}, "softmax_scale"),
        ({"softcap": -1.0, "position_bias": torch.ones(1, 2, 5, 5).bool()}, "position_bias"),
    ],
)
def test_a_layer_is_refused(passed: dict[str, Any], reason: str, launches: Counter[str]) -> None:
    """By its model's type, its number and its class; the words of the fault are attributes too."""
    with pytest.raises(
        attngen.ModelError, match=rf"(?s)^tiny, layer 3, LayerAttention: .*{reason}"
    ) as raised:
        attend(LayerAttention(), Q, K, K, **passed)
    assert isinstance(raised.value, ValueError) and (raised.value.model, raised.value.layer) == (
        "tiny",
        "layer 3, LayerAttention",
    )
    assert not launches


def test_a_causal_layer_needs_to_know_where_queries_stand(launches: Counter[str]) -> None:
    """Without a mask it is refused where there are more keys than queries, but for one query, which sees all."""
    with pytest.raises(attngen.ModelError, match="of a causal layer with 3 queries and 5 keys"):
        attend(LayerAttention(), Q[:, :, :3], K, K)
    assert not launches
    one, _ = attend(LayerAttention(), Q[:, :, 4:], K, K)
    all_of_them, _ = attend(LayerAttention(), Q, K, K)
    assert torch.allclose(one[:, 0], all_of_them[:, 4], atol=1e-6)
    assert not torch.allclose(attend(LayerAttention(), Q, K, K, is_causal=False)[0], all_of_them)


def test_documents_do_not_go_with_a_cache_that_holds_tokens() -> None:
    """Their lengths are of this call's tokens alone."""
    mask = ModelMask(causal_mask_function, (1, 1, 5, 8), None, 3)
    with pytest.raises(attngen.ArgumentError, match="documents behind tokens of a cache"):
        mask.of_documents(STARTS, STARTS)


def test_dropout_of_a_model_in_training_is_refused(launches: Counter[str]) -> None:
    """By name, with what to set; the same model in eval mode runs."""
    config = transformers.LlamaConfig(**GROUPED, attention_dropout=0.1, attn_implementation="attngen")
    model = transformers.LlamaForCausalLM(config).train()
    with pytest.raises(
        attngen.ModelError, match="llama, layer 0, LlamaAttention: .*dropout: got 0.1"
    ) as raised:
        model(tokens())
    assert "attention_dropout" in str(raised.value)
    assert not launches
    model.eval()(tokens())
    assert launches == {"forward": 2}


def test_weights_of_attention_are_refused(launches: Counter[str]) -> None:
    """They are never in memory; None in their place would be no answer."""
    model = decoder("llama")
    model.set_attn_implementation("attngen")
    with pytest.raises(attngen.ModelError, match="output_attentions"):
        model(tokens(), output_attentions=True)
    assert not launches


def test_a_mask_function_that_asks_is_refused_with_its_line() -> None:
    """Python's `if` on a place: the error names the file, the line and what to write."""

    def asking(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        if q_idx > 3:
            return kv_idx <= q_idx
        return kv_idx < 3

    config = transformers.LlamaConfig(**GROUPED)
    with pytest.raises(
        attngen.ModelError, match=r"(?s)^llama, mask: .*test_refused_models.py:\d+, `if q_idx > 3:`: "
    ):
        make_mask(batch_size=1, q_length=5, kv_length=5, mask_function=asking, config=config)


def test_a_model_that_would_lose_its_mask_is_refused() -> None:
    """Doge adds masks of its own to masks that are tensors, and passes over others."""
    model = transformers.DogeForCausalLM(
        transformers.DogeConfig(**GROUPED, keep_window_size=4, attn_implementation="attngen")
    )
    with pytest.raises(attngen.ModelError, match="doge, mask: .*causality"):
        model(tokens())


@pytest.mark.parametrize("has_offsets", [True, False])
def test_transformers_that_is_missing_or_too_old(has_offsets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said which version would do, or how to get it."""
    if has_offsets:
        monkeypatch.setitem(sys.modules, "transformers", None)
    else:
        monkeypatch.setattr(transformers.masking_utils, "sdpa_mask", lambda cache_position: None)
    with pytest.raises(ToolchainError, match=r"(?s)transformers.*pip install 'attngen\[hf\]'"):
        attngen.hf.register()

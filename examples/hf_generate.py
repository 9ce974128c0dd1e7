"""Generate with a model of Hugging Face whose attention is attngen's: `python examples/hf_generate.py [--device cpu]`.

The model is Gemma 2's, made small, with random weights: nothing is downloaded, and what it says means nothing. One of
its layers sees a sliding window, the other all tokens before, and both cap scores. Prompts of different lengths are
padded on the left. On the CPU attngen is its simulator, and all is f32; on a GPU all is bf16.
"""

import argparse

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

import attngen

PROMPTS = ("Attention is", "One line changes:")
NEW_TOKENS = 12


def batch(texts: tuple[str, ...], device: str) -> dict[str, torch.Tensor]:
    """Texts as bytes, padded on the left, and which of these count."""
    length = max(map(len, texts))
    rows = [[0] * (length - len(text)) + list(text.encode()) for text in texts]
    ids = torch.tensor(rows, device=device)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def random_model(device: str) -> Gemma2ForCausalLM:
    """A Gemma 2 of two layers that knows bytes."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=8,
        initializer_range=0.2,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Gemma2ForCausalLM(config).eval()
    return model.to(device, torch.float32 if device == "cpu" else torch.bfloat16)


def main() -> None:
    """Print the masks as texts, and what the model says with attngen's attention and with transformers' own."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    attngen.hf.register()
    model, inputs = random_model(device), batch(PROMPTS, device)
    made = {}
    for attention in ("eager", "attngen"):  # the one line that changes
        model.set_attn_implementation(attention)
        made[attention] = model.generate(
            **inputs, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS
        )[:, -NEW_TOKENS:].tolist()
    states = model.get_input_embeddings()(inputs["input_ids"])
    for make in (create_sliding_window_causal_mask, create_causal_mask):
        print(make(model.config, states, inputs["attention_mask"], None))
    for place, prompt in enumerate(PROMPTS):
        for attention, tokens in made.items():
            print(f"{prompt!r} by {attention:8} {bytes(tokens[place])}")
    equal = sum(a == b for rows in zip(*made.values(), strict=True) for a, b in zip(*rows, strict=True))
    print(f"{equal} of {len(PROMPTS) * NEW_TOKENS} tokens are those of eager attention")


if __name__ == "__main__":
    main()

"""Models with attngen in them under torch.compile: one graph, few of them for all lengths, and every layer a launch."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.hf.tiny_models import LAYERS, computed, decoder, padding, tokens

pytest.importorskip("attngen.op", reason="no operator is there for torch.compile to capture")
LENGTHS = (9, 10, 12)


def test_a_forward_pass_is_one_graph(launches: Counter[str]) -> None:
    """Of a padded batch, with a window and without: the second length makes it one of any length, and results are those
    of eager calls.
    """
    model = decoder("gemma2")
    model.set_attn_implementation("attngen")
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=frames)
    for length in LENGTHS:
        ids = tokens(length=length)
        seen = padding("left", ids)
        with torch.no_grad():
            eager, made = (each(ids, attention_mask=seen).logits for each in (model, compiled))
        assert torch.equal(made, eager)
    assert frames.frame_count <= 2
    assert launches == {"forward": 2 * LAYERS * len(LENGTHS)}


def test_a_training_step_is_one_graph(launches: Counter[str]) -> None:
    """Gradients too are those of eager calls."""
    model = decoder("llama").train()
    model.set_attn_implementation("attngen")
    ids = tokens()
    found = []
    for each in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        each(ids, attention_mask=padding("right", ids), labels=ids).loss.backward()
        found.append({name: x.grad.clone() for name, x in model.named_parameters()})
    eager, made = found
    assert all(torch.equal(x, eager[name]) for name, x in made.items())
    assert launches == {"forward": 2 * LAYERS, "backward": 2 * LAYERS}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_steps_with_a_static_cache_are_compiled(
    family: str, launches: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `generate` does on a GPU: masks are made before, and go into the graph as they are."""
    from transformers import CompileConfig

    steps, model = 4, decoder(family)
    options: dict[str, Any] = {"do_sample": False, "min_new_tokens": steps, "max_new_tokens": steps}
    options |= {"cache_implementation": "static", "attention_mask": padding("left", tokens())}
    eager = computed(model, lambda model: model.generate(tokens(), **options), "eager")
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(model, "_valid_auto_compile_criteria", lambda *these, **named: True)
    options["compile_config"] = CompileConfig(backend="eager", fullgraph=True, mode=None)
    made = computed(model, lambda model: model.generate(tokens(), **options), "attngen")
    assert torch.equal(made, eager)
    assert launches == {"forward": LAYERS * steps}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1

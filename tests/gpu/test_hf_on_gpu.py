"""Models of Hugging Face on a GPU in bf16: forward and training steps of five families, and generation."""

from collections import Counter
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
import torch  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402

import attngen  # noqa: E402
from attngen.runtime import Launcher  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]

LAYERS, BATCH, LENGTH = 2, 2, 300
TOKENS = {"vocab_size": 512, "pad_token_id": 0, "eos_token_id": 2}
GROUPED = {
    **TOKENS,
    "bos_token_id": 1,
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}
WINDOWS = {"sliding_window": 100, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 2}  # all of them: none is chosen by a rounding
T5 = {"d_model": 512, "d_kv": 64, "d_ff": 512, "num_layers": LAYERS, "num_heads": 8, "dropout_rate": 0.0}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**GROUPED, "sliding_window": 100}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**GROUPED, **WINDOWS, "head_dim": 256, "query_pre_attn_scalar": 256},
    ),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {**GROUPED, **WINDOWS, **EXPERTS, "head_dim": 64}),
    "t5": ("T5Config", "T5ForConditionalGeneration", {**TOKENS, **T5, "decoder_start_token_id": 0}),
}
families = pytest.mark.parametrize("family", MODELS)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    attngen.hf.register()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many calls have been launched, by pass."""
    found: Counter[str] = Counter()
    make, inside = Launcher.make, []

    def counted(self: Launcher, wanted: tuple[str, ...], *arguments: object, **named: object) -> object:
        inside.append(wanted)  # a call may look at its arguments and begin anew
        made = make(self, wanted, *arguments, **named)
        inside.pop()
        found["forward" if "out" in wanted else "backward"] += not inside
        return made

    monkeypatch.setattr(Launcher, "make", counted)
    return found


def model_of(family: str) -> Any:
    """A random model in bf16, whose attention has a say in what it gives."""
    torch.manual_seed(0)
    config, model, options = MODELS[family]
    made = getattr(transformers, model)(getattr(transformers, config)(**options))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    if "gpt_oss" in family:
        made.set_experts_implementation("eager")  # which has f32 everywhere
    return made.to("cuda", torch.bfloat16).eval()


def switch(model: Any, attention: str) -> None:
    """Have all parts of a model use an implementation; older versions do not tell the stacks of T5."""
    for part in model.modules():
        if isinstance(part, transformers.PreTrainedModel):
            part.set_attn_implementation(attention)


def inputs_of(family: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tokens of a batch that is padded, of T5 on the right, and which logits count."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 500, (BATCH, LENGTH), generator=generator).cuda()
    seen = torch.ones_like(ids)
    seen[0, slice(-40, None) if family == "t5" else slice(40)] = 0
    labels = ids.masked_fill(seen == 0, -100)
    labels[0, 40] = -100
    if family == "t5":
        labels = ids[:, :70].contiguous()
        return {"input_ids": ids, "attention_mask": seen, "labels": labels}, torch.ones_like(labels)
    return {"input_ids": ids, "attention_mask": seen, "labels": labels}, seen


def rms(error: torch.Tensor) -> float:
    return error.double().square().mean().sqrt().item()


def hold(made: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    """The error rule: in bf16 no further from eager attention in f32 than twice eager attention in bf16, by the root of
    the mean square. A rounding of its own, one part in 128, is allowed besides: kernels round P and dS to bf16.
    """
    error, yardstick = rms(made.float() - exact), rms(eager.float() - exact)
    assert exact.any() and error <= 2 * yardstick + 2.0**-7 * rms(exact), (
        f"{error:.2e} beside {yardstick:.2e}"
    )


def layers_of(family: str) -> int:
    """Launches of one forward pass: T5's decoder has cross attention besides, and there is an encoder."""
    return 3 * LAYERS if family == "t5" else LAYERS


@families
def test_forward(family: str, launches: Counter[str]) -> None:
    """Every layer is a launch, and logits of tokens that count are as good as those of eager attention."""
    model = model_of(family)
    inputs, seen = inputs_of(family)
    found = {}
    for name, dtype in (("eager", torch.float32), ("eager", torch.bfloat16), ("attngen", torch.bfloat16)):
        switch(model, name)
        with torch.no_grad():
            found[name, dtype] = model.to(dtype)(**inputs).logits[seen.bool()].float()
    exact, eager, made = found.values()
    assert launches == {"forward": layers_of(family)}
    hold(made, eager, exact)


@families
def test_training_step(family: str, launches: Counter[str]) -> None:
    """Every layer is a launch of each pass, and gradients of all parameters are as good as those by eager attention."""
    model = model_of(family).train()
    inputs, _ = inputs_of(family)
    found = {}
    for name, dtype in (("eager", torch.float32), ("eager", torch.bfloat16), ("attngen", torch.bfloat16)):
        switch(model, name)
        model.to(dtype).zero_grad()
        model(**inputs).loss.backward()
        found[name, dtype] = {
            key: x.grad.float().clone() for key, x in model.named_parameters() if x.grad is not None
        }
    exact, eager, made = found.values()
    assert launches == {"forward": layers_of(family), "backward": layers_of(family)}
    assert made.keys() == exact.keys()
    for key, x in made.items():
        hold(x, eager[key], exact[key])


def test_a_compiled_model_with_windows(launches: Counter[str]) -> None:
    """It is one graph of a padded batch, in which every layer is a launch, and two graphs serve all lengths."""
    model, (inputs, seen) = model_of("gemma2"), inputs_of("gemma2")
    named = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        switch(model, "eager")
        with torch.no_grad():
            found.append(model.to(dtype)(**named).logits.float())
    switch(model, "attngen")
    frames = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=frames)
    # All are longer than the window: where its cache gets full, transformers has another graph.
    for length in (150, 200, LENGTH):
        with torch.no_grad():
            made = compiled(**{key: x[:, :length].clone() for key, x in named.items()}).logits.float()
        counts = seen[:, :length].bool()
        exact, eager = (logits[:, :length][counts] for logits in found)  # no token sees a later one
        hold(made[counts], eager, exact)
    assert frames.frame_count <= 2 and launches == {"forward": 3 * LAYERS}


def test_documents_of_a_packed_batch(launches: Counter[str]) -> None:
    """Cumulative lengths on the device keep documents apart, without the host reading them."""
    model = model_of("mistral")
    ids, pieces = inputs_of("llama")[0]["input_ids"][:1], (slice(0, 130), slice(130, 300))
    starts = torch.tensor([0, 130, 300], dtype=torch.int32, device="cuda")
    lengths = {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts.clone(),
        "max_length_q": 170,
        "max_length_k": 170,
    }
    places = torch.cat([torch.arange(130), torch.arange(170)])[None].cuda()
    switch(model, "attngen")
    with torch.no_grad():
        alone = torch.cat([model(ids[:, piece]).logits for piece in pieces], 1)
        launches.clear()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            packed = model.model(
                inputs_embeds=model.model.embed_tokens(ids), position_ids=places, use_cache=False,
                attention_mask=torch.ones_like(ids), **lengths,
            ).last_hidden_state  # fmt: skip
        finally:
            torch.cuda.set_sync_debug_mode("default")
        packed = model.lm_head(packed)
    assert launches == {"forward": LAYERS}
    assert rms(packed - alone) <= 2.0**-6 * rms(alone)


def test_greedy_generation(launches: Counter[str]) -> None:
    """Every step is launches, and every token the best of all by eager attention in f32, as far as bf16 can tell."""
    steps, family = 16, "gemma2"
    model, (inputs, _) = model_of(family), inputs_of(family)
    switch(model, "attngen")
    options = {"do_sample": False, "min_new_tokens": steps, "max_new_tokens": steps}
    named = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    made = model.generate(**named, **options)
    assert launches == {"forward": LAYERS * steps}
    switch(model, "eager")
    seen = torch.nn.functional.pad(named["attention_mask"], (0, steps), value=1)
    with torch.no_grad():
        logits = model.float()(made, attention_mask=seen).logits[:, -steps - 1 : -1]
    logits[..., TOKENS["eos_token_id"]] = -torch.inf  # which the length forbids
    chosen = logits.gather(-1, made[:, -steps:, None])[..., 0]
    assert (logits.amax(-1) - chosen).max() <= 2.0**-5 * logits.amax(-1).abs().max()
    assert made[:, -steps:].unique().numel() > 2

"""Models of Hugging Face with attngen's attention beside others: `python benchmarks/bench_hf.py --out DIR`.

bf16, random weights, one row of tokens, all candidates of a point interleaved in one process, every figure beside its
goal. `--only` names parts: `llama`, a prefill of 8k tokens and a training step of 4k beside SDPA by cuDNN; `gemma`, a
prefill of 8k beside eager attention and FlexAttention, as transformers compiles it; `compile`, the graphs that
torch.compile makes for 512 to 8192 tokens of that Llama. Shapes are those of `hf_models.py`, and `watched_attention.py`
says what counts as attention. Nothing is timed before it is held against eager attention in f32 (`error_rule.py`).

`--tiny` goes the same ways with small models: on the CPU too, where attngen is its simulator, SDPA is torch's math, and
times mean nothing.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import figures
import torch
import transformers
from error_rule import Exact, Judgement, by_blocks
from figures import Figure, Medians, Point, Tensors
from hf_models import (
    SHAPES,
    TINY_SHAPES,
    Shape,
    exact_and_eager,
    exact_gradients,
    gradients,
    prefill,
    random_model,
    random_tokens,
    with_attention,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from watched_attention import ATTENTION, Step, Steps, layer_by_layer, masks_of

import attngen

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = SDPBackend.CUDNN_ATTENTION if DEVICE == "cuda" else SDPBackend.MATH
COMPILER = "inductor" if DEVICE == "cuda" else "aot_eager"
PEERS = {"eager": 5.0, "flex_attention": 1.3}
"""Who stands beside Gemma's attention, and how many times as fast it shall be."""


def logits(model: Any, ids: torch.Tensor) -> Tensors:
    """Those of a prefill, by blocks of tokens."""
    return by_blocks(prefill(model, ids))


def beside_sdpa(step: Callable[..., Tensors], model: Any, ids: torch.Tensor) -> dict[str, Step]:
    """A step by attngen, and by SDPA where its backend takes part."""
    twin = with_attention(model, "sdpa")

    def by_backend() -> Tensors:
        with sdpa_kernel(BACKEND):  # which raises where it cannot serve a call
            return step(twin, ids)

    return {"attngen": partial(step, model, ids)} | present("sdpa", by_backend)


def present(name: str, step: Step) -> dict[str, Step]:
    """A step by others, already run once; none, told in a line, where it does not run."""
    return {name: step} if figures.peer(name, lambda: figures.Candidate(step, ())) else {}


def facts(shape: Shape, ids: torch.Tensor, **more: Any) -> dict[str, Any]:
    """What a row says of its model."""
    return {
        "model": shape.facts,
        "tokens": ids.shape[1],
        "transformers": transformers.__version__,
        **more,
    }


def llama_prefill(shape: Shape) -> Steps:
    """A prefill by attngen and by SDPA."""
    model, ids = random_model(shape.config, DEVICE), random_tokens(shape.config, shape.tokens, DEVICE)
    judge = partial(layer_by_layer, masks_of(partial(prefill, with_attention(model, "eager"), ids)))

    def goals(ms: Medians) -> Iterator[Figure]:
        ours, theirs = (ms[f"{name}{ATTENTION}"] for name in ("attngen", "sdpa"))
        share, their_share = ours / ms["attngen"], theirs / ms["sdpa"]
        yield Figure("attention's share of a step", share)
        yield Figure("attention's share of a step, to sdpa's", share / their_share, at_most=0.95)
        yield Figure("time of a step to sdpa's", ms["attngen"] / ms["sdpa"], at_most=1.0)
        yield Figure("time of attention to sdpa's", ours / theirs)

    steps = beside_sdpa(logits, model, ids)
    return Steps(steps, judge, DEVICE, True, goals, facts(shape, ids, sdpa=BACKEND.name))


def llama_training(shape: Shape) -> Steps:
    """A training step, forward and backward, by attngen and by SDPA; nothing is dropped."""
    model, ids = random_model(shape.config, DEVICE), random_tokens(shape.config, shape.trained, DEVICE)
    exact = exact_gradients(model, ids)

    def goals(ms: Medians) -> Iterator[Figure]:
        yield Figure("time of a step to sdpa's", ms["attngen"] / ms["sdpa"])

    steps = beside_sdpa(gradients, model, ids)
    judge = partial(judged_result, exact)
    return Steps(steps, judge, DEVICE, False, goals, facts(shape, ids, sdpa=BACKEND.name))


def judged_result(exact: Exact, step: Step) -> Judgement:
    """How far what a step returns is from what is exact."""
    return exact.judged(step())


def gemma_prefill(shape: Shape, peers: Mapping[str, float] = PEERS) -> Steps:
    """A prefill with windows and capped scores by attngen and by others."""
    model, ids = random_model(shape.config, DEVICE), random_tokens(shape.config, shape.tokens, DEVICE)
    judge = partial(layer_by_layer, masks_of(partial(prefill, with_attention(model, "eager"), ids)))
    steps = {"attngen": partial(logits, model, ids)}
    for name in peers:
        steps |= present(name, partial(logits, with_attention(model, name), ids))

    def goals(ms: Medians) -> Iterator[Figure]:
        for name, least in peers.items():
            speed = ms[f"{name}{ATTENTION}"] / ms[f"attngen{ATTENTION}"]
            yield Figure(f"speed of attention to {name}'s", speed, at_least=least)
            yield Figure(f"speed of a step to {name}'s", ms[name] / ms["attngen"])

    return Steps(steps, judge, DEVICE, True, goals, facts(shape, ids))


def compiled_lengths(shape: Shape) -> Steps:
    """Prefills of all lengths by one compiled model, counted and held, and those of the longest to be timed."""
    model, ids = random_model(shape.config, DEVICE), random_tokens(shape.config, shape.lengths[-1], DEVICE)
    exact, eager = exact_and_eager(
        model, ids
    )  # of fewer tokens it is their first rows: no token sees a later one
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(model, backend=COMPILER)
    graphs, found = [], []
    for length in shape.lengths:
        made = logits(compiled, ids[:, :length].clone())
        found.append(Exact(by_blocks(exact[:, :length]), by_blocks(eager[:, :length])).judged(made))
        graphs.append(counters["stats"]["unique_graphs"])
    breaks = sum(counters["graph_break"].values())

    def goals(ms: Medians) -> Iterator[Figure]:
        yield Figure("graph breaks", breaks, at_most=0)
        yield Figure(f"graphs for {len(graphs)} lengths", graphs[-1], at_most=2)
        allowed = Judgement.worst(found).of_allowed
        yield Figure("error of compiled logits of all lengths to what is allowed", allowed, at_most=1.0)
        yield Figure("speed of a compiled step to an eager one", ms["eager"] / ms["compiled"])

    steps = {"eager": partial(logits, model, ids), "compiled": partial(logits, compiled, ids)}
    judge = partial(judged_result, Exact(by_blocks(exact), by_blocks(eager)))
    more = {"lengths": shape.lengths, "graphs": graphs, "compiler": COMPILER}
    return Steps(steps, judge, DEVICE, False, goals, facts(shape, ids, **more))


def points(part: str, shapes: Mapping[str, Shape]) -> Iterator[Point]:
    """The points of a part."""
    llama, gemma = shapes["llama"], shapes["gemma"]
    if part == "llama":
        yield Point(f"prefill of {llama.tokens}", partial(llama_prefill, llama))
        yield Point(f"training step of {llama.trained}", partial(llama_training, llama))
    elif part == "gemma":
        yield Point(f"prefill of {gemma.tokens}", partial(gemma_prefill, gemma))
    else:
        yield Point(f"{llama.lengths[0]} to {llama.lengths[-1]}", partial(compiled_lengths, llama))


def main() -> int:
    """Measure the parts that the command line names."""
    parts = ("llama", "gemma", "compile")
    parser = figures.command_line(__doc__, parts)
    parser.add_argument("--tiny", action="store_true", help="small models")
    given = parser.parse_args()
    attngen.hf.register()
    shapes = TINY_SHAPES if given.tiny else SHAPES
    return figures.measure_parts(
        given, "hf.json", {part: partial(points, part, shapes) for part in parts}, {}
    )


if __name__ == "__main__":
    sys.exit(main())

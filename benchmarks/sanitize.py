"""Small launches of every schedule, for compute-sanitizer: `python benchmarks/sanitize.py [SET ...]`.

| set | what runs, beside GQA of 3:1 and with lse asked for |
|---|---|
| `plain` | f16 and bf16, head_dim 64 and 128, full and causal |
| `language` | walks, modified scores, declared tensors and tables of extremes |
| `fp8` | e4m3, quantised by the call, every kind of scales, promoted and not |
| `backward` | dQ, dK and dV of head_dim 64, 128 and 192, into their own memory and added to f32 |
| `fused` | the same of 64, 96 and 128 by one kernel that adds dQ up in device memory |
| `declared` | gradients of what a score reads: a bias, slopes, a scalar, a key's, a query's, and tables |
| `ragged` | ragged and padded sequences, poison behind every end, with gradients; the list made before too |
| `sink` | learned sinks with their gradient, and beside e4m3 |
| `blocks` | given blocks as a map and as lists, tiles in and across them, with gradients |
| `sorted` | sorted documents with gradients, the table of boundaries made before too |
| `parts` | keys in parts, in pages and padded, by warps, a warpgroup and two |

Each result is held against the reference on the CPU. `--device cpu` runs the plans of sm_90a on the simulator.
"""

import argparse
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

import attngen
from attngen.check.accuracy import Accuracy
from attngen.check.cuts import Cut
from attngen.check.declared_inputs import declared_inputs
from attngen.check.gradients import GradientAccuracy
from attngen.check.inputs import Shape, poison_unused, random_like
from attngen.check.judging import Inputs, draw, judge, judge_gradients
from attngen.quantize import SCALE_KINDS

Fields = dict[str, Any]
Verdict = Accuracy | GradientAccuracy
KINDS = ("fa2", "serial", "warp_specialized", "pingpong", "auto")
KINDS_OF_E4M3 = ("warp_specialized", "pingpong")
KINDS_OF_GRADIENTS = ("fa2", "serial", "auto")
"""One for each way in which gradients are made, and `auto`, whose are those of warpgroups."""
GRADIENTS: Fields = {"gradients": ["q", "k", "v"]}
SHAPES = tuple(Shape(1, 3, 1, *lengths) for lengths in ((1, 1), (113, 203), (128, 217)))
FEWER = (SHAPES[0], SHAPES[1])
DOCUMENTS: Fields = {"mask": "document(doc) and causal", "tensors": {"doc": "i32[batch, seqlen_k]"}}
LANGUAGE: tuple[Fields, ...] = (
    {"mask": "window(100, 0) or sinks(4)", "score": "softcap(score, 2.0)"},
    DOCUMENTS,
    {"mask": "prefix(9)", "score": "score + alibi(slopes)", "tensors": {"slopes": "f32[num_heads_q]"}},
    {
        "score": "score + bias[h, q_idx, kv_idx]",
        "tensors": {"bias": "bf16[num_heads_q, seqlen_q, seqlen_k]"},
    },
)
DECLARED: tuple[Fields, ...] = (
    {
        "score": "score + bias[h, q_idx, kv_idx] + u[b, kv_idx]",
        "tensors": {"bias": "bf16[num_heads_q, seqlen_q, seqlen_k]", "u": "f32[batch, seqlen_k]"},
    },
    {"score": "score * t[b, h, q_idx]", "tensors": {"t": "f32[batch, num_heads_q, seqlen_q]"}},
    {"score": "score + alibi(slopes)", "tensors": {"slopes": "f32[num_heads_q]"}},
    {"score": "softcap(score, cap)", "scalars": {"cap": "f32 = 3.0"}},
    {
        "score": "score + table[h, clamp(kv_idx - q_idx, -8, 7) + 8]",
        "tensors": {"table": "f32[num_heads_q, 16]"},
    },
    {
        "score": "score + table[kv_idx - q_idx + 69]",
        "tensors": {"table": "f32[n]"},
        "deterministic": False,
    },
)
BLOCKS = ((128, 128), (48, 80))
"""Rows and keys of given blocks: of those in which tiles lie, and of those across which they do."""
CUTS = {("ragged", "ragged"): "causal", ("padded", "padded"): "window(40, 3)",
        ("ragged", "padded"): "kv_idx % 3 != q_idx % 2"}  # fmt: skip
"""How queries and keys are cut, and a mask for each: a closed form twice, and a walk."""
SEQUENCES = (5, 0, 130, 64, 1, 200, 0)


@dataclass(frozen=True)
class Set:
    """Specs, each by some schedules, and the shapes of their calls.

    Attributes:
        specs: but for their schedule.
        kinds: of schedules.
        shapes: of the calls of each kernel.
        is_added: gradients are added to what f32 memory holds, too.
    """

    specs: tuple[Fields, ...]
    kinds: tuple[str, ...] = KINDS
    shapes: tuple[Shape, ...] = SHAPES
    is_added: bool = False

    def kernels(self, arch: str | None, only: Collection[str] = KINDS) -> list[attngen.Kernel]:
        """All of them that have one of these schedules, compiled at the same time."""
        kinds = [kind for kind in self.kinds if kind in only]
        specs = [{**fields, "schedule": {"kind": kind}} for fields in self.specs for kind in kinds]
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda spec: attngen.compile(spec, arch), specs))


def spec_of(head_dim: int, *more: Fields) -> Fields:
    """The keys of a spec."""
    merged: Fields = {"problem": {"head_dim": head_dim}}
    for fields in more:
        merged |= fields
    return merged


def plain() -> Iterator[Set]:
    """Specs without the language."""
    formats = [{"precision": {"inputs": inputs}} for inputs in ("f16", "bf16")]
    masks = [{"mask": mask} for mask in ("full", "causal")]
    yield Set(tuple(spec_of(dim, *fields) for dim in (64, 128) for fields in product(formats, masks)))


def language() -> Iterator[Set]:
    """Specs of walks, scores and tables."""
    yield Set(tuple(spec_of(64, fields) for fields in LANGUAGE))


def fp8() -> Iterator[Set]:
    """Specs of e4m3 inputs: kinds of scales, promotion, a mask and a score."""
    of_both = ((0, "hadamard", LANGUAGE[0]), (1, "none", {"mask": "causal"}))
    specs = []
    for scales in SCALE_KINDS:
        for promote, incoherent, fields in of_both:
            precision = {"inputs": "e4m3", "scales": scales, "promote": promote, "incoherent": incoherent}
            specs.append(spec_of(64, {"precision": precision}, fields))
    yield Set(tuple(specs), KINDS_OF_E4M3)


def backward() -> Iterator[Set]:
    """Specs with gradients of the inputs alone."""
    masks = ({"mask": "full"}, {"mask": "causal"}, DOCUMENTS)
    specs = (spec_of(dim, fields, GRADIENTS) for dim in (64, 128, 192) for fields in masks)
    yield Set(tuple(specs), KINDS_OF_GRADIENTS, SHAPES[1:2], is_added=True)
    # Of one key f32 outputs are judged by the last bit, which a division by the sum may lose.
    short = {"mask": "causal", "precision": {"output": "f32"}}
    yield Set((spec_of(64, short, GRADIENTS),), KINDS_OF_GRADIENTS, SHAPES[1:], is_added=True)
    yield Set((spec_of(64, masks[1], GRADIENTS),), KINDS_OF_GRADIENTS, SHAPES[:1], is_added=True)


def fused() -> Iterator[Set]:
    """Specs whose dQ is added up in any order, and of 96 columns in one order."""
    masks = ({"mask": "full"}, {"mask": "causal"}, {"mask": "window(100, 30)"})
    free: Fields = GRADIENTS | {"deterministic": False}
    specs = [spec_of(dim, fields, free) for dim in (64, 96, 128) for fields in masks]
    capped = spec_of(128, masks[1], {"score": "softcap(score, 3.0)"}, free)
    yield Set((*specs, capped), ("auto",), SHAPES[1:2], is_added=True)
    ordered = tuple(spec_of(96, fields, {"score": "softcap(score, 3.0)"}, GRADIENTS) for fields in masks)
    yield Set(ordered, ("auto",), SHAPES[1:2])


def declared() -> Iterator[Set]:
    """Specs with gradients of all that their scores read."""
    specs = []
    for fields in DECLARED:
        names = [*fields.get("tensors", {}), *fields.get("scalars", {})]
        specs.append(spec_of(64, fields, {"mask": "causal", "gradients": ["q", "k", "v", *names]}))
    yield Set(tuple(specs), KINDS_OF_GRADIENTS, FEWER)


def ragged() -> Iterator[Set]:
    """Each way to cut queries and keys, with a call that leaves rows of nobody on every side."""
    for (of_q, of_k), mask in CUTS.items():
        queries, keys = (
            Cut(kind, SEQUENCES, skipped, (3, 1, 0, 5, 0, 7, 2) if kind == "ragged" else (), tail=33)
            for kind, skipped in ((of_q, ()), (of_k, (0, 4, 0, 9, 0, 0, 1)))
        )
        shape = Shape(len(SEQUENCES), 3, 1, queries.size, keys.size, queries, keys)
        problem = {"head_dim": 64, "queries": of_q, "keys": of_k}
        yield Set(({"problem": problem, "mask": mask, **GRADIENTS},), KINDS, (shape,))


def sink() -> Iterator[Set]:
    """Learned sinks, with a running maximum and without, and of e4m3."""
    with_sink: Fields = {"mask": "causal", "sink": "per_head"}
    of_sink = {"gradients": ["q", "k", "v", "sink"]}
    scores = ("score", "softcap(score, 2.0)")
    yield Set(tuple(spec_of(64, with_sink, of_sink, {"score": score}) for score in scores), shapes=FEWER)
    yield Set((spec_of(64, with_sink, {"precision": {"inputs": "e4m3"}}),), KINDS_OF_E4M3)


def blocks() -> Iterator[Set]:
    """Given blocks in which tiles lie, and across which they do."""
    sizes = ({"blocks": {"block_m": rows, "block_n": keys}} for rows, keys in BLOCKS)
    yield Set(tuple(spec_of(64, {"mask": "causal"}, GRADIENTS, each) for each in sizes), shapes=FEWER)


def in_order() -> Iterator[Set]:
    """Sorted documents."""
    tensors = {"tensors": {"doc": "i32[batch, seqlen_k] sorted"}}
    specs = (spec_of(64, {"mask": mask}, tensors, GRADIENTS) for mask in ("document(doc)", DOCUMENTS["mask"]))
    yield Set(tuple(specs), shapes=FEWER)


def parts() -> Iterator[Set]:
    """Keys in parts of two lengths: in pages, and with a walk and bounded scores."""
    kinds = ("fa2", "warp_specialized", "pingpong")
    fields: dict[str, Fields] = {
        "paged": {"mask": "causal", "sink": "per_head"},
        "padded": {"mask": LANGUAGE[0]["mask"], "score": LANGUAGE[0]["score"]},
    }
    for of_k, more in fields.items():
        keys = Cut(of_k, SEQUENCES, page=16) if of_k == "paged" else Cut(of_k, SEQUENCES, tail=33)
        shape = Shape(len(SEQUENCES), 6, 2, 9, keys.size, None, keys)
        for split, head_dim in product(("auto", {"keys": 128}), (64, 128)):
            problem = {"head_dim": head_dim, "keys": of_k}
            spec: Fields = {"problem": problem, "split": split, **more}
            yield Set((spec,), kinds, (shape,))
            yield Set((spec | {"tile": {"block_m": 128}},), kinds[1:], (shape,))


SETS = {
    "plain": plain,
    "language": language,
    "fp8": fp8,
    "backward": backward,
    "fused": fused,
    "declared": declared,
    "ragged": ragged,
    "sink": sink,
    "blocks": blocks,
    "sorted": in_order,
    "parts": parts,
}


def on_cpu(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors where the reference reads them."""
    return [x.cpu() for x in tensors]


def ways(
    kernel: attngen.Kernel, inputs: Inputs, passed: Mapping[str, Any]
) -> Iterator[tuple[Fields, dict[str, Any]]]:
    """What a forward call alone may pass, and what both passes do: all ways that give one result."""
    yield {}, {**passed}
    if not kernel.plan.lengths.are_dense:
        yield {"work": kernel.work(*inputs, **passed)}, {**passed}
    elif kernel.plan.table_values:
        yield {"tables": kernel.tables(*inputs, **passed)}, {**passed}
    if "blocks" in passed:
        yield {}, {**passed, "blocks": lists_of(passed["blocks"])}


def lists_of(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts and indices of the blocks that a map keeps; behind each count stands what is no block."""
    counts = kept.sum(-1, dtype=torch.int32)
    indices = kept.int().argsort(dim=-1, descending=True, stable=True).int()
    is_listed = torch.arange(kept.shape[-1], device=kept.device) < counts[..., None]
    return counts, indices.where(is_listed, 2**30)


def results(kernel: attngen.Kernel, shape: Shape, device: str, is_added: bool) -> Iterator[Verdict]:
    """Run each way that a call can be made, and hold each result against the reference on the CPU."""
    spec, plan = kernel.spec, kernel.plan
    inputs = draw(plan, shape, device)
    passed = declared_inputs(spec.arguments, shape, device) | shape.arguments(device)
    known = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in passed.items()}
    given = on_cpu(inputs)
    by_gpu = device != "cpu"
    for forward, named in ways(kernel, inputs, passed):
        out, lse = kernel(*inputs, return_lse=True, **forward, **named)
        yield judge(spec, plan, *on_cpu((out, lse)), *given, declared=known, by_gpu=by_gpu)
        if not spec.gradients:
            continue
        dout = poison_unused(random_like(inputs[0], seed=1), shape.queries)
        made = kernel.backward(dout, *inputs, out, lse, **named)
        found = [on_cpu(made)]
        if is_added:
            held = [torch.ones_like(x, dtype=torch.float32) for x in inputs]
            kernel.backward(dout, *inputs, out, lse, grads=held, accumulate=True, **named)
            found.append([x - 1.0 for x in on_cpu(held)])
        for gradients in found:
            read = (gradients, tuple(given), *on_cpu((dout, out, lse)))
            yield judge_gradients(spec, *read, declared=known)


def main() -> int:
    """Run and compare; print what is wrong, and how many results were right; the exit code: 1 where one was not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "sets", nargs="*", metavar="SET", help=f"of {', '.join(SETS)}; all where none is named"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=KINDS, help="schedules; all unless named"
    )
    parser.add_argument("--list", action="store_true", help="name the sets, and do nothing else")
    given = parser.parse_args()
    if given.list:
        print("\n".join(SETS))
        return 0
    if unknown := set(given.sets) - SETS.keys():
        parser.error(f"no such set: {', '.join(sorted(unknown))}; there are {', '.join(SETS)}")
    arch = None if given.device == "cuda" else "sm_90a"
    is_all_right = True
    for name in given.sets or SETS:
        right = made = 0
        for each in SETS[name]():
            for kernel in each.kernels(arch, given.kinds):
                for shape in each.shapes:
                    for verdict in results(kernel, shape, given.device, each.is_added):
                        made += 1
                        right += verdict.ok
                        if not verdict.ok:
                            print(f"WRONG: {kernel.plan.name} of {shape}: {verdict}", flush=True)
        print(f"{name}: {right} of {made} results right", flush=True)
        is_all_right &= right == made
    return 0 if is_all_right else 1


if __name__ == "__main__":
    sys.exit(main())

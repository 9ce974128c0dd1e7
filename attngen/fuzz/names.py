"""Names for what drawn specs declare: identifiers of emitted texts, which nobody may take for those of the kernel."""

from collections.abc import Iterator
from functools import cache
from typing import Any

from attngen.arch import ARCHS
from attngen.emit import emit_module
from attngen.emit.device import names_in
from attngen.expr.declare import read_declarations
from attngen.lower import lower
from attngen.resources import shipped_specs
from attngen.schedules import SCHEDULES, WARPGROUP_SCHEDULES
from attngen.spec import load

_SPEC: dict[str, Any] = {
    "problem": {"head_dim": 64},
    "mask": "document(doc) and heads[b, h, h_kv] and (causal or kinds[q_idx] < exp(weights[kv_idx]))"
    " or (kv_idx - q_idx) // (h + 1) == (kv_idx - q_idx) % (h + 2)",
    "score": "temperature(cap, 8) * score * tanh(score) + alibi(slopes) + bias[h, q_idx, kv_idx]"
    " + exp(sigmoid(score)) * sqrt(abs(score))",
    "scalars": {"cap": "f32"},
    "tensors": {
        "doc": "i32[batch, seqlen_k]",
        "heads": "bool[batch, num_heads_q, num_heads_kv]",
        "kinds": "f16[seqlen_q]",
        "weights": "bf16[seqlen_k]",
        "slopes": "f32[num_heads_q]",
        "bias": "f16[num_heads_q, rows, seqlen_k]",
    },
}
"""A walk by tables, and a score with all that it can look up; the shipped specs have the other paths."""


@cache
def emitted_names() -> tuple[str, ...]:
    """Every identifier of emitted texts that a spec may declare, sorted."""
    found = frozenset().union(*map(names_in, _texts()))
    return tuple(sorted(read_declarations(dict.fromkeys(found, "i32"), {}, {}).declarations.scalars))


def _texts() -> Iterator[str]:
    for path in shipped_specs():
        yield from _emitted(path)
    for kind in (*SCHEDULES, *WARPGROUP_SCHEDULES):
        yield from _emitted(_SPEC | {"target": "sm_90a", "schedule": {"kind": kind}, "sink": "per_head"})
    e4m3 = {"inputs": "e4m3", "scales": "per_token", "incoherent": "hadamard"}
    yield from _emitted(_SPEC | {"target": "sm_90a", "precision": e4m3})


def _emitted(source: Any) -> Iterator[str]:
    spec = load(source)
    arch = ARCHS[spec.target]
    if arch.emits:
        yield from map(emit_module, lower(spec, arch).modules.values())

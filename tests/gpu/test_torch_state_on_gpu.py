"""What a process may have set of torch reaches no call on a GPU, no quantising there and no verdict."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import pytest
import torch
from gpu_kernels import skip_unless_runs_here

import attngen
from attngen.check.inputs import Shape, random_inputs
from attngen.check.judging import judge
from attngen.fuzz.states import STATES

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]

LANGUAGE = {
    "problem": {"head_dim": 64},
    "mask": "document(doc) and kv_idx < reach",
    "score": "softcap(score, cap) + slopes[h] * (kv_idx - q_idx)",
    "scalars": {"cap": "f32", "reach": "i32"},
    "tensors": {"doc": "i32[batch, seqlen_k]", "slopes": "f32[num_heads_q]"},
}
ALL_STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    **STATES,
    "default device cuda": partial(torch.device, "cuda"),
}


@cache
def passed() -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    tensors = random_inputs(Shape(2, 4, 2, 300, 300), 64, 64, torch.bfloat16, "cuda")
    doc = (torch.arange(300, dtype=torch.int32, device="cuda") // 70).expand(2, 300)
    slopes = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float32, device="cuda")
    return tensors, {"cap": 30.1, "reach": 290, "doc": doc, "slopes": slopes}


@cache
def made(name: str) -> attngen.Kernel:
    e4m3 = {"inputs": "e4m3", "incoherent": "hadamard"}
    return attngen.compile(
        LANGUAGE if name == "language" else {"problem": {"head_dim": 64}, "precision": e4m3}
    )


def result(name: str) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    kernel = attngen.Kernel(made(name).spec, made(name).call)  # which has met no signature
    (q, k, v), declared = passed()
    declared = declared if name == "language" else {}
    out, lse = kernel(q, k, v, 0.1, return_lse=True, **declared)
    verdict = judge(kernel.spec, kernel.plan, out, lse, q, k, v, 0.1, declared=declared)
    assert verdict.ok, verdict
    return out, lse, verdict.rmse, verdict.rmse_bound


@pytest.mark.parametrize("name", ["language", "e4m3"])
@pytest.mark.parametrize("state", ALL_STATES)
def test_no_state_of_torch_reaches_a_call(state: str, name: str) -> None:
    """Out and lse are the same bits, and the verdict is the same, of a signature first met under the state."""
    if name == "e4m3":
        skip_unless_runs_here("pingpong")  # what multiplies e4m3
    out, lse, *verdict = result(name)
    with ALL_STATES[state]():
        again_out, again_lse, *again = result(name)
    assert torch.equal(again_out, out) and torch.equal(again_lse, lse)
    assert again == pytest.approx(verdict)


def test_a_scalar_on_the_gpu_is_refused() -> None:
    """To read it would wait for the GPU; the number is asked for instead."""
    (q, k, v), declared = passed()
    for name in ("cap", "softmax_scale"):
        with pytest.raises(attngen.ArgumentError, match=f"(?s)argument {name}: .*pass {name}.item"):
            made("language")(q, k, v, **declared | {name: torch.ones((), device="cuda")})

"""Nothing that a process may have set of torch reaches a result, and no result changes what it has set."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import attngen
from attngen.bind import check_declared
from attngen.check.accuracy import compare
from attngen.check.declared_inputs import Given, declared_inputs
from attngen.check.inputs import KINDS_WITH_SCALES, MEMORY_LAYOUTS, Canary, Shape, poison, random_inputs
from attngen.check.judging import judge
from attngen.check.reference import attention, attention_as_fractions, attention_chunked, standard_attention
from attngen.cli.losses import rmse_of
from attngen.fuzz.states import STATES
from attngen.quantize import SCALE_KINDS, dequantize, quantize
from attngen.simulate import count, predict, trace
from attngen.torch_state import subnormal_numbers
from tests.runtime.test_declared import Recorder

SHAPE = Shape(1, 2, 1, 33, 40)
SIZES = {"batch": 1, "seqlen_q": 33, "seqlen_k": 40, "num_heads_q": 2, "num_heads_kv": 1, "group": 2}
LANGUAGE = {
    "mask": "document(doc) and kv_idx < reach",
    "score": "softcap(score, cap) + bias[h, kv_idx] + tiny * 1e38 + 0.1",
    "scalars": {"cap": "f32", "tiny": "f32", "reach": "i32"},
    "tensors": {"doc": "i32[batch, seqlen_k]", "bias": "f32[num_heads_q, seqlen_k]"},
}
SCALARS = {"cap": 30.1, "tiny": 3e-39, "reach": 37}
SCALE = 0.3


def kernel(head_dim: int, target: str = "simulator", **spec: object) -> attngen.Kernel:
    return attngen.compile({"target": target, "problem": {"head_dim": head_dim}, **spec})


LAUNCHED = kernel(32, "sm_90a", precision={"inputs": "f16"}, schedule={"kind": "fa2"}, **LANGUAGE)
SIMULATED = {
    "language": kernel(32, precision={"inputs": "f16"}, **LANGUAGE),
    "f32": kernel(32, precision={"inputs": "f32"}, mask="causal", schedule={"kind": "serial"}),
    "e4m3": kernel(64, precision={"inputs": "e4m3", "incoherent": "hadamard"}),
    "tokens": kernel(32, precision={"inputs": "e4m3", "scales": "per_token"}, mask="causal"),
}
Tensors = tuple[torch.Tensor, ...]


@cache
def inputs(head_dim: int, dtype: torch.dtype) -> Tensors:
    return random_inputs(SHAPE, head_dim, head_dim, dtype)


@cache
def declared() -> dict[str, Any]:
    given = Given(scalars={name: repr(value) for name, value in SCALARS.items()})
    return declared_inputs(LAUNCHED.spec.declarations, SHAPE, given=given)


def simulated(name: str, dtype: torch.dtype) -> Any:
    made = SIMULATED[name]
    passed = declared() if name == "language" else {}
    q, k, v = inputs(made.plan.head_dim_qk, dtype)
    out, lse = made(q, k, v, SCALE, return_lse=True, **passed)
    verdict = judge(made.spec, made.plan, out, lse, q, k, v, SCALE, declared=passed)
    assert verdict.ok, verdict
    return {"out": out, "lse": lse, "verdict": (verdict.max_error, verdict.rmse_bound)}


class ExactRecorder(Recorder):
    """Reads subnormal numbers too."""

    def _start(self, *arguments: Any) -> None:
        with subnormal_numbers():
            super()._start(*arguments)


def launched() -> Any:
    """What a kernel on a GPU is sent, addresses apart: of a new signature, and of one it has met."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        recorder = ExactRecorder(monkeypatch, LAUNCHED)
        for _ in range(2):
            recorder.run(*inputs(32, torch.float16), softmax_scale=0.1, **declared())
    return [
        {
            name: value
            for name, value in fields.items()
            if not name.endswith("ptr") and "workspace" not in name
        }
        for _, _, fields in recorder.sent
    ]


def references() -> Any:
    q, k, v = inputs(32, torch.float32)
    spec = LAUNCHED.spec
    about = {"score": spec.score_expr, "declared": declared()}
    given = (q, k, v, spec.mask_expr, SCALE)
    out, lse = standard_attention(*given, **about)
    exact = attention_as_fractions(*random_inputs(SHAPE, 4, 4, torch.float32, kind="integers"))
    verdict = compare(out, lse, *given, **about)
    others = (*attention(*given, **about), *attention_chunked(*given, **about))
    return {
        "fractions": exact,
        "references": (out, lse, *others),
        "verdict": (verdict.max_error, verdict.rmse_bound),
    }


def products() -> Any:
    """Of a size from which on torch's precision of f32 products tells on every CPU."""
    return standard_attention(*random_inputs(Shape(1, 1, 1, 256, 256), 256, 256, torch.float32))


def drawn() -> Any:
    made = [
        x
        for kind in KINDS_WITH_SCALES
        for layout in MEMORY_LAYOUTS
        for x in random_inputs(SHAPE, 8, 8, torch.float16, layout=layout, kind=kind)
    ]
    canary = Canary((1, 3, 2, 8), torch.float16)
    given = Given(
        tensors={"doc": "hashed", "bias": "sorted"}, scalars={"cap": "0.1", "tiny": "1", "reach": "3"}
    )
    more = declared_inputs(LAUNCHED.spec.declarations, SHAPE, given=given)
    return *made, *poison(*made[:3]), canary.out, canary.unwritten(), canary.damaged(), more


def quantised() -> Any:
    made = [
        quantize(*inputs(64, torch.bfloat16), scales, seed) for scales in SCALE_KINDS for seed in (None, 7)
    ]
    return *(x for operands in made for x in dequantize(operands)), *map(vars, made)


def counted() -> Any:
    plan = SIMULATED["language"].plan
    told = trace(SIMULATED["f32"].plan, *inputs(32, torch.float32))
    passed = {"declared": declared()}
    return (
        vars(count(plan, 33, 40, **passed)),
        str(predict(LAUNCHED.plan, 33, 40, **passed)),
        *map(vars, told.records),
    )


RESULTS: dict[str, Callable[[], Any]] = {
    "simulated language": lambda: simulated("language", torch.float16),
    "simulated f32": lambda: simulated("f32", torch.float32),
    "simulated e4m3": lambda: simulated("e4m3", torch.bfloat16),
    "simulated tokens": lambda: simulated("tokens", torch.float16),
    "launched": launched,
    "references": references,
    "products": products,
    "drawn": drawn,
    "quantised": quantised,
    "counted": counted,
    "declared": lambda: check_declared(
        LAUNCHED.manifest, LAUNCHED.manifest.intakes[0], declared(), SIZES, torch.device("cpu")
    )._asdict(),
    "losses": lambda: rmse_of({"e4m3": SIMULATED["tokens"]}, inputs(32, torch.bfloat16)),
}


@cache
def expected(result: str) -> Any:
    return RESULTS[result]()


def check_equal(found: Any, right: Any, near: tuple[str, ...] = (), to_the_bit: bool = True) -> None:
    """Equal, and of one type and one device, all the way down; what is called as in `near` is close by."""
    assert type(found) is type(right)
    if isinstance(right, torch.Tensor):
        assert (found.dtype, found.device, found.shape) == (right.dtype, right.device, right.shape)
        if not to_the_bit:
            torch.testing.assert_close(found.double(), right.double(), rtol=1e-5, atol=1e-6, equal_nan=True)
            return
        assert torch.equal(found.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
    elif isinstance(right, dict):
        assert list(found) == list(right)
        for name in right:
            check_equal(found[name], right[name], near, to_the_bit and name not in near)
    elif isinstance(right, list | tuple):
        assert len(found) == len(right)
        for pair in zip(found, right, strict=True):
            check_equal(*pair, near, to_the_bit)
    else:
        assert found == (right if to_the_bit else pytest.approx(right, rel=1e-3, abs=1e-6))


ALL_STATES = {**STATES, "fake tensors": FakeTensorMode}  # which takes seconds to load, too many for fuzzing


def state_of_torch() -> tuple[Any, ...]:
    """What a call must leave as it was."""
    return (
        torch.get_default_dtype(),
        torch.empty(0).device,
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch._C._functorch.peek_interpreter_stack() is None,
        torch.overrides._len_torch_function_stack(),
        torch.utils._python_dispatch._len_torch_dispatch_stack(),
        torch.finfo(torch.float64).tiny / 2 == 0.0,
    )


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("state", ALL_STATES)
def test_no_state_of_torch_reaches_a_result(state: str, result: str) -> None:
    """Every result is the same under each state, which is afterwards what it was; nothing random is drawn.

    The same bits; but a reference uses as many threads as it may, which add up products of f32 in another order.
    """
    right, random = expected(result), torch.get_rng_state()
    with ALL_STATES[state]():
        before = state_of_torch()
        found = RESULTS[result]()
        assert state_of_torch() == before
    assert torch.equal(torch.get_rng_state(), random)
    check_equal(found, right, near=("references", "verdict") if state == "threads" else ())

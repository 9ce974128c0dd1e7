"""What only looks like a tensor of numbers is refused by what it is, wherever a call could take it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.masked import masked_tensor

import attngen
from attngen.runtime import Launcher
from tests.plans import no_code
from tests.quantize.quantizing import Quantizing
from tests.runtime.test_declared import Recorder, _Module

SHAPE = (2, 8, 2, 64)
SPEC = {
    "problem": {"head_dim": 64},
    "precision": {"inputs": "f16"},
    "score": "score + bias[h, kv_idx] * gain",
    "tensors": {"bias": "f32[num_heads_q, seqlen_k]"},
    "scalars": {"gain": "f32 = 1.0"},
}
LAUNCHED = attngen.compile({**SPEC, "target": "sm_90a", "schedule": {"kind": "fa2"}})
SIMULATED = attngen.compile({**SPEC, "target": "simulator"})
OF_E4M3 = attngen.compile(
    {"target": "simulator", "problem": {"head_dim": 64}, "precision": {"inputs": "e4m3"}}
)


def good() -> dict[str, torch.Tensor]:
    """A call's tensors by name."""
    return {**{name: torch.ones(SHAPE).half() for name in "qkv"}, "bias": torch.zeros(2, 8)}


class Wrapper(torch.Tensor):
    """Holds another tensor and has no memory, as a DTensor."""

    @staticmethod
    def __new__(cls, x: torch.Tensor) -> "Wrapper":
        made: Wrapper = torch.Tensor._make_wrapper_subclass(
            cls, x.shape, dtype=x.dtype, device=x.device, strides=x.stride()
        )
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("no operation of it is to be called")


class Scaled(torch.Tensor):
    """Has memory, whose numbers do not mean what they say."""

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("no operation of it is to be called")


def without_memory(x: torch.Tensor) -> torch.Tensor:
    """As a tensor is whose storage a wrapper of models has taken away for a while."""
    x.untyped_storage().resize_(0)
    return x


ODD: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "nested": (lambda x: torch.nested.nested_tensor([*x]), "nested tensor.*to_padded_tensor"),
    "jagged": (
        lambda x: torch.nested.nested_tensor([*x], layout=torch.jagged),
        "nested tensor.*to_padded_tensor",
    ),
    "sparse": (lambda x: x.to_sparse(), "layout torch.sparse_coo.*to_dense"),
    "quantised": (
        lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8),
        "quantised.*dequantize",
    ),
    "masked": (lambda x: masked_tensor(x, x > 0), "MaskedTensor.*get_data"),
    "fake": (lambda x: FakeTensorMode().from_tensor(x), "FakeTensor.*plain torch.Tensor"),
    "wrapper": (Wrapper, "Wrapper.*to_local"),
    "scaled": (lambda x: x.as_subclass(Scaled), "Scaled.*plain torch.Tensor"),
    "negated": (torch._neg_view, "negates.*resolve_neg"),
    "zero": (lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype), "elements without memory"),
    "without memory": (without_memory, "elements without memory"),
    "grad": (lambda x: x.requires_grad_(), "requires grad.*no gradient"),
}
"""What makes one of a plain tensor, and what the refusal says."""
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # of the odd


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch, LAUNCHED)


def run(launcher: Recorder, q: Any, k: Any, v: Any, **declared: Any) -> Any:
    return launcher.launcher.run(q, k, v, declared=declared)


def ways(launcher: Recorder) -> list[Callable[..., Any]]:
    """Of calling a kernel; the launcher has met the signature."""
    run(launcher, **good())
    options = {key: SPEC[key] for key in ("score", "tensors", "scalars")}
    return [
        lambda **given: run(launcher, **given),
        SIMULATED,
        lambda **given: attngen.attention(**given, **options),  # type: ignore[arg-type]
    ]


def refuse(call: Callable[..., Any], name: str, words: str, given: dict[str, torch.Tensor]) -> None:
    with pytest.raises(attngen.ArgumentError, match=f"(?s)argument {name}: got .*{words}") as caught:
        call(**given)
    assert caught.value.argument == name


@pytest.mark.parametrize("name", ["q", "k", "v", "bias"])
@pytest.mark.parametrize("kind", ODD)
def test_odd_tensors_are_refused_by_name(launcher: Recorder, kind: str, name: str) -> None:
    """By the launcher, which knows the signature, by the simulator and by `attention`; nothing is launched."""
    make, words = ODD[kind]
    known = ways(launcher)
    if kind == "negated" and name != "bias":
        del known[
            0
        ]  # no public way leads to such a view whose rows are contiguous: it is looked for but once
    if kind == "grad":
        del known[2]  # which makes gradients
    for call in known:
        refuse(call, name, words, good() | {name: make(good()[name])})
    assert len(launcher.sent) == 1


@pytest.mark.parametrize("name", ["q", "k", "v", "bias"])
def test_tangents_are_refused(launcher: Recorder, name: str) -> None:
    """Of forward-mode AD, by whatever way the tensor came by one; without them calls go on under it."""
    for call in ways(launcher):
        x = good()[name]
        with forward_ad.dual_level():
            refuse(call, name, "tangent.*unpack_dual", good() | {name: forward_ad.make_dual(x, x)})
            with torch.no_grad():
                refuse(call, name, "tangent", good() | {name: forward_ad.make_dual(x, x)})
            call(**good())


@contextmanager
def refused(name: str, words: str) -> Iterator[None]:
    with pytest.raises(attngen.ArgumentError, match=f"(?s)argument {name}: got .*{words}"):
        yield


@pytest.mark.parametrize("name", ["q", "k", "v", "bias"])
def test_tensors_inside_of_transforms_are_refused(launcher: Recorder, name: str) -> None:
    """By the launcher, which sees numbers; others go through, and the call gives what it gives outside."""
    plain = good()
    x = plain[name]
    for number, call in enumerate(ways(launcher)):

        def inside(given: torch.Tensor, call: Callable[..., Any] = call) -> torch.Tensor:
            call(**plain | {name: given})
            return given.sum()

        def outside(given: torch.Tensor, call: Callable[..., Any] = call) -> torch.Tensor:
            out = call(**plain)
            assert not torch._C._functorch.is_functorch_wrapped_tensor(
                out[0] if isinstance(out, tuple) else out
            )
            return given.sum()

        for transform, words in (
            (lambda f: torch.func.vmap(f)(x[None]), "torch.vmap.*whole batches"),
            (lambda f: torch.func.grad(f)(x), "torch.func.grad"),
            (lambda f: torch.func.jvp(f, (x,), (x,)), "torch.func.grad, vjp or jvp"),
            (lambda f: torch.func.functionalize(f)(x), "functionalize"),
        ):
            if number == 0 or words == "functionalize":
                with refused(name, words):
                    transform(inside)
            transform(outside)
    with refused(name, f"requires grad.*no gradient of {name}"):
        torch.func.grad(lambda given: SIMULATED(**plain | {name: given}).float().sum())(x)


def test_subclasses_that_change_no_operation_are_taken(launcher: Recorder) -> None:
    """A Parameter without gradients and a class that only has a name hold their numbers as any tensor does."""

    class Named(torch.Tensor):
        pass

    plain = good()
    for call in ways(launcher):
        for make in (lambda x: torch.nn.Parameter(x, requires_grad=False), lambda x: x.as_subclass(Named)):
            call(**{name: make(x) for name, x in plain.items()})
    addresses = [plain[name].data_ptr() for name in "qkv"]
    sent = [fields for *_, fields in launcher.sent[1:]]
    assert len(sent) == 2 and all([s["q.ptr"], s["k.ptr"], s["v.ptr"]] == addresses for s in sent)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("kind", ODD)
def test_quantising_refuses_odd_tensors(kind: str, name: str) -> None:
    """A kernel of e4m3 inputs looks at what it is to quantise, whether a call asks or `quantize`."""
    make, words = ODD[kind]
    for call in (OF_E4M3, OF_E4M3.quantize):
        given = {each: torch.ones(SHAPE).half() for each in "qkv"}
        given[name] = make(given[name])
        if kind == "quantised" and name == "q":
            words = "quint8"
        refuse(call, name, words, given)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_the_quantising_launcher_refuses_as_the_other_does(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Of a signature that it knows, `kernel.quantize` on a GPU and the laying out of e4m3 V name the tensor."""
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    compiled = attngen.compile(
        {"target": "sm_90a", "problem": {"head_dim": 64}, "precision": {"inputs": "e4m3"}}
    )
    started: list[int] = []
    launcher = Quantizing(
        Launcher(
            compiled.manifest,
            no_code,
            load=lambda cubin: _Module(),
            start=lambda function, grid, *rest: started.append(grid),
        )
    )
    plain = {each: torch.ones(SHAPE).half() for each in "qkv"}
    v8 = torch.ones(SHAPE).to(torch.float8_e4m3fn)
    launcher.quantize(**plain)
    launcher.pack_v(v8)
    launches = len(started)
    for kind in ("wrapper", "scaled", "without memory", "fake", "grad"):
        make, words = ODD[kind]
        refuse(launcher.quantize, name, words, plain | {name: make(torch.ones(SHAPE).half())})
        if kind != "grad":
            refuse(launcher.pack_v, "v", words, {"v": make(v8.clone())})
    with forward_ad.dual_level():
        refuse(
            launcher.quantize,
            name,
            "tangent",
            plain | {name: forward_ad.make_dual(plain[name], plain[name])},
        )
        launcher.quantize(**plain)
    assert len(started) == launches + launches - 1


def test_tensors_of_inference_mode_make_no_tables() -> None:
    """Nobody counts writes to them, so that tables of them could not be told from old ones."""
    kernel = attngen.compile(
        {
            "target": "simulator",
            "problem": {"head_dim": 64},
            "mask": "document(doc)",
            "tensors": {"doc": "i32[batch, seqlen_k]"},
        }
    )
    q = torch.ones(SHAPE).bfloat16()
    with torch.inference_mode():
        doc = torch.zeros(2, 8, dtype=torch.int32)
        kernel(q, q, q, doc=doc)
    with refused("tables", "inference_mode"):
        kernel.tables(q, q, q, doc=doc)


def test_in_inference_mode_any_out_is_written() -> None:
    """A call within it may write to a tensor that was made outside of it, and to one of its own."""
    q = torch.ones(SHAPE).half()
    out = torch.zeros(SHAPE).half()
    with torch.inference_mode():
        for each in (out, torch.zeros(SHAPE).half()):
            assert SIMULATED(q, q, q, out=each, bias=torch.zeros(2, 8)) is each and bool((each == 1).all())

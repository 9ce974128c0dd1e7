"""torch.compile captures calls whole, forward and backward, and one graph serves all lengths and numbers."""

import shutil
from typing import Any

import pytest
import torch

import attngen
from tests.torch_compile.captured import HEAD_DIM, HEADS, LENGTHS, Function, frames_of, inputs

SPEC = {"target": "simulator", "problem": {"head_dim": HEAD_DIM}, "mask": "causal"}
KERNEL = attngen.compile({**SPEC, "gradients": ["q", "k", "v"]})
PLAIN = attngen.compile(SPEC)
WEIGHT = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)


class Layer(torch.nn.Module):
    """Has a kernel as its member."""

    def __init__(self, kernel: attngen.Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return self.kernel(q, k, v)


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    return attngen.attention(q, k, v, "causal")


@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    ("function", "dynamic", "frames"),
    [(causal, None, 2), (causal, True, 1), (Layer(KERNEL), None, 2), (KERNEL, None, 2)],
    ids=["attention", "attention dynamic", "member", "kernel"],
)
def test_five_lengths_are_two_frames_at_most(
    function: Function, dynamic: bool | None, frames: int, trains: bool
) -> None:
    """Of `attention`, of a kernel, and of a module that has one; with the eager bits, gradients too."""
    assert frames_of(function, [inputs(length, trains) for length in LENGTHS], dynamic) == frames


def windowed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, left: int) -> Any:
    mask = "causal and window(left, 0)"
    return attngen.attention(q, k, v, mask, scalars={"left": "i32"}, left=left)


def capped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cap: float) -> Any:
    return attngen.attention(q, k, v, "causal", "softcap(score, cap)", scalars={"cap": "f32"}, cap=cap)


def scaled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Any:
    return attngen.attention(q, k, v, "causal", softmax_scale=scale)


@pytest.mark.parametrize(
    ("function", "numbers"),
    [
        (windowed, (1, 2, 3, 4)),
        (capped, (1.0, 2.0, 3.5, 4.5)),
        (scaled, (0.5, 1.0, 0.25, -1.0)),
        (capped, tuple(torch.tensor(cap, requires_grad=True) for cap in (1.0, 2.0))),
    ],
    ids=["i32", "f32", "softmax_scale", "tensors with gradients"],
)
def test_a_number_that_varies_is_no_text(function: Function, numbers: tuple[Any, ...]) -> None:
    """Numbers of a call compile at most twice, of integers and of real numbers, which torch's graphs else would fix."""
    calls = [(*inputs(9, requires_grad=True), number) for number in numbers]
    assert frames_of(function, calls) <= 2


def documents(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, doc: torch.Tensor) -> Any:
    mask = "causal and document(doc)"
    return attngen.attention(q, k, v, mask, tensors={"doc": "i32[batch, seqlen_k]"}, doc=doc)


def with_slopes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor) -> Any:
    tensors = {"slopes": "f32[num_heads_q]"}
    return attngen.attention(q, k, v, "causal", "score + alibi(slopes)", tensors=tensors, slopes=slopes)


def with_sink(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor) -> Any:
    return attngen.attention(q, k, v, "causal", sink=sink)


def ragged(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor) -> Any:
    longest = int(q.shape[1])
    window = {"window_size": (3, 0)}
    return attngen.varlen_attn(q[0], k[0], v[0], starts, starts, longest, longest, **window)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("function", "value"),
    [
        (documents, lambda length: torch.arange(length, dtype=torch.int32)[None] // 3),
        (with_slopes, lambda length: torch.full((HEADS,), 0.1 * length, requires_grad=True)),
        (with_sink, lambda length: torch.full((HEADS,), 0.1 * length, requires_grad=True)),
        (ragged, lambda length: torch.tensor([0, 2, length], dtype=torch.int32)),
    ],
    ids=["document", "slopes", "sink", "ragged"],
)
def test_tensors_of_a_call_are_inputs_of_its_graph(function: Function, value: Any) -> None:
    """What a mask or a score reads, a sink, and starts of sequences, with gradients where they have any."""
    calls = [(*inputs(length, requires_grad=True), value(length)) for length in (5, 6, 9)]
    assert frames_of(function, calls) <= 2


DOC = torch.arange(9)[None] // 4
OWN = attngen.expression(lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (DOC[b, q_idx] == DOC[b, kv_idx]))


def test_an_expression_brings_its_tensors() -> None:
    """To `attention`, and to a kernel that is made of it."""
    kernel = attngen.compile({**SPEC, "mask": OWN})
    assert frames_of(lambda q, k, v: attngen.attention(q, k, v, OWN), [inputs(9, requires_grad=True)]) == 1
    assert frames_of(kernel, [inputs(9)]) == 1


@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
def test_heads_ahead_of_rows(trains: bool) -> None:
    """Layout bhsd, of memory that is bshd as models have it: the strides of the results are those of eager calls."""

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return KERNEL(*(x.transpose(1, 2) for x in (q, k, v)), layout="bhsd")

    assert frames_of(call, [inputs(9, trains, batch=2)]) == 1


def test_operands_and_quantising_are_captured() -> None:
    """Of e4m3 kernels both ways to begin a call."""
    kernel = attngen.compile({**SPEC, "problem": {"head_dim": 64}, "precision": {"inputs": "e4m3"}})
    q, k, v = (
        torch.randn(1, 9, 2, 64, generator=torch.Generator().manual_seed(0)).bfloat16() for _ in range(3)
    )
    operands = kernel.quantize(q, k, v)
    assert frames_of(kernel, [(q, k, v)]) == frames_of(kernel, [(operands,)]) == 1
    assert kernel(operands).any()


def test_given_blocks_are_captured() -> None:
    """As a map, and as lists."""
    kernel = attngen.compile({**SPEC, "blocks": {"block_m": 64, "block_n": 64}})
    q, k, v = inputs(100)
    kept = torch.tensor([[[[True, False], [False, True]]]])
    counts, indices = (
        torch.ones(1, 1, 2, dtype=torch.int32),
        torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32),
    )
    assert frames_of(lambda *x: kernel(*x[:3], blocks=x[3]), [(q, k, v, kept)]) == 1
    assert frames_of(lambda *x: kernel(*x[:3], blocks=x[3:]), [(q, k, v, counts, indices)]) == 1
    assert torch.equal(kernel(q, k, v, blocks=kept), kernel(q, k, v, blocks=(counts, indices)))


CALLS_OF_LAYER: dict[str, int] = {}
STARTS = torch.tensor([0, 9], dtype=torch.int32)


def counting(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    """Changes a dict that was there before, as a layer that writes into a cache does."""
    CALLS_OF_LAYER["calls"] = 1
    dense = attngen.attention(q, k, v, "causal")
    return dense + attngen.varlen_attn(q[0], k[0], v[0], STARTS, STARTS, 9, 9)


def test_a_dict_that_changes_breaks_no_graph() -> None:
    """torch reads no mapping proxy after any dict has been changed: calls have none."""
    assert frames_of(counting, [inputs(9, requires_grad=True)]) == 1


def test_another_kernel_compiles_once_more() -> None:
    """A module whose kernel is replaced gives what that one gives."""
    layer = Layer(KERNEL)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs(9)), KERNEL(*inputs(9)))
    layer.kernel = attngen.compile({**SPEC, "mask": "full"})
    assert torch.equal(compiled(*inputs(9)), layer.kernel(*inputs(9)))
    assert not torch.equal(layer.kernel(*inputs(9)), KERNEL(*inputs(9)))


def test_a_backward_pass_of_ones_own_is_captured() -> None:
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, lse = KERNEL(q, k, v, return_lse=True)
        return torch.cat(KERNEL.backward(torch.ones_like(out), q, k, v, out, lse))

    assert frames_of(call, [inputs(9)]) == 1


def test_autocast_is_captured() -> None:
    """What is cast in an eager call is cast in the graph."""

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attngen.attention(q, k, v, "causal") + KERNEL(q, k, v)

    leaves = [x.float().detach().requires_grad_() for x in inputs(9)]
    assert frames_of(call, [leaves]) == 1
    assert call(*leaves).dtype == torch.bfloat16


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles for the CPU with g++")
def test_inductor_gives_the_eager_bits() -> None:
    """It asserts the sizes and strides that the fake forms promise, of permuted inputs too."""

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return KERNEL(*(x.transpose(1, 2) for x in (q, k, v)), layout="bhsd")

    assert (
        frames_of(call, [inputs(length, requires_grad=True) for length in (5, 7, 9)], None, "inductor") <= 2
    )


NOT_CAPTURED = {
    "out": lambda q, k, v: KERNEL(q, k, v, out=torch.empty_like(q)),
    "grads": lambda q, k, v: KERNEL.backward(q, q, k, v, q, q[..., 0].float(), grads=(q, k, v)),
    "quantize": lambda q, k, v: KERNEL.quantize(q, k, v),
    "tables": lambda q, k, v: KERNEL.tables(q, k, v),
    "verify": lambda q, k, v: KERNEL.verify(q, k, v),
    "q": lambda q, k, v: torch.func.grad(lambda x: KERNEL(x, k, v).float().sum())(q),
    "k": lambda q, k, v: PLAIN(q, k * WEIGHT, v),
    "softmax_scale": lambda q, k, v: KERNEL(q, k, v, WEIGHT[0]),
    "cap": lambda q, k, v: capped(q, k, v, "3"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("argument", NOT_CAPTURED)
def test_what_is_not_captured_is_told(argument: str) -> None:
    """In the words of an eager refusal, where graph breaks are allowed too: none of these happens in silence."""
    torch._dynamo.reset()
    with pytest.raises(Exception, match=f"argument {argument}: got"):
        torch.compile(NOT_CAPTURED[argument], backend="aot_eager")(*inputs(9))


def test_faults_of_a_call_are_those_of_an_eager_one() -> None:
    """Shapes and types are looked at where the graph runs."""
    torch._dynamo.reset()
    compiled = torch.compile(KERNEL, backend="aot_eager", fullgraph=True)
    q, k, v = inputs(9)
    with pytest.raises(attngen.ArgumentError, match="argument k: got shape"):
        compiled(q, k[..., :16], v)
    with pytest.raises(attngen.ArgumentError, match="argument q: got dtype torch.float32"):
        compiled(q.float(), k, v)

"""Tensors that a Python function holds: their names, their formats, and what a call passes by itself."""

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import attngen
from attngen.errors import Diagnostic

DOC = torch.arange(24, dtype=torch.int32).reshape(2, 12) // 5


def holding(doc: Any) -> Callable[..., Any]:
    return lambda b, h, q_idx, kv_idx: doc[b, q_idx] == doc[b, kv_idx]


def only(function: Callable[..., Any], **declared: Any) -> Diagnostic:
    with pytest.raises(attngen.ExpressionError) as caught:
        attngen.expression(function, **declared)
    (fault,) = caught.value.diagnostics
    return fault


class Object:
    def __init__(self) -> None:
        self.doc = DOC

    def __call__(self, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return self.doc[b, q] == self.doc[b][kv]


class Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("doc", DOC)
        self.bias = torch.nn.Parameter(torch.zeros(3, 4))

    def forward(self, score: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
        return score + self.bias[h, self.doc[b, q]]


def of_global(b: Any, h: Any, q: Any, kv: Any) -> Any:
    return DOC[b, q] == DOC[b, kv]


def with_argument(doc: Any, b: Any, h: Any, q: Any, kv: Any) -> Any:
    return doc[b, q] == doc[b, kv]


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (holding(DOC), "mask_doc[b, q_idx] == mask_doc[b, kv_idx]"),
        (Object(), "mask_doc[b, q_idx] == mask_doc[b, kv_idx]"),
        (Object().__call__, "mask_doc[b, q_idx] == mask_doc[b, kv_idx]"),
        (functools.partial(with_argument, DOC), "mask_doc[b, q_idx] == mask_doc[b, kv_idx]"),
        (functools.partial(of_global), "mask_DOC[b, q_idx] == mask_DOC[b, kv_idx]"),
        (Module(), "score + score_bias[h, score_doc[b, q_idx]]"),
        ((lambda t: lambda b, h, q, kv: t[0][b, q] == t[1][b, kv])([DOC, DOC + 1]),
         "mask_t_0[b, q_idx] == mask_t_1[b, kv_idx]"),
        ((lambda t: lambda b, h, q, kv: t["a"][b, q] == 1)({"a": DOC}), "mask_t_a[b, q_idx] == 1"),
        (lambda b, h, q, kv: (DOC + 1)[b, q] == 1, "mask_tensor[b, q_idx] == 1"),
        ((lambda größe: lambda b, h, q, kv: größe[b, q] == 1)(DOC), "mask_gr_e[b, q_idx] == 1"),
        ((lambda doc: lambda b, h, q, kv: doc[0][q] == doc[0][kv])(DOC),
         "mask_tensor[q_idx] == mask_tensor[kv_idx]"),
        ((lambda doc: lambda b, h, q, kv: doc[-1, q] == doc[torch.tensor(1), kv])(DOC),
         "mask_doc[1, q_idx] == mask_doc[1, kv_idx]"),
        (lambda q_idx: attngen.functions.document(DOC), "document(mask_DOC)"),
    ],
)  # fmt: skip
def test_a_tensor_has_the_name_of_its_variable(function: Callable[..., Any], text: str) -> None:
    """In a closure, an attribute, a global, an argument, a list; what has no variable is called `tensor`."""
    assert attngen.expression(function) == text


def test_two_tensors_of_one_name_are_two_and_one_of_two_names_is_one() -> None:
    """The same memory is one tensor; a name that is taken gets a number."""

    def inner(doc: Any) -> Callable[..., Any]:
        return lambda b, q, kv: doc[b, q] == doc[b, kv]

    first, second, again = inner(DOC), inner(DOC + 1), inner(DOC.view(2, 12))
    written = attngen.expression(
        lambda b, h, q, kv: first(b, q, kv) & second(b, q, kv) & again(b, q, kv) & (b < 1),
        tensors={},
    )
    assert written.bound.keys() == {"mask_doc", "mask_doc_2"} and written.count("mask_doc_2") == 2
    taken = attngen.expression(
        lambda b, h, q_idx, kv_idx, mask_doc: holding(DOC)(b, h, q_idx, kv_idx) & (mask_doc < 3),
        scalars={"mask_doc": "i32"},
    )
    assert taken.bound.keys() == {"mask_doc_2"}


@pytest.mark.parametrize(
    ("dtype", "format"),
    [
        (torch.bool, "bool"), (torch.uint8, "u8"), (torch.int32, "i32"), (torch.float16, "f16"),
        (torch.bfloat16, "bf16"), (torch.float32, "f32"), (torch.int64, "i32"), (torch.int16, "i32"),
        (torch.int8, "i32"), (torch.float64, "f32"),
    ],
)  # fmt: skip
def test_formats_that_the_language_has_not_are_converted(dtype: torch.dtype, format: str) -> None:
    """To one that holds every value; what has a format already is bound itself, so that later writes count."""
    ids = torch.tensor([0, 1, 1], dtype=dtype)
    written = attngen.expression(lambda b, h, q, kv: ids[q] == ids[kv])
    assert written.tensors == {"mask_ids": f"{format}[mask_ids_size0]"}
    bound = written.bound["mask_ids"]
    is_kept = format in ("bool", "u8", "f16", "bf16") or dtype in (torch.int32, torch.float32)
    assert (bound is ids) == is_kept and torch.equal(bound.to(dtype), ids)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.tensor([2**31]), "holds integers beyond 2^31"),
        (torch.tensor([0.1], dtype=torch.float64), "write t.float()"),
        (torch.tensor([1j]), "torch.complex64 of shape (1,), has no format"),
        (torch.eye(3).to_sparse(), "not dense"),
    ],
)
def test_what_no_format_holds_is_named(tensor: torch.Tensor, said: str) -> None:
    """With the variable, its format and its shape."""
    fault = only((lambda t: lambda b, h, q, kv: t[q] == t[kv])(tensor))
    assert fault.rule == "traced-tensors" and said in fault.draw() and "`t`" in fault.message


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda b, h, q, kv: q > DOC, "`DOC`, torch.int32 of shape (2, 12), is used without an index"),
        (lambda b, h, q, kv: DOC, "a tensor, torch.int32 of shape (2, 12), is used"),
        (lambda b, h, q, kv: DOC[b] == DOC[b], "given 1 of as many indices"),
        (lambda b, h, q, kv: torch.dot(DOC[b], DOC[b]) < 3, "no torch.dot"),
        (lambda b, h, q, kv: DOC[b, :] == q, "indexed by slice"),
        (lambda b, h, q, kv: DOC[..., q] == 1, "indexed by ..."),
        (lambda b, h, q, kv: DOC[2, q] == 1, "that dimension has 2"),
        (lambda b, h, q, kv: torch.index_select(DOC, 0, q) == 1, "no torch.index_select"),
        (lambda b, h, q, kv: (DOC[b] == kv).any(-1), "given 1 of as many indices"),
        (lambda b, h, q, kv: q[0] < 3, "no such operation"),
        (lambda b, h, q, kv: DOC[q, kv].__setitem__(0, 1), "no such operation"),
        (lambda b, h, q, kv: DOC.__setitem__(q, 1), "writes to a tensor"),
        (lambda b, h, q, kv: bool(DOC[b]) & (q < 3), "given 1 of as many indices"),
    ],
)
def test_what_a_tensor_cannot_do_is_told_by_its_name(function: Callable[..., Any], said: str) -> None:
    """No error of torch or of Python reaches the user."""
    assert said in only(function).draw()


def test_a_declared_tensor_is_compared_by_its_elements_alone() -> None:
    """`ids == 3` would be false to Python, silently; a negative index counts from an end that is not known."""
    declared = {"tensors": {"ids": "i32[batch, seqlen_k]"}}
    assert only(lambda ids, q_idx: (ids == 3) | (q_idx < 3), **declared).rule == "traced-operands"
    assert "clamped" in only(lambda ids, q_idx: ids[0, -1] < q_idx, **declared).note
    assert attngen.expression(lambda ids, q_idx: ids[0][q_idx] < 3, **declared) == "ids[0, q_idx] < 3"


def test_a_number_is_written_out_as_it_is_now() -> None:
    """A tensor without dimensions is a number."""
    limit = torch.tensor(4)
    assert attngen.expression(lambda b, h, q, kv: q - kv < limit) == "q_idx - kv_idx < 4"


def inputs(keys: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, keys, 2, 32, generator=generator).bfloat16() for _ in range(3))


def test_a_call_passes_what_an_expression_holds() -> None:
    """By attention and by a kernel of a dict; a call may pass another tensor, and another size is no other kernel."""
    mask, q, k, v = attngen.expression(holding(DOC)), *inputs(12)
    bias = torch.tensor([0.5, -2.0])
    score = attngen.expression(lambda score, b, h, q, kv: score + bias[h] * (kv - q))
    declared = {"doc": "i32[batch, seqlen_k]", "bias": "f32[num_heads_q]"}
    texts = "doc[b, q_idx] == doc[b, kv_idx]", "score + bias[h] * (kv_idx - q_idx)"
    want = attngen.attention(q, k, v, *texts, tensors=declared, doc=DOC, bias=bias)
    assert torch.equal(attngen.attention(q, k, v, mask, score), want)
    spec = {"target": "simulator", "problem": {"head_dim": 32}, "mask": mask, "score": score}
    kernel = attngen.compile(spec)
    assert torch.equal(kernel(q, k, v), want)
    other = DOC.flip(1).contiguous()
    want = attngen.attention(q, k, v, *texts, tensors=declared, doc=other, bias=bias)
    assert torch.equal(kernel(q, k, v, mask_doc=other), want) and not torch.equal(kernel(q, k, v), want)
    assert torch.equal(attngen.attention(q, k, v, mask, score, mask_doc=other), want)
    assert attngen.expression(holding(DOC[:, :7])) == mask
    for twin in (copy.copy(mask), pickle.loads(pickle.dumps(mask))):
        assert torch.equal(twin.bound["mask_doc"], DOC)


def test_an_expression_brings_its_declarations_into_a_dict() -> None:
    """As into attention; two that differ are refused."""
    mask = attngen.expression(holding(DOC))
    spec = attngen.load({"problem": {"head_dim": 64}, "mask": mask})
    assert spec.tensors == {"mask_doc": "i32[mask_doc_size0, mask_doc_size1]"}
    with pytest.raises(attngen.ArgumentError, match="as declared before"):
        attngen.load(
            {"problem": {"head_dim": 64}, "mask": mask, "tensors": {"mask_doc": "u8[batch, seqlen_k]"}}
        )


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.int8, torch.int64])
def test_integers_of_every_width_become_i32(dtype: torch.dtype) -> None:
    """torch itself does not order some of them."""
    table = torch.tensor([3, 0, 100]).to(dtype)
    written = attngen.expression(lambda h: table[h] > 2)
    assert written.bound["mask_table"].tolist() == [3, 0, 100]
    assert written.bound["mask_table"].dtype == torch.int32


def test_an_unsigned_integer_beyond_i32_is_refused() -> None:
    """None is wrapped to a negative one."""
    table = torch.tensor([2**31]).to(torch.uint32)
    assert "beyond 2^31" in only(lambda h: table[h] > 2).message


@pytest.mark.parametrize("value", [torch.finfo(torch.float64).max, torch.finfo(torch.float64).min, 1e39])
def test_finite_numbers_that_become_infinite_are_refused(value: float) -> None:
    """The largest of f64 too, which is no other name of inf."""
    table = torch.tensor([value, 0.0], dtype=torch.float64)
    assert "f32 rounds" in only(lambda score, h: score + table[h]).message


def test_infinities_and_nans_of_f64_are_kept() -> None:
    """f32 has them."""
    table = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.5], dtype=torch.float64)
    bound = attngen.expression(lambda score, h: score + table[h]).bound["score_table"]
    assert torch.equal(bound.nan_to_num(7.0), table.float().nan_to_num(7.0))


def test_a_tensor_that_requires_grad_has_its_gradient_wherever_it_was_read() -> None:
    """The tensor itself is bound, unless it must be copied to f32: the copy would take the gradient, and is refused."""
    bias = torch.tensor([0.5, -2.0], requires_grad=True)
    with torch.no_grad():
        score = attngen.expression(lambda score, h: score + bias[h])
    attngen.attention(*inputs(12), score=score).float().sum().backward()
    assert bias.grad is not None and bool(bias.grad.any())
    assert copy.deepcopy(score.bound["score_bias"]).requires_grad
    long = torch.tensor([0.5, -2.0], dtype=torch.float64, requires_grad=True)
    with pytest.raises(attngen.ExpressionError, match=r"requires grad.*\n.*\.float\(\)"), torch.no_grad():
        attngen.expression(lambda score, h: score + long[h])

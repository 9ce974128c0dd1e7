"""torch.func around a call: gradients, and vmap folded into the batch, beside loops of plain calls."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import attngen
from tests.torch_compile.captured import HEAD_DIM, HEADS, inputs

KERNEL = attngen.compile(
    {"target": "simulator", "problem": {"head_dim": HEAD_DIM}, "mask": "causal", "gradients": ["q", "k", "v"]}
)
MAPPED = 3
WAYS: dict[str, Callable[..., Any]] = {
    "kernel": KERNEL,
    "attention": lambda q, k, v: attngen.attention(q, k, v, "causal"),
}


def many(batch: int = 2) -> list[torch.Tensor]:
    """q, k and v with one dimension more in front."""
    return [torch.stack([x * (number + 1) for number in range(MAPPED)]) for x in inputs(9, batch=batch)]


def same(found: Any, right: Any) -> bool:
    return all(torch.equal(x, y) and bool(x.any()) for x, y in zip(found, right, strict=True))


@pytest.fixture(params=WAYS)
def call(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return WAYS[request.param]


def gradients(call: Callable[..., Any], *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """By autograd."""
    leaves = [x.detach().clone().requires_grad_() for x in given]
    return torch.autograd.grad(call(*leaves).float().square().sum(), leaves)


def test_grad_and_vjp_give_the_gradients(call: Callable[..., Any]) -> None:
    def loss(*given: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = call(*given).float().square().sum()
        return made

    given = inputs(9, batch=2)
    right = gradients(call, *given)
    assert same(torch.func.grad(loss, argnums=(0, 1, 2))(*given), right)
    _, pull = torch.func.vjp(loss, *given)
    assert same(pull(torch.ones(())), right)


def test_vmap_folds_into_the_batch(call: Callable[..., Any]) -> None:
    """Whatever dimension is mapped over, and with tensors that all share."""
    q, k, v = many()
    right = torch.stack([call(*each) for each in zip(q, k, v, strict=True)])
    assert torch.equal(torch.func.vmap(call)(q, k, v), right)
    moved = torch.func.vmap(call, in_dims=(4, 1, 2))(q.movedim(0, 4), k.movedim(0, 1), v.movedim(0, 2))
    assert torch.equal(moved, right)
    shared = torch.func.vmap(call, in_dims=(0, None, None))(q, k[0], v[0])
    assert torch.equal(shared, torch.stack([call(each, k[0], v[0]) for each in q]))


def test_vmap_and_grad_nest(call: Callable[..., Any]) -> None:
    """Gradients by sample, and the gradients of a mapped call."""

    def loss(*given: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = call(*given).float().square().sum()
        return made

    given = many()
    one_by_one = (gradients(call, *one) for one in zip(*given, strict=True))
    right = [torch.stack(each) for each in zip(*one_by_one, strict=True)]
    by_sample = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*given)
    of_all = torch.func.grad(lambda *x: torch.func.vmap(loss)(*x).sum(), argnums=(0, 1, 2))(*given)
    assert same(by_sample, right) and same(of_all, right)


def documents(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, doc: torch.Tensor) -> Any:
    mask = "causal and document(doc)"
    return attngen.attention(q, k, v, mask, tensors={"doc": "i32[batch, seqlen_k]"}, doc=doc)


def with_slopes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor) -> Any:
    tensors = {"slopes": "f32[num_heads_q]"}
    return attngen.attention(q, k, v, "causal", "score + alibi(slopes)", tensors=tensors, slopes=slopes)


@pytest.mark.parametrize("dims", [(0, 0, 0, 0), (0, 0, 0, None), (None, None, None, 0)])
def test_what_a_mask_reads_by_sequence_is_folded_too(dims: tuple[int | None, ...]) -> None:
    doc = torch.arange(9, dtype=torch.int32).expand(2, -1) // 4
    given = (*many(), torch.stack([doc, doc // 2, 2 * doc]))
    passed = [x if dim == 0 else x[1] for x, dim in zip(given, dims, strict=True)]
    found = torch.func.vmap(documents, in_dims=dims)(*passed)
    one = [[x[i] if dim == 0 else x for x, dim in zip(passed, dims, strict=True)] for i in range(MAPPED)]
    assert torch.equal(found, torch.stack([documents(*each) for each in one]))


def clamped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> Any:
    return attngen.attention(q, k, v, "seen[b, kv_idx]", tensors={"seen": "bool[rows, seqlen_k]"}, seen=seen)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("is_mapped", [False, True])
def test_a_row_that_all_sequences_share_stays_with_its_sample(is_mapped: bool, rows: int) -> None:
    """b is clamped to the rows of a tensor of any length, which the folded batch must not reach across."""
    seen = (
        torch.arange(MAPPED * rows * 9).reshape(MAPPED, rows, 9) % 4 > torch.arange(MAPPED)[:, None, None] % 2
    )
    q, k, v = many()
    found = torch.func.vmap(clamped, in_dims=(0, 0, 0, 0 if is_mapped else None))(
        q, k, v, seen if is_mapped else seen[0]
    )
    of_each = seen if is_mapped else seen[:1].expand(MAPPED, -1, -1)
    right = torch.stack([clamped(*each) for each in zip(q, k, v, of_each, strict=True)])
    assert torch.equal(found, right)
    with pytest.raises(attngen.ArgumentError, match="argument seen: got 3 rows for b"):
        torch.func.vmap(clamped, in_dims=(0, 0, 0, None))(q, k, v, seen[:, 0])


def test_gradients_of_what_a_score_reads() -> None:
    slopes, given = torch.full((HEADS,), 0.1), inputs(9, batch=2)
    (found,) = (torch.func.grad(lambda x: with_slopes(*given, x).float().square().sum())(slopes),)
    leaf = slopes.clone().requires_grad_()
    (right,) = torch.autograd.grad(with_slopes(*given, leaf).float().square().sum(), leaf)
    assert torch.equal(found, right) and found.any()


ONE = torch.full((HEADS,), 0.1)
REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "forward derivative": (
        lambda q, k, v: torch.func.jvp(lambda x: KERNEL(x, k[0], v[0]), (q[0],), (q[0],)),
        "argument q: .*torch.func.jvp.*no forward derivative",
    ),
    "second derivative": (
        lambda q, k, v: torch.func.grad(
            lambda x: torch.func.grad(lambda y: KERNEL(y, k[0], v[0]).float().square().sum())(x).float().sum()
        )(q[0]),
        "argument create_graph: .*no second derivatives",
    ),
    "a mapped tensor without batch": (
        lambda q, k, v: torch.func.vmap(with_slopes)(q, k, v, ONE.expand(MAPPED, -1)),
        "argument slopes: .*torch.vmap.*batch among its dimensions",
    ),
    "its gradient for each": (
        lambda q, k, v: torch.func.vmap(
            torch.func.grad(lambda x, *given: with_slopes(*given, x).float().sum()), in_dims=(None, 0, 0, 0)
        )(ONE, q, k, v),
        "argument slopes: .*torch.vmap",
    ),
    "the number of a sequence": (
        lambda q, k, v: torch.func.vmap(lambda *x: attngen.attention(*x, "causal", "score * (1.0 + f32(b))"))(
            q, k, v
        ),
        "argument q: .*torch.vmap.*ask for b only",
    ),
    "a tensor that all sequences look into at one place": (
        lambda q, k, v: torch.func.vmap(
            lambda *x: attngen.attention(
                *x,
                "x[0, kv_idx] > 0",
                tensors={"x": "i32[batch, seqlen_k]"},
                x=torch.ones(2, 9, dtype=torch.int32),
            )
        )(q, k, v),
        "argument q: .*torch.vmap.*ask for b only",
    ),
    "memory of the caller's": (
        lambda q, k, v: torch.func.vmap(lambda *x: KERNEL(*x, out=torch.empty_like(q[0])))(q, k, v),
        "argument out: got memory",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_transforms_cannot_have_is_refused_by_name(case: str) -> None:
    run, words = REFUSED[case]
    with pytest.raises(attngen.ArgumentError, match=words):
        run(*many())


def test_ragged_sequences_have_gradients_and_are_not_mapped() -> None:
    """Their tokens are no batch."""
    starts = torch.tensor([0, 4, 9], dtype=torch.int32)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return attngen.varlen_attn(q, k, v, starts, starts, 9, 9)

    given = [x[0] for x in inputs(9)]
    found = torch.func.grad(lambda *x: call(*x).float().square().sum(), argnums=(0, 1, 2))(*given)
    assert same(found, gradients(call, *given))
    with pytest.raises(attngen.ArgumentError, match="torch.vmap, of a kernel of sequences with lengths"):
        torch.func.vmap(call)(*(x[:, 0] for x in many(1)))

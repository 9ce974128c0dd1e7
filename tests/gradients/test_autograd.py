"""What training loops do with torch's autograd around a call: each gives the plain call's gradients, bit for bit."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import attngen


def leaves(*lengths: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, length, 2, 64).bfloat16().requires_grad_() for length in lengths]


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attngen.attention(q, k, v, "causal")


def gradients() -> list[torch.Tensor]:
    q, k, v = leaves(70, 90, 90)
    return list(torch.autograd.grad(attention(q, k, v).float().square().sum(), (q, k, v)))


def test_checkpointing_changes_no_bit() -> None:
    """The forward runs twice, and the second time gives the same lse."""
    q, k, v = leaves(70, 90, 90)
    out = checkpoint(attention, q, k, v, use_reentrant=False)
    found = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    assert all(torch.equal(x, y) for x, y in zip(found, gradients(), strict=True))


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32])
def test_autocast_casts_to_the_type_of_its_context(given: torch.dtype) -> None:
    """As torch's attention does; gradients have the types of what they are gradients of."""
    leaves_given = [x.detach().to(given).requires_grad_() for x in leaves(70, 90, 90)]
    with torch.autocast("cpu", dtype=torch.float16):
        out = attention(*leaves_given)
    found = torch.autograd.grad(out.float().square().sum(), leaves_given)
    right = attention(*(x.half() for x in leaves_given))
    expected = torch.autograd.grad(right.float().square().sum(), leaves_given)
    assert out.dtype == torch.float16 and torch.equal(out, right)
    assert all(torch.equal(x, y) and x.dtype == given for x, y in zip(found, expected, strict=True))


def test_autocast_leaves_alone_what_a_kernel_takes() -> None:
    """A kernel has one type of inputs, to which only others are cast."""
    spec = {"target": "simulator", "problem": {"head_dim": 64}, "mask": "causal"}
    kernel = attngen.compile(spec)
    inputs = [x.detach() for x in leaves(70, 90, 90)]
    with torch.autocast("cpu", dtype=torch.float16):
        assert kernel(*inputs).dtype == torch.bfloat16
        with pytest.raises(attngen.ArgumentError, match="argument q: got dtype torch.float16"):
            kernel(*(x.float() for x in inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = kernel(*(x.float() for x in inputs))
    assert torch.equal(out, kernel(*inputs))


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_one_gradient_alone(wanted: int) -> None:
    """What is wanted has the bits that it has beside the others, and nothing else gets a gradient."""
    inputs = [x if i == wanted else x.detach() for i, x in enumerate(leaves(70, 90, 90))]
    attention(*inputs).float().square().sum().backward()
    grads = [x.grad for x in inputs]
    found = grads[wanted]
    assert found is not None and torch.equal(found, gradients()[wanted])
    assert [x is None for x in grads] == [i != wanted for i in range(3)]


def test_gradients_add_up_over_micro_batches() -> None:
    q, k, v = leaves(70, 90, 90)
    for _ in range(2):
        attention(q, k, v).float().square().sum().backward()
    assert q.grad is not None and torch.equal(q.grad, 2 * gradients()[0])


def test_a_graph_that_is_kept_gives_the_same_bits_again() -> None:
    q, k, v = leaves(70, 90, 90)
    loss = attention(q, k, v).float().square().sum()
    first = torch.autograd.grad(loss, (q, k, v), retain_graph=True)
    again = torch.autograd.grad(loss, (q, k, v))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_an_input_changed_in_place_is_told() -> None:
    """The backward pass reads what the forward pass read, and torch says so if it is gone."""
    q, k, v = leaves(70, 90, 90)
    moved = q * 1
    out = attention(moved, k, v)
    moved.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_an_output_changed_in_place_is_told() -> None:
    q, k, v = leaves(70, 90, 90)
    out = attention(q, k, v)
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_declared_tensor_changed_in_place_is_told() -> None:
    """P is recovered with what masks and scores read, so that this must be what the forward pass read."""
    q, k, v = leaves(70, 90, 90)
    doc = torch.zeros(1, 90, dtype=torch.int32)
    out = attngen.attention(q, k, v, "document(doc)", tensors={"doc": "i32[batch, seqlen_k]"}, doc=doc)
    doc[:, 40:] = 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("whole", [True, False])
def test_the_gradient_of_an_f32_output_is_rounded(whole: bool) -> None:
    """It is multiplied by inputs, and so takes their type; of a sum it is one number in all places."""
    spec = {"problem": {"head_dim": 64}, "precision": {"output": "f32"}, "gradients": ["q", "k", "v"]}
    kernel = attngen.compile({"target": "simulator", "mask": "causal", **spec})
    inputs = leaves(70, 90, 90)
    out, lse = kernel(*inputs, return_lse=True)
    upstream = torch.randn(out.shape) if whole else torch.ones(()).expand(out.shape)
    found = torch.autograd.grad(out, inputs, upstream)
    q, k, v = (x.detach() for x in inputs)
    dout = upstream.bfloat16().contiguous()
    expected = kernel.backward(dout, q, k, v, out.detach(), lse.detach())
    assert out.dtype == torch.float32 and all(x.dtype == torch.bfloat16 for x in found)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))

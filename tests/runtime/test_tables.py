"""Tables of extremes that outlive a call: used as long as the call is theirs, refused otherwise."""

from typing import Any

import pytest
import torch

import attngen
from attngen.errors import ArgumentError

SPEC = {
    "target": "simulator",
    "problem": {"head_dim": 8},
    "precision": {"inputs": "f32"},
    "schedule": {"kind": "fa2"},
    "tile": {"block_m": 4, "block_n": 4},
}
DOCUMENTS = {"mask": "document(doc)", "tensors": {"doc": "i32[batch, seqlen_k]"}}


@pytest.fixture
def kernel() -> attngen.Kernel:
    return attngen.compile(SPEC | DOCUMENTS)


@pytest.fixture
def doc() -> torch.Tensor:
    return (torch.arange(9, dtype=torch.int32) // 3)[None]


def inputs(seqlen: int = 9, heads: int = 2) -> torch.Tensor:
    return torch.randn(1, seqlen, heads, 8, generator=torch.Generator().manual_seed(seqlen))


def test_a_call_may_use_the_tables_of_another(kernel: attngen.Kernel, doc: torch.Tensor) -> None:
    """Other values of q, k and v are no other call."""
    tables = kernel.tables(*[inputs()] * 3, doc=doc)
    q = inputs() + 1
    assert torch.equal(kernel(q, q, q, doc=doc, tables=tables), kernel(q, q, q, doc=doc))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda doc: doc.clone(), "address"),
        (lambda doc: doc.add_(1), "version"),
        (lambda doc: doc.expand(1, 9).as_strided((1, 9), (18, 1)), "strides"),
    ],
)
def test_tables_of_another_tensor_are_refused(
    kernel: attngen.Kernel, doc: torch.Tensor, change: Any, words: str
) -> None:
    """A tensor elsewhere, laid out otherwise, or written to since."""
    q = inputs()
    tables = kernel.tables(q, q, q, doc=doc)
    with pytest.raises(ArgumentError, match=f"tables.*doc.*{words}"):
        kernel(q, q, q, doc=change(doc), tables=tables)


def test_tables_of_other_sizes_are_refused(kernel: attngen.Kernel, doc: torch.Tensor) -> None:
    """The number of heads is part of a call, even where the mask does not ask for it."""
    tables = kernel.tables(*[inputs()] * 3, doc=doc)
    q = inputs(heads=4)
    with pytest.raises(ArgumentError, match="num_heads_q 2.*num_heads_q 4"):
        kernel(q, q, q, doc=doc, tables=tables)


def test_tables_of_another_kernel_and_no_tables_are_refused(
    kernel: attngen.Kernel, doc: torch.Tensor
) -> None:
    """Another grid of tiles is another kernel."""
    q = inputs()
    other = attngen.compile(SPEC | DOCUMENTS | {"tile": {"block_m": 2, "block_n": 4}})
    for wrong in (other.tables(q, q, q, doc=doc), 3):
        with pytest.raises(ArgumentError, match="argument tables"):
            kernel(q, q, q, doc=doc, tables=wrong)


def test_a_mask_that_reads_no_tables_has_none() -> None:
    """There is nothing to make, and the error says of which mask."""
    q = inputs()
    with pytest.raises(ArgumentError, match="causal"):
        attngen.compile(SPEC | {"mask": "causal"}).tables(q, q, q)

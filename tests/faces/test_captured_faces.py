"""torch.compile captures the faces whole: no graph break, the bits of eager calls, gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention as attend

from attngen import flash_attn, sdpa, xformers
from attngen.flash_attn import version3, version4
from tests.faces.attention64 import draw

STARTS = torch.tensor([0, 4, 9], dtype=torch.int32)
CALLS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]] = {
    "flash_attn 2": lambda q, k, v: flash_attn.flash_attn_func(
        q, k, v, causal=True, window_size=(4, -1), softcap=3.0
    ),
    "ragged": lambda q, k, v: version3.flash_attn_varlen_func(
        q[0], k[0, :9], v[0, :9], STARTS, STARTS, 5, 5, causal=True, return_attn_probs=True
    )[0],
    "flash_attn 4": lambda q, k, v: version4.flash_attn_func(q, k, v, window_size=(None, 2), return_lse=True)[
        0
    ],
    "xformers": lambda q, k, v: xformers.memory_efficient_attention(q, k, v, xformers.LowerTriangularMask()),
    "sdpa": lambda q, k, v: attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True),
}


def test_lengths_vary_within_a_graph() -> None:
    """Five lengths compile two frames, under the override of torch's own function."""
    torch._dynamo.reset()
    counted = CompileCounterWithBackend("aot_eager")
    captured = torch.compile(CALLS["sdpa"], fullgraph=True, backend=counted)
    with sdpa.enabled(devices="cpu", strict=True):
        for length in (9, 12, 15, 17, 20):
            rows = draw(*((1, length, 4, 32),) * 3)
            assert torch.equal(captured(*rows), CALLS["sdpa"](*rows))
    assert counted.frame_count == 2


@pytest.mark.parametrize("call", CALLS)
def test_calls_are_captured(call: str) -> None:
    """Under fullgraph, with the backward pass; the override of torch's own function is strict meanwhile."""
    function = CALLS[call]
    torch._dynamo.reset()
    given = [x.requires_grad_() for x in draw((1, 9, 4, 32), (1, 13, 4, 32), (1, 13, 4, 32))]
    with sdpa.enabled(devices="cpu", strict=True):
        eager, captured = (
            function(*given),
            torch.compile(function, fullgraph=True, backend="aot_eager")(*given),
        )
    assert torch.equal(eager, captured) and eager.any()
    found, expected = (torch.autograd.grad(out.sum(), given) for out in (captured, eager))
    assert all(torch.equal(x, y) and y.any() for x, y in zip(found, expected, strict=True))

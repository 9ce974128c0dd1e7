"""Inputs that quantisation finds hard, and what is the same of two results."""

import torch

from attngen.check.inputs import Shape
from attngen.quantize import Operands


def outlying_inputs(
    shape: Shape, head_dims: tuple[int, int], dtype: torch.dtype, layout: str = "bshd", seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v on the CPU: rows of different sizes, zeros, tiny numbers, infinities, NaN; with room between rows."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for seqlen, heads, dim in (
        (shape.seqlen_q, shape.heads, head_dims[0]),
        (shape.seqlen_k, shape.heads_kv, head_dims[0]),
        (shape.seqlen_k, shape.heads_kv, head_dims[1]),
    ):
        x = torch.randn(shape.batch, seqlen, heads, dim, generator=generator)
        x *= torch.exp2(torch.randint(-6, 7, (shape.batch, seqlen, heads, 1), generator=generator))
        if heads > 1:
            x[:, :, 0] = 0
            x[:, :, 1] *= 1e-7  # subnormal in f16
        if seqlen > 4:
            x[-1, 1, -1, 3], x[-1, 2, -1, 5], x[-1, 3, -1, 7] = float("inf"), float("-inf"), float("nan")
        roomy = torch.full((shape.batch, seqlen, heads, dim + 16), 1e4, dtype=dtype)
        roomy = roomy if layout == "bshd" else roomy.transpose(1, 2).contiguous().transpose(1, 2)
        roomy[..., :dim] = x.to(dtype)
        made.append(roomy[..., :dim] if layout == "bshd" else roomy[..., :dim].transpose(1, 2))
    return made[0], made[1], made[2]


def assert_same(found: Operands, expected: Operands) -> None:
    """The same bytes, shapes and descales, bit by bit."""
    for name in ("q", "k", "v", "q_descale", "k_descale", "v_descale"):
        a, b = (getattr(operands, name).cpu() for operands in (found, expected))
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        a, b = (x.contiguous().view(torch.uint8 if x.itemsize == 1 else torch.int32) for x in (a, b))
        different = (a != b).nonzero()
        assert not len(different), (
            f"{name}: {len(different)} of {a.numel()} differ, first at {different[0].tolist()}"
        )
    for field in ("scales", "hadamard"):
        assert getattr(found, field) == getattr(expected, field), field

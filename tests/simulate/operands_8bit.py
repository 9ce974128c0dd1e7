"""Operands of small e4m3 plans: any values, with any scales that the plan's places take."""

from typing import Any

import torch

from attngen.check.inputs import Shape
from attngen.plan import Descales, KernelPlan
from attngen.quantize import Operands, pack_values


def descales_of(operands: Operands) -> dict[str, torch.Tensor]:
    """Descales by the names that calls pass them by."""
    return {name: getattr(operands, name) for name in ("q_descale", "k_descale", "v_descale")}


def drawn_call(plan: KernelPlan, shape: Shape, generator: torch.Generator) -> dict[str, Any]:
    """Arguments of `simulate`; every granule has a scale of its own, between 1/2 and 2."""

    def values(seqlen: int, heads: int, cols: int) -> torch.Tensor:
        return (2 * torch.randn(shape.batch, seqlen, heads, cols, generator=generator)).to(
            torch.float8_e4m3fn
        )

    def scale(of: Descales) -> torch.Tensor:
        heads = shape.heads if of.heads == "q" else shape.heads_kv
        rows = shape.seqlen_q if of.axis == "queries" else shape.seqlen_k
        granules = () if of.granule is None else (-(-rows // of.granule),)
        return torch.exp2(2 * torch.rand(shape.batch, heads, *granules, generator=generator) - 1)

    return {
        "q": values(shape.seqlen_q, shape.heads, plan.head_dim_qk),
        "k": values(shape.seqlen_k, shape.heads_kv, plan.head_dim_qk),
        "v": pack_values(values(shape.seqlen_k, shape.heads_kv, plan.head_dim_v)),
        "descales": {of.name: scale(of) for of in plan.scales},
    }

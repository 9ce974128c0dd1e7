"""Inputs for a kernel of any spec, and the verdict on what it made of them: for whoever calls kernels to try them.

A kernel of e4m3 inputs is called with 16-bit tensors, as `draw` has them, or with operands. `judge` holds it to the
reference on what the operands stand for (they say exactly what the kernel reads; where Q and K have been multiplied by
the Hadamard matrix they stay in that basis, which leaves their products as they are) and, where it was given the 16-bit
tensors, to the reference on these. Nothing here runs a kernel.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from attngen.check.accuracy import Accuracy, compare
from attngen.check.accuracy_terms import score_unit_of
from attngen.check.caches import CACHE_TYPE, PROBABILITIES, real_cache
from attngen.check.gradients import GradientAccuracy, compare_gradients
from attngen.check.inputs import Kind, MemoryLayout, Shape, random_inputs
from attngen.check.judging_sequences import compare_gradients_of_sequences, compare_sequences
from attngen.check.problem import Layout
from attngen.check.reference import Roundings
from attngen.dtypes import BF16, E4M3, DType, torch_dtype
from attngen.errors import ArgumentError
from attngen.expr import Expr
from attngen.plan import KernelPlan, Lengths
from attngen.quantize import KEY_BLOCK, P_LIFT, Operands, dequantize, quantize
from attngen.spec import INPUTS, Spec
from attngen.torch_state import torch_defaults

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def call_dtype(inputs: DType) -> torch.dtype:
    """What a call passes q, k and v in: the kernel's input type, or bf16, which a kernel of e4m3 inputs quantises."""
    return torch_dtype(BF16 if inputs is E4M3 else inputs)


def draw(
    plan: KernelPlan,
    shape: Shape,
    device: torch.device | str = "cpu",
    seed: int = 0,
    layout: MemoryLayout = "contiguous",
    kind: Kind = "randn",
) -> Inputs:
    """Random q, k and v that the plan's kernel takes; arguments as of `random_inputs`."""
    number, cache = call_dtype(plan.inputs), CACHE_TYPE if plan.descales else None
    return random_inputs(shape, plan.head_dim_qk, plan.head_dim_v, number, device, seed, layout, kind, cache)


def quantized(plan: KernelPlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Operands:
    """What a kernel of e4m3 inputs makes of 16-bit tensors (batch, seqlen, heads, head_dim), by the reference."""
    assert plan.quantizer is not None
    return quantize(q, k, v, plan.quantizer.scales, plan.quantizer.hadamard_seed)


@torch_defaults()
def judge(
    spec: Spec,
    plan: KernelPlan,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    q: torch.Tensor | Operands,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    layout: Layout = "bshd",
    *,
    declared: Mapping[str, Any] | None = None,
    rows: Sequence[int] | None = None,
    by_gpu: bool | None = None,
) -> Accuracy:
    """Hold what a call returned to the rule of `attngen.check.accuracy`.

    Args:
        spec: of the kernel.
        plan: what it was lowered to.
        out: (batch, seqlen_q, num_heads_q, head_dim_v), as the call returned it; like lse.
        lse: see out; None where the call returned none.
        q: what the call was given, as k and v: tensors of `call_dtype`, f16 too for e4m3 inputs, or operands.
        k: see q.
        v: see q.
        softmax_scale: of the call.
        layout: of the call.
        declared: what the call passed by name: for what the spec declares, and lengths of sequences.
        rows: as of `compare`; of dense calls alone.
        by_gpu: whether a GPU made out, whose tensor core sums 8-bit products in fewer bits; where out is, if None.

    Raises:
        ArgumentError: out or lse has not the shape that q and v ask for.
    """
    about: dict[str, Any] = {"rows": rows, "score": spec.score_expr, "declared": declared}
    mask, lengths = spec.mask_expr, plan.lengths
    p_dtype = None
    if plan.descales:
        assert k is not None and v is not None and declared is not None  # as the call had them
        lengths, k, v, declared = real_cache(spec, k, v, declared, layout)
        about["declared"], p_dtype = declared, PROBABILITIES
    if not plan.lengths.are_dense:
        if rows is not None:
            raise ArgumentError("rows", "some of the rows", "None where sequences have lengths of their own")
        inputs_of_call: Any = (q, k, v)
        options: dict[str, Any] = {"softmax_scale": softmax_scale, "score": spec.score_expr}
        options |= {"block_n": plan.block_n, "p_dtype": p_dtype}
        return compare_sequences(
            lengths, out, lse, inputs_of_call, declared or {}, layout, mask=mask, **options
        )
    if plan.quantizer is None:
        about |= {"block_n": plan.block_n, "p_dtype": p_dtype}
        return compare(out, lse, q, k, v, mask, softmax_scale, layout, **about)  # type: ignore[arg-type] # tensors, as the call took them
    by_gpu = out.is_cuda if by_gpu is None else by_gpu
    inputs = None
    if isinstance(q, Operands):
        operands = q
    else:
        assert k is not None and v is not None  # as the call had them
        inputs = (q, k, v)
        operands = quantized(plan, *(x if layout == "bshd" else x.transpose(1, 2) for x in inputs))
    return compare_operands(out, lse, operands, mask, softmax_scale, layout, inputs, by_gpu, **about)


def judge_gradients(
    spec: Spec,
    gradients: Iterable[torch.Tensor],
    inputs: Inputs,
    dout: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    layout: Layout = "bshd",
    *,
    declared: Mapping[str, Any] | None = None,
) -> GradientAccuracy:
    """Hold what a backward pass returned to the rule of `attngen.check.gradients`.

    Args:
        spec: of the kernel.
        gradients: dq, dk, dv and those of what the spec declares, as the pass returned them.
        inputs: q, k and v, as the call took them.
        dout: the gradient of out that the pass took, like out, lse, dlse, softmax_scale, layout and declared.
        out: what the forward call returned, like lse; `judge` holds both to their own rule.
        lse: see out.
        dlse: see dout.
        softmax_scale: see dout.
        layout: see dout.
        declared: see dout.

    Raises:
        ArgumentError: a gradient has not the shape of its input.
    """
    mask, score = spec.mask_expr, spec.score_expr
    lengths = Lengths(spec.problem.queries, spec.problem.keys)
    if not lengths.are_dense:
        forward: dict[str, Any] = {"out": out, "lse": lse, "dlse": dlse}
        options: dict[str, Any] = {"mask": mask, "softmax_scale": softmax_scale, "score": score}
        options["wanted"] = spec.gradients[len(INPUTS) :]
        return compare_gradients_of_sequences(
            lengths, gradients, inputs, dout, declared or {}, layout, **forward, **options
        )
    about: dict[str, Any] = {"out": out, "lse": lse, "dlse": dlse, "declared": declared}
    about["wanted"] = spec.gradients[len(INPUTS) :]
    return compare_gradients(gradients, *inputs, dout, mask, softmax_scale, layout, score=score, **about)


@torch_defaults()
def compare_operands(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    operands: Operands,
    mask: Expr | None = None,
    softmax_scale: float | None = None,
    layout: Layout = "bshd",
    inputs: Inputs | None = None,
    by_gpu: bool | None = None,
    **about: Any,
) -> Accuracy:
    """Hold an output against the reference on the e4m3 operands that the kernel read.

    Args:
        out: as of `judge`.
        lse: as of `judge`.
        operands: what the kernel read.
        mask: as of `compare`.
        softmax_scale: as of `compare`.
        layout: of out and inputs.
        inputs: what the operands were made of, where that is to be held against the reference too.
        by_gpu: as of `judge`.
        **about: rows, score and declared, as of `compare`.
    """
    q, k, v = (x if layout == "bshd" else x.transpose(1, 2) for x in dequantize(operands))
    by_gpu = out.is_cuda if by_gpu is None else by_gpu
    roundings = roundings_of(operands, score_unit_of(operands.q.shape[-1]) if by_gpu else 0.0)
    return compare(
        out, lse, q, k, v, mask, softmax_scale, layout, roundings=roundings, inputs=inputs, **about
    )


@torch_defaults()
def roundings_of(operands: Operands, score_unit: float = 0.0) -> Roundings:
    """Where kernels that read these operands round: P takes V's descale of its key, relative to the head's largest."""
    descale = operands.v_descale
    if descale.dim() == 2:
        weight = torch.ones_like(descale)[..., None].expand(-1, -1, operands.seqlen_k)
    else:
        of_keys = descale.repeat_interleave(KEY_BLOCK, 2)[..., : operands.seqlen_k]
        weight = of_keys / of_keys.amax(-1, keepdim=True) if operands.seqlen_k else of_keys
    return Roundings(torch.float8_e4m3fn, P_LIFT, weight, score_unit)

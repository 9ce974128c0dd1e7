"""A call inside torch.func: gradients of it, and vmap, which folds what it maps over into the batch.

Neither second derivatives nor forward-mode ones are there, and both are refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, NoReturn

import torch

from attngen.autograd import refuse_second_derivatives, to_declared
from attngen.capture import Packed, capture_gradients
from attngen.errors import ArgumentError
from attngen.expr import Expr, name, nodes

_BATCH = name("b")
_ROWS = ("dout", "dlse", "q", "k", "v", "out", "lse")
"""Tensors whose first dimension is the batch."""


@dataclass(frozen=True)
class TransformedCall:
    """All of a call but its tensors.

    Attributes:
        kernel: an `attngen.Kernel`.
        packed: everything besides q, k and v; tensors are passed apart.
    """

    kernel: Any
    packed: Packed

    @property
    def names(self) -> tuple[str, ...]:
        """Those of the tensors, in order."""
        return self.packed.names


class Transformed(torch.autograd.Function):
    """Out and lse of a call; autograd outside of torch.func takes `attngen.autograd.Attention`, which costs less."""

    @staticmethod
    def forward(call: TransformedCall, *tensors: torch.Tensor) -> Any:
        """Call the kernel on q, k, v and the tensors of the call."""
        q, k, v, *others = tensors
        packed = call.packed._replace(tensors=others)
        return torch.ops.attngen.attention_with_lse.default(q, k, v, call.kernel.text, *packed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep what the backward pass takes."""
        ctx.call = inputs[0]
        ctx.save_for_backward(*output, *inputs[1:])

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor, dlse: torch.Tensor) -> Any:
        """The gradients of what requires one."""
        call, kernel = ctx.call, ctx.call.kernel
        out, lse, q, k, v, *others = ctx.saved_tensors
        named = dict(zip(("q", "k", "v", *call.names), (q, k, v, *others), strict=True))
        needs = dict(zip(named, ctx.needs_input_grad[1:], strict=True))
        needed = tuple(needs.get(each, False) for each in kernel.gradients)
        given = (dout, dlse, q, k, v, out, lse, *others)
        made = TransformedGradients.apply(call, needed, *given)  # type: ignore[no-untyped-call]
        found = dict(zip(compress(kernel.gradients, needed), made, strict=True))
        return None, *(to_declared(found.get(each), x) for each, x in named.items())

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        """Refuse: see `refuse_forward_derivatives`."""
        refuse_forward_derivatives()

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], call: TransformedCall, *tensors: torch.Tensor
    ) -> Any:
        """Call the kernel once, on a larger batch."""
        folding = Folding(call.kernel, info.batch_size)
        folded = folding.fold_all(("q", "k", "v", *call.names), in_dims[1:], tensors)
        made = Transformed.apply(call, *folded)  # type: ignore[no-untyped-call]
        return tuple(folding.unfold(x, 0) for x in made), (0, 0)


class TransformedGradients(torch.autograd.Function):
    """The gradients of a call that are needed, which have none themselves."""

    @staticmethod
    def forward(call: TransformedCall, needed: tuple[bool, ...], *tensors: torch.Tensor) -> Any:
        """Run the backward pass on dout, dlse, q, k, v, out, lse and the tensors of the call."""
        dout, dlse, q, k, v, out, lse, *others = tensors
        packed = call.packed._replace(tensors=others)
        return tuple(capture_gradients(call.kernel.text, needed, dout, dlse, q, k, v, out, lse, packed))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> NoReturn:
        """Refuse: see `refuse_second_derivatives`."""
        refuse_second_derivatives()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        """Refuse: see `refuse_forward_derivatives`."""
        refuse_forward_derivatives()

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        call: TransformedCall,
        needed: tuple[bool, ...],
        *tensors: torch.Tensor,
    ) -> Any:
        """Run the backward pass once, on a larger batch.

        Raises:
            ArgumentError: a gradient is needed of something that all share; the kernels would add up those of all.
        """
        folding = Folding(call.kernel, info.batch_size)
        axes = [
            folding.axis_of(each)
            for each, wanted in zip(call.kernel.gradients, needed, strict=True)
            if wanted
        ]
        if None in axes:
            shared = [each for each in call.kernel.gradients if folding.axis_of(each) is None]
            raise ArgumentError(
                shared[0],
                "a tensor without a batch whose gradient is wanted inside torch.vmap",
                "one with a batch dimension, or one that requires no grad there",
                "call it outside: a kernel takes whole batches",
            )
        folded = folding.fold_all((*_ROWS, *call.names), in_dims[2:], tensors)
        made = TransformedGradients.apply(call, needed, *folded)  # type: ignore[no-untyped-call]
        return tuple(map(folding.unfold, made, axes)), tuple(axes)  # type: ignore[arg-type]


def refuse_forward_derivatives() -> NoReturn:
    """Say that there is no forward derivative.

    Raises:
        ArgumentError: always.
    """
    must = "one whose derivative nobody asks for: there is no forward derivative yet"
    raise ArgumentError("q", "a tensor inside torch.func.jvp", must, "call it outside of the transform")


class Folding:
    """How what torch.vmap maps over becomes part of the batch, ahead of it.

    Args:
        kernel: an `attngen.Kernel`.
        size: what it maps over.

    Raises:
        ArgumentError: the kernel's sequences have lengths of their own, its calls pass blocks, or its text asks for
            the number of a sequence for more than to look into a tensor.
    """

    def __init__(self, kernel: Any, size: int) -> None:
        self._size = size
        if not kernel.manifest.lengths.are_dense or kernel.spec.blocks is not None:
            what = "blocks" if kernel.spec.blocks is not None else "sequences with lengths of their own"
            must = "sequences of one length, and a mask without given blocks"
            raise ArgumentError("q", f"a tensor inside torch.vmap, of a kernel of {what}", must, _OUTSIDE)
        self._axes = _batch_axes(kernel.spec)
        declared = kernel.spec.declarations.tensors
        self._clamped = {each for each, axis in self._axes.items() if declared[each].dims[axis] != "batch"}

    def axis_of(self, name: str) -> int | None:
        """Which dimension of a tensor is the batch; None of one that has none."""
        return 0 if name in _ROWS else self._axes.get(name)

    def fold_all(
        self, names: Sequence[str], dims: Sequence[int | None], tensors: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Tensors with a larger batch each, but for those that have none; q is among them.

        Raises:
            ArgumentError: one that has none is mapped over, or has another than q.
        """
        place = names.index("q")
        batch = tensors[place].movedim(dims[place] or 0, 0).shape[0 if dims[place] is None else 1]
        return [self._fold(*each, batch) for each in zip(names, tensors, dims, strict=True)]

    def _fold(self, name: str, x: torch.Tensor, dim: int | None, batch: int) -> torch.Tensor:
        axis = self.axis_of(name)
        if axis is None:
            if dim is None:
                return x
            must = "one that has the batch among its dimensions, into which vmap is folded"
            raise ArgumentError(name, "a tensor inside torch.vmap", must, _OUTSIDE)
        if dim is None:
            x = x.unsqueeze(axis).expand(*x.shape[:axis], self._size, *x.shape[axis:])
        else:
            x = x.movedim(dim, axis)
        if name in self._clamped and x.shape[axis + 1] != batch:
            # Its last row is that of all sequences behind it, and would be that of the next sample's.
            if x.shape[axis + 1] != 1:
                must = f"{batch}, as q has, or 1"
                raise ArgumentError(name, f"{x.shape[axis + 1]} rows for b inside torch.vmap", must, _OUTSIDE)
            x = x.expand(*x.shape[: axis + 1], batch, *x.shape[axis + 2 :])
        folded = x.flatten(axis, axis + 1)
        return folded.contiguous() if folded.stride(-1) != 1 and name in _ROWS else folded

    def unfold(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """A result with what was mapped over as a dimension of its own again."""
        return x.reshape(*x.shape[:axis], self._size, x.shape[axis] // self._size, *x.shape[axis + 1 :])


_OUTSIDE = "call it outside: a kernel takes whole batches, (batch, seqlen, heads, head_dim)"


def _batch_axes(spec: Any) -> Mapping[str, int]:
    """Which dimension of each declared tensor the number of a sequence chooses from."""
    axes = {
        each.name: each.dims.index("batch")
        for each in spec.declarations.tensors.values()
        if "batch" in each.dims
    }
    read = nodes(spec.mask_expr, spec.score_expr)
    lookups = [each for each in read if each.op == "lookup"]
    axes |= {each.name: each.args.index(_BATCH) for each in lookups if _BATCH in each.args}
    if any(_reads_number(each, axes) for each in read):
        must = "a mask and a score that ask for b only to look into tensors, each at one place"
        raise ArgumentError("q", "a tensor inside torch.vmap", must, _OUTSIDE)
    return axes


def _reads_number(expr: Expr, axes: Mapping[str, int]) -> bool:
    """Whether a node asks which sequence this is but to look into a tensor at its batch, or looks there by another."""
    axis = axes.get(expr.name) if expr.op == "lookup" else None
    places = {place for place, each in enumerate(expr.args) if each is _BATCH}
    return places != (set() if axis is None else {axis})

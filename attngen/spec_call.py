"""A spec, lowered and built: what its calls pass, and what is worked out of that before they are made."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from attngen.bind import (
    BLOCKS,
    TileTables,
    check_arguments,
    check_length,
    check_lengths,
    check_pages,
    check_rows_of_heads,
    check_sorted,
    declared_by,
    operands_of,
    q_types,
    sequence_sizes,
    spread_blocks,
    spread_operands,
)
from attngen.built_call import BuiltCall
from attngen.capture import not_captured
from attngen.errors import ArgumentError
from attngen.expr import SINK
from attngen.kernels_by_text import LIVE, text_of
from attngen.plan import (
    BLOCK_MAP,
    OPERANDS,
    PAGES_BY_ROW,
    PAGES_OF_HEADS,
    Call,
    KernelPlan,
    gradient_value,
    sink_gradient,
    why_by_row,
)
from attngen.quantize import Operands
from attngen.runtime import LaunchReport, explain_launch
from attngen.spec import INPUTS, Spec

GRADIENTS = ("dq", "dk", "dv")
"""Of the inputs; values of what a spec declares follow, in the order in which it names them."""


class SpecCall(BuiltCall):
    """The call of a spec, lowered for one arch; `Kernel` is what makes it.

    Attributes:
        spec: what was asked for.
        bound: tensors of the spec's expressions, which a call passes by itself where it is given no others.
        text: what names it in torch's graphs; another process makes it again from that.
        gradients: of what a call has them, by name.
        dtypes: what Q may be of.
    """

    def __init__(
        self,
        spec: Spec,
        call: Call,
        lineinfo: bool = False,
        source: str | None = None,
        bound: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__(call, lineinfo, source)
        self.spec = spec
        self.bound = bound or {}
        self.gradients = spec.gradients if call.gradients else ()
        self.dtypes = q_types(self.manifest)
        self.text = text_of(spec, call.arch.name, self.plan.name, source)
        LIVE.setdefault(self.text, self)

    def __repr__(self) -> str:
        return f"<attngen.Kernel {self.plan.name}>"

    @cached_property
    def declared_gradients(self) -> tuple[str, ...]:
        """What the spec declares and wants gradients of, in order."""
        return self.spec.gradients[len(INPUTS) :]

    def gradients_of(self, passed: Mapping[str, Any]) -> tuple[str, ...]:
        """The values that a backward pass returns, in order, of a call that passes these by name; none without it."""
        if not self.declared_gradients:
            return GRADIENTS if self.call.gradients else ()
        dtypes = {value.argument: value.dtype for value in declared_by(self.manifest, passed)}
        of_declared = (
            sink_gradient(dtypes[SINK]) if name == SINK else gradient_value(name)
            for name in self.declared_gradients
        )
        return (*GRADIENTS, *of_declared) if self.call.gradients else ()

    @property
    def takes_operands(self) -> bool:
        """Whether inputs are e4m3, which calls may quantise."""
        return self.manifest.scales is not None

    def serving(self, k: torch.Tensor, layout: str = "bshd") -> KernelPlan:
        """Which attention kernel takes a call with this K; of keys in pages, one without `leftpad_k`.

        Raises:
            ArgumentError: k or layout is not what a call may pass.
        """
        if self.manifest.lengths.is_paged("keys"):
            rows = k.shape[-2 if layout == "hnd" else -3] if k.dim() == len(PAGES_OF_HEADS) else 1
            return self.call.serving({PAGES_BY_ROW: int(bool(why_by_row(rows, skips_keys=False)))})
        if self.manifest.lengths.is_by_token("keys"):
            return self.call.serving({"seqlen_k": k.shape[0]})
        return self.call.serving({"seqlen_k": check_length(k, layout)})

    def _with_blocks(self, declared: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a call passes by name, with lists of kept blocks each by its own; a mask without pairs asks for none."""
        sizes = self.spec.blocks
        if sizes is None or BLOCKS not in declared:
            return declared
        if BLOCK_MAP not in self.manifest.value_of:
            return {name: value for name, value in declared.items() if name != BLOCKS}
        return spread_blocks(declared, sizes.block_m, sizes.block_n)

    def _begin(
        self, q: Any, k: Any, v: Any, layout: str, declared: Mapping[str, Any]
    ) -> tuple[Any, Any, Any, Mapping[str, Any], str | None]:
        """What the call is given: q, k and v, everything by name, and the intake where q does not tell."""
        declared = {**self.bound, **declared} if self.bound else declared
        if not isinstance(q, Operands):
            return q, k, v, declared, None
        return spread_operands(self.manifest, q, k, v, layout, declared)

    @not_captured
    def tables(
        self,
        q: torch.Tensor | Operands,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        layout: str = "bshd",
        **declared: Any,
    ) -> TileTables:
        """What a mask wants to know of declared tensors, by tile or by row: worked out once for many calls.

        Calls may pass it as long as their sizes are these, and the tensors and their values too; a tensor that was
        written to in between is refused. Arguments are those of a call; e4m3 kernels quantise 16-bit tensors for it, so
        pass them operands.

        Raises:
            ArgumentError: an argument the kernel cannot take, or the kernel reads no tables.
        """
        if not self.plan.table_values:
            raise ArgumentError(
                "self", f"the mask {self.plan.mask_text}", "a mask that reads tensors by pair"
            )
        q, k, v, named, intake = self._begin(q, k, v, layout, self._with_blocks(declared))
        with torch.no_grad():
            return self._machine(q).tables(q, k, v, layout, named, intake)  # type: ignore[arg-type]

    @not_captured
    def work(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: str = "bshd",
        out: TileTables | None = None,
        **declared: Any,
    ) -> TileTables:
        """The list of tiles of a call whose sequences have lengths of their own, for many calls: one small launch.

        Calls may pass it as long as their sizes are these, and the tensors that say lengths and their values too, as
        the layers of a model do. It can be captured, and is then made anew by every replay. Other arguments are those
        of a call.

        Args:
            q: see a call.
            k: likewise.
            v: likewise.
            layout: likewise.
            out: an earlier list of calls of these sizes, which is made anew where it lies: what holds it, as bound
                calls do, follows.
            **declared: see a call.

        Raises:
            ArgumentError: an argument the kernel cannot take, or sequences are all of one length.
        """
        if self.manifest.lengths.are_dense:
            must = (
                "one of problem: {queries: ragged, keys: ragged}, whose sequences have lengths of their own"
            )
            raise ArgumentError("self", "a kernel of sequences of one length", must)
        if out is not None and not isinstance(out, TileTables):
            raise ArgumentError("out", type(out).__name__, "what kernel.work(...) made")
        named = {**self.bound, **self._with_blocks(declared)}
        with torch.no_grad():
            return self._machine(q).tables(q, k, v, layout, named, out=out)

    @not_captured
    def verify(
        self,
        q: torch.Tensor | Operands,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        layout: str = "bshd",
        **declared: Any,
    ) -> None:
        """Read the values that a call with these arguments trusts; the host waits for the device.

        Raises:
            ArgumentError: an argument that the kernel cannot take, lengths that the tensors have not, a page that a
                request needs and no cache has, or a tensor that the spec declares sorted and whose values fall: where,
                and from which value to which.
        """
        q, k, v, named, intake = self._begin(q, k, v, layout, self._with_blocks(declared))
        with torch.no_grad():
            given = check_arguments(self.manifest, q, k, v, layout=layout, declared=named, intake=intake)  # type: ignore[arg-type]
        check_lengths(self.manifest, given.sizes, given.tensors)
        if self.manifest.lengths.is_paged("keys"):
            check_pages(given.sizes, given.tensors)
        for tensor in self.spec.declarations.tensors.values():
            if tensor.is_sorted:
                starts = given.tensors.get(f"cu_seqlens_{str(tensor.dims[-1])[-1]}")
                check_sorted(tensor, given.declared[tensor.name], starts)

    @not_captured
    def quantize(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str = "bshd") -> Operands:
        """The e4m3 operands of a call, to pass to calls in the place of q, k and v.

        Args:
            q: (batch, seqlen_q, num_heads_q, head_dim_qk), bf16 or f16, last dimension contiguous, rows on 16 bytes.
            k: (batch, seqlen_k, num_heads_kv, head_dim_qk), of the same type.
            v: (batch, seqlen_k, num_heads_kv, head_dim_v), of the same type.
            layout: "bhsd" exchanges seqlen and heads; the operands are the same.

        Raises:
            ArgumentError: the kernel's inputs are not e4m3, or an argument is not what it takes.
        """
        if not self.takes_operands:
            raise ArgumentError("self", f"a kernel of {self.plan.inputs.name} inputs", "one of e4m3 inputs")
        return operands_of(self.manifest, self._machine(q).make(OPERANDS, q, k, v, layout=layout))

    def explain_launch(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str = "bshd", **declared: Any
    ) -> tuple[LaunchReport, ...]:
        """What a call on these tensors (of any device, meta too) would launch, what quantises them too.

        What says lengths is passed as of a call; all else that a call passes by name may be left out.
        """
        given = check_rows_of_heads(self.manifest, q, k, v, layout=layout)
        if not self.manifest.lengths.are_dense:
            given.sizes.update(sequence_sizes(self.manifest, given.sizes, declared))
        return explain_launch(self.manifest, given)

"""A spec, lowered and built: its calls, forward and backward."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from attngen.autograd import Attention, is_differentiated
from attngen.bind import (
    BLOCKS,
    TileTables,
    check_differentiable,
    check_kept,
    check_length,
    check_no_derivative,
    check_no_tangent,
    check_not_recorded,
    check_plain,
    check_writable,
    gradient_memory,
)
from attngen.bound_call import BoundCall
from attngen.capture import (
    capture,
    capture_gradients,
    cast,
    check_captured,
    check_gradients,
    not_captured,
    pack,
)
from attngen.dtypes import torch_dtype
from attngen.errors import ArgumentError
from attngen.plan import GRADIENTS_INTAKE
from attngen.quantize import Operands
from attngen.spec_call import GRADIENTS, SpecCall
from attngen.torch_state import are_traced, are_transformed, is_altered, is_watched, may_be_watched
from attngen.transforms import Transformed, TransformedCall


class Kernel(SpecCall):
    """A spec, lowered for one arch: callable on CUDA tensors (the cubins) and on CPU tensors (the simulator)."""

    @cached_property
    def _differentiated(self) -> torch.dtype:
        """The type of inputs of which there are gradients."""
        return torch_dtype(self.plan.differentiated)

    def __call__(
        self,
        q: torch.Tensor | Operands,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        softmax_scale: float | None = None,
        return_lse: bool = False,
        out: torch.Tensor | None = None,
        layout: str = "bshd",
        tables: TileTables | None = None,
        work: TileTables | None = None,
        **declared: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Compute attention.

        Args:
            q: (batch, seqlen_q, num_heads_q, head_dim_qk), or of ragged queries (tokens_q, num_heads_q, head_dim_qk),
                as k, v and out are likewise; the spec's input type, last dimension contiguous, rows on 16 bytes. Of a
                kernel of e4m3 inputs also bf16 or f16, which the call quantises, or the operands of `quantize`, in
                place of all three.
            k: (batch, seqlen_k, num_heads_kv, head_dim_qk); num_heads_kv divides num_heads_q. Where keys are paged,
                like v, a cache: (pages, page_size, num_heads_kv, head_dim_qk). Both are e4m3 where the spec says so.
            v: (batch, seqlen_k, num_heads_kv, head_dim_v).
            softmax_scale: any finite number, numpy's and 0-dimensional CPU tensors too; 1/sqrt(head_dim_qk) where None.
            return_lse: also return the natural log-sum-exp of every row.
            out: (batch, seqlen_q, num_heads_q, head_dim_v) to write to; allocated where None.
            layout: "bhsd" exchanges seqlen and heads in q, k, v and out. Where keys are paged it is of caches alone:
                "nhd", the default, or "hnd", which exchanges their rows and heads.
            tables: of `Kernel.tables`, for a mask that reads tensors; made anew by every call that passes none.
            work: of `Kernel.work`, for sequences with lengths of their own, likewise.
            **declared: the scalars and tensors that the spec declares, by name; scalars with a default may be left
                out. What says lengths, where sequences have their own: cu_seqlens_q, seqused_q, max_seqlen_q, the
                same of k, and leftpad_k; of paged ones block_table and cache_batch_idx (docs/lengths.md). Of a spec
                with a sink also sink: (num_heads_q), f32, bf16 or f16, any stride. With e4m3 tensors also q_descale,
                k_descale and v_descale, f32: what their values are multiplied by, of the shapes that `Operands` has;
                they are trusted to be positive. With a cache of e4m3 k_descale and v_descale, of the shapes that
                docs/fp8.md has. Where the spec has blocks, `blocks` says which are kept: bool, (batch
                or 1, num_heads_q or 1, blocks of rows, blocks of keys); or lists of them, i32, as (counts, indices),
                as a BlockMask of torch, or by FlashAttention-4's names.

        Returns:
            out, or (out, lse) with lse (batch, num_heads_q, seqlen_q), or (num_heads_q, tokens_q), f32; a row that sees
                no key is 0 and -inf, or the sink.

        Raises:
            ArgumentError: an argument the kernel cannot take; nothing was touched.
            ToolchainError: this machine cannot run the kernel.
        """
        if BLOCKS in declared:
            declared = dict(self._with_blocks(declared))
        is_compiling = torch.compiler.is_dynamo_compiling()
        if is_compiling or torch._C._is_any_autocast_enabled():
            q = cast(q, self.dtypes)
            k, v = (
                (k, v) if self.plan.descales else (cast(x, self.dtypes) for x in (k, v))
            )  # a cache is as it is
        if is_seen := is_compiling or may_be_watched(q):
            passed = (q, k, v, *declared.values())
            if are_traced(passed) or are_transformed(passed):
                check_captured(out=out, tables=tables, work=work)
                return self._captured(q, k, v, softmax_scale, return_lse, layout, declared)
        if self.call.gradients:
            others = (declared.get(name, self.bound.get(name)) for name in self.declared_gradients)
            if is_differentiated(q, k, v, *others):
                if out is not None or tables is not None:
                    name = "tables" if out is None else "out"
                    raise ArgumentError(name, "memory of the caller's", "None where gradients are wanted")
                made = self._recorded(q, k, v, softmax_scale, layout, work, {**self.bound, **declared})
                return made if return_lse else made[0]
        if isinstance(out, torch.Tensor):
            check_writable("out", out)  # before anything is quantised, and in the mode of the call
        q, k, v, named, intake = self._begin(q, k, v, layout, declared)
        kept = None if tables is None and work is None else self._kept(tables, work)
        if is_seen and is_watched() and out is None and kept is None:
            packed = pack(softmax_scale, layout, intake, named)
            return capture(self.text, (), q, k, v, return_lse, packed)  # type: ignore[arg-type]
        run = self._machine(q).run
        result, lse = run(q, k, v, softmax_scale, return_lse, out, layout, named, kept, intake)  # type: ignore[arg-type]
        return result if lse is None else (result, lse)

    @not_captured
    def bind(
        self,
        q: torch.Tensor | Operands,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        softmax_scale: float | None = None,
        return_lse: bool = False,
        out: torch.Tensor | None = None,
        layout: str = "bshd",
        tables: TileTables | None = None,
        work: TileTables | None = None,
        **declared: Any,
    ) -> BoundCall:
        """A call on tensors that stay where they are: to start it anew looks at nothing and takes a few microseconds.

        What the tensors hold may change, and counts as it is then. So may what a list passed as `work` is made of:
        make it anew with `kernel.work(..., out=work)`. Arguments are those of a call.

        Raises:
            ArgumentError: an argument the kernel cannot take, or one of which gradients are wanted.
            ToolchainError: this machine cannot run the kernel.
        """
        if isinstance(out, torch.Tensor):
            check_writable("out", out)
        q, k, v, named, intake = self._begin(q, k, v, layout, self._with_blocks(declared))
        kept = None if tables is None and work is None else self._kept(tables, work)
        into, wanted = (() if out is None else (out,)), ("out", "lse") if return_lse else ("out",)
        made, start = self._machine(q).bind(wanted, q, k, v, softmax_scale, into, layout, named, kept, intake)
        return BoundCall(start, *made)

    def _captured(
        self,
        q: Any,
        k: Any,
        v: Any,
        softmax_scale: float | None,
        return_lse: bool,
        layout: str,
        declared: Mapping[str, Any],
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The call as an operator, or as a function that torch.func differentiates and maps."""
        q, k, v, named, intake = self._begin(q, k, v, layout, declared)
        packed = pack(softmax_scale, layout, intake, named)
        if not are_transformed((q, k, v, *named.values())):
            return capture(self.text, self.gradients, q, k, v, return_lse, packed)
        check_gradients(self.gradients, q, k, v, packed)
        made: tuple[torch.Tensor, torch.Tensor] = Transformed.apply(  # type: ignore[no-untyped-call]
            TransformedCall(self, packed), q, k, v, *packed.tensors
        )
        return made if return_lse else made[0]

    def _kept(self, tables: TileTables | None, work: TileTables | None) -> TileTables | None:
        """What an earlier call has kept for this one, passed as the sequences of the kernel want it."""
        if self.manifest.lengths.are_dense:
            if work is not None:
                must = "None: the sequences of this kernel are of one length"
                raise ArgumentError("work", type(work).__name__, must)
            return tables
        if tables is not None:
            must = "None: sequences with lengths of their own have a list of tiles, passed as work"
            raise ArgumentError("tables", type(tables).__name__, must)
        if not isinstance(work, TileTables):
            raise ArgumentError("work", type(work).__name__, "what kernel.work(...) made")
        return work

    def make(
        self,
        wanted: tuple[str, ...],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        softmax_scale: float | None,
        layout: str,
        named: Mapping[str, Any],
        intake: str | None,
    ) -> list[torch.Tensor]:
        """Make values of a call that torch may be recording: it keeps no memory for the next one.

        Args:
            wanted: their names.
            q: as of `__call__`, as for what is not explained here.
            k: see q.
            v: see q.
            softmax_scale: see q.
            layout: see q.
            named: all that the call passes by name, lists of blocks each by its own.
            intake: in which way the call begins, where q does not tell.
        """
        make = self._machine(q).make
        return make(wanted, q, k, v, softmax_scale, (), layout, named, None, intake, keeps=False)

    def _recorded(
        self,
        q: Any,
        k: Any,
        v: Any,
        softmax_scale: float | None,
        layout: str,
        work: TileTables | None,
        passed: Mapping[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Out and lse, which autograd differentiates; refuse what it would not."""
        is_usual = not is_altered() and getattr(q, "dtype", None) is self._differentiated
        for name, x in (("q", q), ("k", k), ("v", v)):
            if not is_usual:
                check_differentiable(self.manifest, name, x)
            check_kept(name, x)
        wanted = self.declared_gradients
        for name, value in passed.items():
            if isinstance(value, torch.Tensor):
                check_plain(name, value)
                check_kept(name, value)
                if name in wanted:
                    check_no_tangent(name, value)
                else:
                    check_no_derivative(name, value, is_declared=True)
        made: tuple[torch.Tensor, torch.Tensor] = Attention.apply(  # type: ignore[no-untyped-call]
            self, softmax_scale, layout, work, passed, q, k, v, *map(passed.get, wanted)
        )
        return made

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        dlse: torch.Tensor | None = None,
        softmax_scale: float | None = None,
        layout: str = "bshd",
        grads: Sequence[torch.Tensor] | None = None,
        accumulate: bool = False,
        **declared: Any,
    ) -> tuple[torch.Tensor, ...]:
        """Compute the gradients that the spec asks for, by recomputing P from lse.

        The same bits come out in every run, unless the spec allows others (`deterministic: false`). Mask, score and
        declared values must be those of the call that made `out` and `lse`. These may also be of more keys than k and
        v are, as the merged results of a ring: the gradients are then what these keys have to do with them, and dq is
        the sum over all parts.

        Args:
            dout: the gradient of out: (batch, seqlen_q, num_heads_q, head_dim_v), of the inputs' type, last dimension
                contiguous, rows on 16 bytes.
            q: as the call took it, like k and v.
            k: see q.
            v: see q.
            out: what the call returned.
            lse: (batch, num_heads_q, seqlen_q), f32: the natural log-sum-exp that the call returned.
            dlse: the gradient of lse, if it has one.
            softmax_scale: of the call, like what follows.
            layout: "bhsd" exchanges seqlen and heads in dout, q, k, v, out and the gradients.
            grads: memory for dq, dk and dv, each of the inputs' type or f32; allocated of the inputs' type where None.
            accumulate: add to what `grads` holds; sums are worked out in f32 and rounded where they are written.
            **declared: the scalars and tensors that the spec declares, and sink where it has one.

        Returns:
            dq, dk, dv, of the shapes of q, k and v; `grads` where that is given. Then the gradient of each other name
            in `gradients`, in that order, of its shape and type: of a scalar f32, without dimensions, on q's device.

        Raises:
            ArgumentError: the spec asks for no gradients, or an argument the kernels cannot take; nothing was touched.
            ToolchainError: this machine cannot run the kernels.
        """
        if not self.call.gradients:
            raise ArgumentError(
                "self", "a kernel without a backward pass", "a spec with gradients: [q, k, v]"
            )
        if isinstance(q, Operands):
            must = "the tensors that they were made of: gradients are of these"
            raise ArgumentError("q", "operands of kernel.quantize", must)
        named = {**self.bound, **self._with_blocks(declared)}
        if are_traced((q, k, v)):
            check_captured(grads=grads, accumulate=accumulate or None)
            packed, every = pack(softmax_scale, layout, None, named), [True] * len(self.gradients)
            return tuple(capture_gradients(self.text, every, dout, dlse, q, k, v, out, lse, packed))
        named |= {"dout": dout, "out": out, "lse": lse} | ({} if dlse is None else {"dlse": dlse})
        if torch.is_grad_enabled():
            check_not_recorded({"q": q, "k": k, "v": v, **named})
        into = gradient_memory(self.manifest, GRADIENTS, grads, accumulate)
        if accumulate and self.declared_gradients:
            of, must = ", ".join(self.declared_gradients), "False where what is declared has gradients"
            raise ArgumentError("accumulate", f"True beside gradients of {of}", must)
        wanted = (*(into or GRADIENTS), *self.gradients_of(named)[len(GRADIENTS) :])
        memory = tuple(into.values())
        return tuple(self.make_gradients(wanted, q, k, v, named, softmax_scale, layout, memory, accumulate))

    def make_gradients(
        self,
        wanted: tuple[str, ...],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        named: Mapping[str, Any],
        softmax_scale: float | None,
        layout: str,
        into: tuple[torch.Tensor, ...] = (),
        accumulate: bool = False,
        keeps: bool = True,
    ) -> list[torch.Tensor]:
        """Launch and allocate what some of the gradients need, and nothing for the others.

        Where one kernel makes dk and dv, it works out both, and writes the wanted one.

        Args:
            wanted: the names of their values.
            q: see `backward`, as for what is not explained here.
            k: see q.
            v: see q.
            named: dout, out, lse, dlse if there is one, and all that the spec declares.
            softmax_scale: see q.
            layout: see q.
            into: memory for the first of them.
            accumulate: see q.
            keeps: whether the next call may find memory of this one, see `make`.
        """
        if layout == "bhsd" and not self.manifest.lengths.is_by_token("queries"):
            for name in ("dout", "out"):
                check_length(named[name], layout, name)
            named = {**named, **{name: named[name].transpose(1, 2) for name in ("dout", "out")}}
        make = self._machine(q).make
        return make(
            wanted, q, k, v, softmax_scale, into, layout, named, None, GRADIENTS_INTAKE, accumulate, keeps
        )

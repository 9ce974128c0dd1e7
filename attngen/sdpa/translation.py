"""A call of scaled_dot_product_attention as one of attngen's: texts, tensors of four dimensions, and the way back.

What follows from sizes and types is worked out once for calls that are alike in these, and remembered.
"""

from dataclasses import dataclass
from typing import Any

import torch

from attngen.api import attention, kernel_of_call
from attngen.autograd import is_differentiated
from attngen.errors import ArgumentError, RefusedError, SpecError, ToolchainError
from attngen.fit_heads import fit_heads
from attngen.kernel import Kernel
from attngen.sdpa.question import FORMATS, MASK, Question, reason_of

_AXES = (("batch", "b"), ("num_heads_q", "h"), ("seqlen_q", "q_idx"), ("seqlen_k", "kv_idx"))
"""Dimensions of a mask tensor, and what a text says for an index of each."""
_MOST_FORMS = 1024


@dataclass(frozen=True)
class Form:
    """What calls of the same sizes and types have in common.

    Attributes:
        batches: the dimensions before heads; (1,) where there are none.
        heads: of queries, and of keys and values.
        mask: a text.
        score: a text.
        tensors: what the texts read, as a spec declares it.
        own: the dimensions, of four, in which the mask tensor has elements of its own.
        dims: of the result.
    """

    batches: torch.Size
    heads: tuple[int, int]
    mask: str
    score: str
    tensors: dict[str, str]
    own: tuple[int, ...]
    dims: int

    def rows(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        """Query, key or value as (batch, seqlen, heads, columns), a view where strides allow it."""
        whole = (*self.batches, heads, *x.shape[-2:])
        if x.shape != whole:
            x = x.expand(whole)
        return (x if x.dim() == 4 else x.flatten(0, -4)).transpose(1, 2)

    def elements(self, mask: torch.Tensor) -> torch.Tensor:
        """The elements of a mask tensor that are read, in the dimensions that are its own."""
        whole = _of_four(mask, self.batches)
        index = tuple(slice(None) if dim in self.own else 0 for dim in range(4))
        return whole[index] if self.own else whole[index][None]


_FORMS: dict[Any, Form] = {}
_NO_KERNEL: dict[Any, str] = {}
"""Why there is none, by all that decides it: a search that failed is not repeated by every call."""


@dataclass(frozen=True)
class Translation:
    """What attngen is asked.

    Attributes:
        question: that was put.
        form: texts, and how tensors stand.
        rows: query, key and value as (batch, seqlen, heads, columns), of columns that kernels read.
        scale: of the scores, None for that of the columns.
        passed: values for what the texts read.
    """

    question: Question
    form: Form
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    scale: float | None
    passed: dict[str, torch.Tensor]

    def kernel(self) -> Kernel:
        """The kernel that takes the call, compiled once and remembered.

        Raises:
            RefusedError: there is none.
        """
        form = self.form
        about: dict[str, Any] = {"tensors": form.tensors, "passed": self.passed}
        try:
            kernel = kernel_of_call(*self.rows, form.mask, form.score, **about)
        except (SpecError, ToolchainError) as error:
            raise RefusedError([str(error).splitlines()[0]]) from error
        except ArgumentError as error:
            raise RefusedError([reason_of(error)]) from error
        assert isinstance(kernel, Kernel)  # nothing is captured where this is asked
        return kernel

    def attend(self) -> torch.Tensor:
        """Out, (..., heads, seqlen_q, head_dim_v); in memory heads stand behind seqlen_q, as with torch's kernels.

        Raises:
            RefusedError: no kernel takes the call; nothing was touched.
        """
        form, q = self.form, self.rows[0]
        if _NO_KERNEL and (known := _NO_KERNEL.get(self._decides)):
            raise RefusedError([known])
        options: dict[str, Any] = {"softmax_scale": self.scale, **self.passed}
        try:
            made = attention(*self.rows, form.mask, form.score, tensors=form.tensors, **options)
        except (SpecError, ToolchainError) as error:
            _NO_KERNEL[self._decides] = reason = str(error).splitlines()[0]
            raise RefusedError([reason]) from error
        except ArgumentError as error:
            raise RefusedError([reason_of(error)]) from error
        assert isinstance(made, torch.Tensor)
        columns = self.question.value.shape[-1]
        out = (made if made.shape[-1] == columns else made[..., :columns]).transpose(1, 2)
        if form.dims == 4 and len(form.batches) == 1:
            return out
        return out.reshape((*form.batches, form.heads[0], q.shape[1], columns)[-form.dims :])

    @property
    def _decides(self) -> Any:
        """What decides whether there is a kernel."""
        (q, _, v), form = self.rows, self.form
        recorded = (*map(is_differentiated, (*self.rows, *self.passed.values())),)
        sizes = (q.dtype, q.device, q.shape[-1], v.shape[-1])
        return (*sizes, recorded, form.mask, form.score, *form.tensors.values())


def translated(question: Question) -> Translation:
    """Say a call in attngen's terms.

    Raises:
        RefusedError: it cannot be said; all reasons that can be told at once.
    """
    signature = question.signature
    form = _FORMS.get(signature)
    if form is None:
        if reasons := list(question.reasons()):
            raise RefusedError(reasons)
        form = _form_of(question)
        if len(_FORMS) >= _MOST_FORMS:
            _FORMS.clear()
        if signature is not None:
            _FORMS[signature] = form
    of_q, of_kv = form.heads
    q, k, v = (
        form.rows(question.query, of_q),
        form.rows(question.key, of_kv),
        form.rows(question.value, of_kv),
    )
    try:
        rows, scale = fit_heads(q, k, v, question.scale)
    except ArgumentError as error:
        raise RefusedError([reason_of(error)]) from error
    mask = question.attn_mask
    passed = {} if mask is None else {MASK: form.elements(mask)}
    return Translation(question, form, rows, scale, passed)


def _form_of(question: Question) -> Form:
    """The form of a call against which nothing is to be said."""
    batches, heads, mask = question.batches, question.heads, question.attn_mask
    dims = max(x.dim() for x in question.inputs.values())
    causal = {"no": "full", "top_left": "causal_top_left", "bottom_right": "causal"}[question.causal]
    if mask is None:
        return Form(batches, heads, causal, "score", {}, (), dims)
    whole = _of_four(mask, batches)
    # One element stands for all along a dimension where there is one, or it is expanded: then all have gradients.
    is_recorded = is_differentiated(mask)
    own = tuple(dim for dim in range(4) if whole.shape[dim] > 1 and (is_recorded or whole.stride(dim)))
    declared, indices = ([_AXES[dim][i] for dim in own] for i in range(2))
    tensors = {MASK: f"{FORMATS[mask.dtype]}[{', '.join(declared or '1')}]"}
    element = f"{MASK}[{', '.join(indices or '0')}]"
    if mask.dtype == torch.bool:
        return Form(batches, heads, element, "score", tensors, own, dims)
    return Form(batches, heads, causal, f"score + {element}", tensors, own, dims)


def _of_four(mask: torch.Tensor, batches: torch.Size) -> torch.Tensor:
    """A mask tensor as (batch or 1, heads or 1, seqlen_q or 1, seqlen_k or 1)."""
    mask = mask[(None,) * (len(batches) + 3 - mask.dim())]
    leading = mask.shape[:-3]
    if len(leading) == 1:
        return mask
    if leading.numel() == 1:
        return mask[(0,) * (len(leading) - 1)]
    return mask.expand(*batches, *mask.shape[-3:]).flatten(0, -4)

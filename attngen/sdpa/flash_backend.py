"""attngen in place of the flash attention that torch carries: what torch calls where it has chosen that backend.

Unlike `attngen.sdpa.enable`, this takes what torch's flash backend takes and nothing else: 16 bits, no mask tensor. The
operators are also what `torch.nn.attention.varlen.varlen_attn`, jagged nested tensors and torch's own context
parallelism call.
"""

from collections.abc import Sequence
from typing import Any

import torch

from attngen.api import kernel_of_call
from attngen.autograd import is_differentiated
from attngen.errors import ArgumentError, ToolchainError, shown
from attngen.fit_heads import fit_columns, fit_heads
from attngen.flash_attn.attend import attend, refuse_unserved
from attngen.flash_attn.wish import Wish, window_of
from attngen.kernel import Kernel
from attngen.plan import DENSE
from attngen.varlen import RAGGED

NAME = "attngen"
_NAMES = {"q": "query", "k": "key", "v": "value", "cu_seqlens_q": "cum_seq_q", "cu_seqlens_k": "cum_seq_k"}


def register_flash_attention() -> None:
    """Make attngen known to torch, for `torch.nn.attention.activate_flash_attention_impl("attngen")`.

    Nothing changes until that is called, and `restore_flash_attention_impl()` takes it back.

    Raises:
        ToolchainError: this torch takes no other flash attention than its own.
    """
    register = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if register is None:
        cure = "use attngen.sdpa.enable(), or a newer torch"
        raise ToolchainError(f"torch {torch.__version__} has no register_flash_attention_impl", cure)
    register(NAME, register_fn=activate)


class FlashBackend:
    """What stands in torch's dispatcher, and goes with `remove`.

    Attributes:
        library: torch's registrations.
    """

    def __init__(self, key: str) -> None:
        self.library: torch.library.Library | None = torch.library.Library("aten", "IMPL", key)  # type: ignore[no-untyped-call]
        for name, function in _FUNCTIONS.items():
            self.library.impl(name, function, key)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Leave flash attention to torch again."""
        if self.library is not None:
            self.library._destroy()  # type: ignore[no-untyped-call]
        self.library = None


def activate(key: str = "CUDA") -> FlashBackend:
    """Put attngen behind torch's operators of flash attention on one kind of device."""
    return FlashBackend(key)


def _wish(
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    left: int | None = None,
    right: int | None = None,
    alibi_slopes: torch.Tensor | None = None,
) -> Wish:
    """What the options of an operator ask; causal is bottom right."""
    if dropout_p:
        raise ArgumentError("dropout_p", shown(dropout_p), "0: there is no dropout")
    sides = tuple(-1 if size is None else size for size in (left, right))
    return Wish(window_of(sides, is_causal, -1), scale, alibi_slopes=alibi_slopes)


def _cut(
    cum_seq_q: torch.Tensor | None, cum_seq_k: torch.Tensor | None, max_q: int, max_k: int
) -> dict[str, Any]:
    """What a kernel is passed of lengths; nothing where sequences are of one length."""
    if cum_seq_q is None:
        return {}
    starts = {"cu_seqlens_q": cum_seq_q, "cu_seqlens_k": cum_seq_k}
    return {**starts, "max_seqlen_q": int(max_q), "max_seqlen_k": int(max_k)}


def _attend(
    rows: Sequence[torch.Tensor], wish: Wish, cut: dict[str, Any], may_split: bool = True
) -> tuple[torch.Tensor, ...]:
    """Out, lse, and what torch keeps of random numbers and of probabilities, where there are none."""
    q, k, v = rows
    with torch.no_grad():  # torch differentiates the operator by its own backward operator
        lengths = RAGGED if cut else DENSE
        out, lse = attend(q, k, v, wish.texts, True, lengths, cut, _NAMES, may_split=may_split)
    assert lse is not None
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    return out, lse, state, torch.zeros((), dtype=torch.uint64, device=q.device), q.new_empty(0)


def _gradients(
    rows: Sequence[torch.Tensor],
    dout: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    wish: Wish,
    cut: dict[str, Any],
) -> tuple[torch.Tensor, ...]:
    """dq, dk and dv, of the shapes of the rows."""
    q, k, v = (x.detach() for x in rows)
    (q, k, v), scale = fit_heads(q, k, v, wish.softmax_scale)
    with torch.enable_grad():  # a kernel with a backward pass is asked for by what requires grad
        asked = q.detach().requires_grad_()
        kernel = kernel_of_call(asked, k, v, wish.texts.mask, passed=cut, lengths=RAGGED if cut else DENSE)
    assert isinstance(kernel, Kernel)  # below autograd nothing is captured
    with torch.no_grad():
        made = kernel.backward(fit_columns(dout), q, k, v, fit_columns(out), lse, softmax_scale=scale, **cut)
    return tuple(x[..., : of.shape[-1]] for x, of in zip(made, rows, strict=True))


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: torch.Tensor | None,
    cum_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """aten::_flash_attention_forward."""
    refuse_unserved(num_splits=num_splits)
    if block_table is not None:
        must = "None: torch's operator is served of keys in one tensor"
        raise ArgumentError("block_table", type(block_table).__name__, must, "call attngen.varlen_attn")
    _check_debug_mask(return_debug_mask)
    for name, x in (("seqused_k", seqused_k), ("alibi_slopes", alibi_slopes)):
        if x is not None and is_differentiated(query, key, value):
            must = "None where something requires grad: torch's backward operator is not passed it"
            raise ArgumentError(name, "a tensor", must)
    wish = _wish(dropout_p, is_causal, scale, window_size_left, window_size_right, alibi_slopes)
    cut = _cut(cum_seq_q, cum_seq_k, max_q, max_k)
    cut |= {} if seqused_k is None else {"seqused_k": seqused_k}
    return _attend((query, key, value), wish, cut, may_split=num_splits != 1)


def _backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cum_seq_q: torch.Tensor | None,
    cum_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: torch.Tensor,
    unused: torch.Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """aten::_flash_attention_backward."""
    wish = _wish(dropout_p, is_causal, scale, window_size_left, window_size_right)
    cut = _cut(cum_seq_q, cum_seq_k, max_q, max_k)
    return _gradients((query, key, value), grad_out, out, logsumexp, wish, cut)


def _sdpa_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """aten::_scaled_dot_product_flash_attention, with heads before rows."""
    _check_debug_mask(return_debug_mask)
    rows = [x.transpose(1, 2) for x in (query, key, value)]
    out, lse, *none = _attend(rows, _wish(dropout_p, is_causal, scale), {})
    return out.transpose(1, 2), lse, None, None, query.shape[2], key.shape[2], *none


def _sdpa_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cum_seq_q: torch.Tensor | None,
    cum_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: torch.Tensor,
    philox_offset: torch.Tensor,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, ...]:
    """aten::_scaled_dot_product_flash_attention_backward, with heads before rows."""
    dout, q, k, v, made = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    grads = _gradients((q, k, v), dout, made, logsumexp, _wish(dropout_p, is_causal, scale), {})
    return tuple(x.transpose(1, 2) for x in grads)


def _check_debug_mask(return_debug_mask: bool) -> None:
    if return_debug_mask:
        raise ArgumentError("return_debug_mask", "True", "False: probabilities are not written out")


_FUNCTIONS = {
    "_flash_attention_forward": _forward,
    "_flash_attention_backward": _backward,
    "_scaled_dot_product_flash_attention": _sdpa_forward,
    "_scaled_dot_product_flash_attention_backward": _sdpa_backward,
}

"""One call for all of FlashAttention's functions: the kernel that texts ask for, and what there is none of."""

from collections.abc import Mapping
from typing import Any

import torch

from attngen.api import attention, kernel_of_call
from attngen.bind import BLOCKS, bound_of_lengths, check_arguments
from attngen.errors import ArgumentError, shown
from attngen.fit_heads import CACHE_TYPE, check_strided, fit_heads
from attngen.flash_attn.wish import Texts
from attngen.kernel import Kernel
from attngen.plan import DENSE, LengthKind, Lengths

NOTHING: Mapping[str, str] = {}
_BY_FUNCTION = "an attngen.expression of it is a mask or a score of attngen.attention"
_E4M3 = "e4m3 operands go to kernels of attngen.compile, whose inputs are e4m3"
_NO_SCHEDULE = "leave it out: it changes no result"
UNSERVED: Mapping[str, tuple[tuple[Any, ...], str, str | None]] = {
    "dropout_p": ((0,), "0: there is no dropout", "drop in training elsewhere, or train without"),
    "qv": ((None,), "None: there is one product of queries and keys", "concatenate q with qv, and k with v"),
    "gather_kv_indices": ((None,), "None: keys are not gathered", None),
    "q_descale": ((None,), "None beside 16-bit inputs", _E4M3),
    "k_descale": ((None,), "None beside 16-bit inputs", _E4M3),
    "v_descale": ((None,), "None beside 16-bit inputs", _E4M3),
    "num_splits": (
        (None, 0, 1),
        "0, the call says whether its keys are split, or 1, they are not",
        _NO_SCHEDULE,
    ),
    "pack_gqa": (
        (None, False),
        "None or False: the call says whether heads that share keys are packed",
        _NO_SCHEDULE,
    ),
    "sm_margin": ((0,), "0: all multiprocessors are taken", None),
    "scheduler_metadata": ((None,), "None: kernels list their tiles themselves", _NO_SCHEDULE),
    "seqlen_k_per_split": ((None,), "None", "parts of so many keys are `split` of an attngen.compile"),
    "min_seqlen_k": ((None,), "None: no kernel asks for the shortest length", _NO_SCHEDULE),
    "score_mod": ((None,), "None", _BY_FUNCTION),
    "score_mod_bwd": ((None,), "None", "derivatives follow from the score of attngen.attention"),
    "mask_mod": ((None,), "None", _BY_FUNCTION),
    "aux_tensors": ((None,), "None", "tensors that a function holds go with its attngen.expression"),
    "aux_scalars": ((None,), "None", "numbers that a function holds go with its attngen.expression"),
    "block_sparse_tensors_bwd": (
        (None,),
        "None: the backward pass turns the blocks of the call round itself",
        "leave it out",
    ),
}
"""Arguments without a kernel: the values that ask for nothing, what must be passed, and what helps."""
_NUMBERS = (type(None), bool, int, float)
_FLAGS = ("deterministic", "rotary_interleaved", "disable_scheduler_metadata")
"""Either value is served: gradients are the same bits in every run, columns turn in either order."""


def refuse_unserved(**arguments: Any) -> None:
    """Refuse what a call asks for and no kernel does, by its name.

    Raises:
        ArgumentError: the first of them.
    """
    for name, value in arguments.items():
        if name in _FLAGS:
            if not isinstance(value, bool):
                raise ArgumentError(name, shown(value), "True or False")
            continue
        served, must, hint = UNSERVED[name]
        if type(value) not in _NUMBERS or value not in served:
            got = type(value).__name__ if isinstance(value, torch.Tensor) or callable(value) else shown(value)
            raise ArgumentError(name, got, must, hint)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    texts: Texts,
    wants_lse: bool,
    lengths: Lengths = DENSE,
    cut: Mapping[str, Any] = NOTHING,
    names: Mapping[str, str] = NOTHING,
    blocks: tuple[tuple[int, int], Any] | None = None,
    may_split: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention as texts say.

    Args:
        q: (batch, seqlen_q, num_heads_q, head_dim), or (tokens_q, num_heads_q, head_dim) of ragged queries; f16 or
            bf16, on the CPU also f32. Any head_dim up to 256.
        k: (batch, seqlen_k, num_heads_kv, head_dim) or (tokens_k, ...), or of keys in pages (pages, page, ...).
        v: (batch, seqlen_k, num_heads_kv, head_dim_v), likewise.
        texts: mask and score, and what they read.
        wants_lse: whether lse is returned.
        lengths: how queries and keys are cut into sequences.
        cut: what says so, by the names of a kernel's arguments.
        names: those that the face has for arguments which a kernel calls otherwise.
        blocks: rows and keys of a block, and which blocks are kept, as `Kernel.__call__` takes it.
        may_split: whether keys may be cut into parts.

    Returns:
        out, of q's shape with v's columns, and lse, (batch, num_heads_q, seqlen_q) or (num_heads_q, tokens_q), f32, or
        None.

    Raises:
        ArgumentError: an argument that no kernel takes, by the name that the face has for it.
    """
    options: dict[str, Any] = {"tensors": texts.tensors}
    passed = {**texts.passed, **cut}
    try:
        if not isinstance(wants_lse, bool):
            raise ArgumentError("return_lse", shown(wants_lse), "True or False")
        (rows, keys, values), scale = fit_heads(q, k, v, texts.softmax_scale, "k_descale" in cut)
        if lengths.are_dense and blocks is None and may_split and keys.dtype is not CACHE_TYPE:
            about: dict[str, Any] = {"softmax_scale": scale, "return_lse": wants_lse}
            made = attention(rows, keys, values, texts.mask, texts.score, **options, **about, **passed)
        else:
            sizes, kept = blocks or (None, None)
            options |= {"passed": passed, "lengths": lengths, "block_sizes": sizes, "may_split": may_split}
            kernel = kernel_of_call(rows, keys, values, texts.mask, texts.score, **options)
            passed |= {} if kept is None else {BLOCKS: kept}
            made = kernel(rows, keys, values, scale, wants_lse, **passed)
    except ArgumentError as error:
        raise error.renamed(names) from error
    out, lse = made if isinstance(made, tuple) else (made, None)
    return out if out.shape[-1] == v.shape[-1] else out[..., : v.shape[-1]], lse


def check_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    texts: Texts,
    wants_lse: bool,
    lengths: Lengths,
    cut: Mapping[str, Any],
    names: Mapping[str, str] = NOTHING,
    may_split: bool = True,
) -> None:
    """Refuse what `attend` would, before anything is written; arguments as of it.

    Raises:
        ArgumentError: an argument that no kernel takes, by the name that the face has for it.
    """
    passed = {**texts.passed, **cut}
    try:
        if not isinstance(wants_lse, bool):
            raise ArgumentError("return_lse", shown(wants_lse), "True or False")
        (rows, keys, values), scale = fit_heads(q, k, v, texts.softmax_scale, "k_descale" in cut)
        options: dict[str, Any] = {"tensors": texts.tensors, "passed": passed, "lengths": lengths}
        options["may_split"] = may_split  # so that the kernel is the one that runs
        kernel = kernel_of_call(rows, keys, values, texts.mask, texts.score, **options)
        if isinstance(kernel, Kernel):
            check_arguments(kernel.manifest, rows, keys, values, scale, declared=passed)
    except ArgumentError as error:
        raise error.renamed(names) from error


def lengths_of(
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
) -> Lengths:
    """How sequences are cut where a call passes some of what can say so."""
    keys = _kind(cu_seqlens_k, seqused_k) if block_table is None else "paged"
    return Lengths(_kind(cu_seqlens_q, seqused_q), keys)


def _kind(starts: object, used: object) -> LengthKind:
    if starts is not None:
        return "ragged"
    return "dense" if used is None else "padded"


def longest(name: str, bound: Any) -> dict[str, Any]:
    """What a kernel is passed for a bound of lengths: nothing where that lies on a device, which no host reads.

    A bound chooses among kernels, and changes no result.
    """
    is_far = isinstance(bound, torch.Tensor) and bound.device.type != "cpu"
    return {} if bound is None or is_far else {name: bound}


def check_longest(name: str, bound: Any) -> None:
    """Refuse what is no bound of lengths, where a table of pages has one of its own."""
    for passed, value in longest(name, bound).items():
        bound_of_lengths(passed, value)


def unpacked(name: str, packed: torch.Tensor, parts: int, is_ragged: bool) -> tuple[torch.Tensor, ...]:
    """The parts of a tensor that holds several, one dimension before heads: views, which share its memory.

    Raises:
        ArgumentError: it has not that many parts.
    """
    check_strided(name, packed)
    dim = 1 if is_ragged else 2
    if packed.dim() != dim + 3 or packed.shape[dim] != parts:
        first = "tokens" if is_ragged else "batch, seqlen"
        raise ArgumentError(name, f"shape {tuple(packed.shape)}", f"({first}, {parts}, heads, head_dim)")
    return packed.unbind(dim)

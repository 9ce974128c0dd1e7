"""The attention of a layer of a model, by attngen's kernels: what transformers calls in the place of its own.

Everything that a layer asks for is served, or refused by a `ModelError`; nothing is left out.
"""

from typing import Any

import torch
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from attngen.api import attention, kernel_of_call
from attngen.autograd import is_differentiated
from attngen.bind import TileTables
from attngen.errors import ArgumentError, AttngenError, ModelError
from attngen.expr import SINK
from attngen.hf.mask_functions import MaskText
from attngen.hf.model_masks import ModelMask
from attngen.kernel import Kernel
from attngen.pair_tensors import declared_by_pair

_REFUSED = {
    "indices": "no keys that are picked for each query",
    "block_indices": "no blocks of keys that are picked for each query",
    "block_table": "no keys and values by pages",
    "sinks": "one sink for each head, s_aux, and none for each query",
    "head_mask": "no weights of heads",
    "output_attentions": "no attention weights, which are never in memory: eager attention has them",
}
"""What models pass besides that changes the result of attention or what it returns, and what there is in its place."""


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: ModelMask | torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, for transformers.

    Args:
        module: the layer: its name for errors, and `is_causal` where no mask comes.
        query: (batch, num_heads_q, seqlen_q, head_dim_qk).
        key: (batch, num_heads_kv, seqlen_k, head_dim_qk), not repeated for groups of query heads.
        value: (batch, num_heads_kv, seqlen_k, head_dim_v).
        attention_mask: of `make_mask`; or a tensor, (batch or 1, heads or 1, seqlen_q or 1, keys or 1), of bool, or of
            numbers that are added to scores.
        dropout: 0, since kernels drop nothing.
        scaling: of the products of queries and keys; 1/sqrt(head_dim_qk) where None.
        is_causal: whether a query sees no later keys, where no mask comes.
        sliding_window: for how many keys; masks have it already.
        softcap: what scores are bent to stay below.
        s_aux: a learned sink of each head.
        position_bias: (batch or 1, heads or 1, seqlen_q or 1, keys), added to scores.
        cu_seq_lens_q: (documents + 1,), of a packed batch of one row: where each document begins among the queries, and
            where the last one ends.
        cu_seq_lens_k: likewise among the keys.
        **others: what else the layer passes, of which what the caller of the model says is not for attention.

    Returns:
        (batch, seqlen_q, num_heads_q, head_dim_v), and None in the place of weights.

    Raises:
        ModelError: what the layer asks for is not served.
    """
    try:
        _check(dropout, others)
        sizes = (*query.shape[:3], key.shape[2])
        starts = (cu_seq_lens_q, cu_seq_lens_k)
        mask = _mask(module, attention_mask, sizes, is_causal, sliding_window, starts)
        text, tensors, passed = mask.text, {**mask.tensors}, {**mask.values}
        score = "score" if softcap is None else f"softcap(score, {float(softcap)!r})"
        for name, x in (("attention_mask", attention_mask), ("position_bias", position_bias)):
            if isinstance(x, torch.Tensor):
                tensors[name], element = declared_by_pair(name, x, sizes)
                passed[name] = x
                if name == "attention_mask" and x.dtype == torch.bool:
                    text = element
                else:
                    score += f" + {element}"
        if s_aux is not None:
            passed[SINK] = s_aux.reshape(-1)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (batch, seqlen, heads, head_dim)
        is_recorded = torch.compiler.is_compiling() or is_differentiated(q, k, v, *passed.values())
        if isinstance(mask, ModelMask) and not is_recorded:
            kernel, tables = _kept(mask, q, k, v, score, tensors, passed)
            out = kernel(q, k, v, scaling, tables=tables, **passed)
        else:
            out = attention(q, k, v, text, score, tensors=tensors, softmax_scale=scaling, **passed)
    except AttngenError as error:
        raise ModelError(*_named(module), str(error)) from error
    return out, None  # type: ignore[return-value]


def _check(dropout: float, others: dict[str, Any]) -> None:
    """Refuse what no kernel does."""
    if dropout:
        cure = "set attention_dropout (of T5 dropout_rate) to 0 in the model's config, or call model.eval()"
        raise ArgumentError("dropout", dropout, "0: kernels drop no weights", cure)
    for name, instead in _REFUSED.items():
        if others.get(name) is not None and others[name] is not False:
            raise ArgumentError(name, type(others[name]).__name__, f"None: there are {instead}")


def _mask(
    module: torch.nn.Module,
    given: ModelMask | torch.Tensor | None,
    sizes: tuple[int, int, int, int],
    is_causal: bool | None,
    sliding_window: int | None,
    starts: tuple[torch.Tensor | None, torch.Tensor | None],
) -> ModelMask | MaskText:
    """Which keys queries see, but for a tensor's part in it: as the model says, or else as the layer is."""
    batch, _, queries, keys = sizes
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if given is None and sliding_window is not None and sliding_window <= keys:
        must = "a mask, which says what the window is"
        raise ArgumentError("attention_mask", f"None, with a sliding_window of {sliding_window}", must)
    if isinstance(given, ModelMask):
        if given.shape[0] not in (1, batch) or given.shape[2] != queries or given.shape[3] < keys:
            got = f"one of {given.shape[0]} x {given.shape[2]} queries and {given.shape[3]} keys"
            raise ArgumentError("attention_mask", got, f"one of {batch} x {queries} queries and {keys} keys")
        mask = given.of_keys(keys)
    elif given is not None and not isinstance(given, torch.Tensor):
        raise ArgumentError(
            "attention_mask", type(given).__name__, "a mask that transformers made for attngen"
        )
    elif given is not None and starts != (None, None):
        raise ArgumentError(
            "attention_mask", "a tensor beside cu_seq_lens_q", "documents, or a tensor of pairs"
        )
    elif starts == (None, None):
        if given is not None or queries == 1 or not is_causal:
            return MaskText("full")
        if queries != keys:
            got = f"None, of a causal layer with {queries} queries and {keys} keys"
            raise ArgumentError(
                "attention_mask", got, "a mask, which says where queries stand among the keys"
            )
        return MaskText("causal")
    else:
        function = causal_mask_function if is_causal else bidirectional_mask_function
        mask = ModelMask(function, (batch, 1, queries, keys))
    return mask if starts == (None, None) else mask.of_documents(*starts)


def _kept(
    mask: ModelMask,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    score: str,
    tensors: dict[str, str],
    passed: dict[str, Any],
) -> tuple[Kernel, TileTables | None]:
    """The kernel of a call without gradients, and what it knows of the mask by tile: made once for all layers."""
    has_versions = not any(isinstance(x, torch.Tensor) and x.is_inference() for x in passed.values())
    scored = [passed[name] for name in tensors if name not in mask.tensors] if has_versions else ()
    key = (
        q.shape,
        k.shape,
        v.shape,
        q.dtype,
        score,
        SINK in passed,
        *((x.data_ptr(), x._version) for x in scored),
    )
    if key not in mask.kept:
        kernel = kernel_of_call(q, k, v, mask.text, score, tensors=tensors, passed=passed)
        assert isinstance(kernel, Kernel)  # what is captured keeps nothing
        has_tables = kernel.plan.table_values and has_versions
        mask.kept[key] = kernel, kernel.tables(q, k, v, **passed) if has_tables else None
    return mask.kept[key]


def _named(module: torch.nn.Module) -> tuple[str, str]:
    """A layer's model, and the layer, for an error."""
    model = getattr(getattr(module, "config", None), "model_type", "") or "a model without a type"
    kind, number = type(module).__name__, getattr(module, "layer_idx", None)
    return model, kind if number is None else f"layer {number}, {kind}"

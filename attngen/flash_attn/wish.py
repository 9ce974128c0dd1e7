"""What FlashAttention's functions can ask of attention, in one convention, as texts of the language."""

from dataclasses import dataclass
from operator import index
from typing import Any

import torch

from attngen.bind import scalar_of
from attngen.errors import ArgumentError, shown
from attngen.expr import LARGEST_LENGTH
from attngen.torch_state import constant

Window = tuple[int | None, int | None]
"""Keys before and behind the place of a query that it sees; None is without bound."""
OPEN: Window = (None, None)
HIGHEST_CAP = 2.0**127


@dataclass(frozen=True)
class Texts:
    """What a kernel is asked beside its tensors and lengths.

    Attributes:
        mask: which keys a query sees.
        score: what becomes of a score.
        tensors: formats and dimensions of what both read, as a spec declares them.
        passed: the values, and a sink.
        softmax_scale: 1/sqrt(head_dim) where None.
    """

    mask: str
    score: str
    tensors: dict[str, str]
    passed: dict[str, Any]
    softmax_scale: float | None


@dataclass(frozen=True)
class Wish:
    """What a call asks beside its tensors and lengths.

    The last query stands beside the last key, in masks and in ALiBi's distances.

    Attributes:
        window: which keys a query sees; (None, 0) is causal.
        softmax_scale: 1/sqrt(head_dim) where None.
        chunk: how many keys a query's own chunk has, which alone it sees; 0 for all.
        softcap: scores are bent to stay between it and its negative; 0 leaves them.
        alibi_slopes: f32, (num_heads_q) or (batch, num_heads_q): slope times distance is taken off a score.
        sink: (num_heads_q), f32, bf16 or f16: a logit for each head that joins the sum without a value.
    """

    window: Window = OPEN
    softmax_scale: float | None = None
    chunk: int = 0
    softcap: float = 0.0
    alibi_slopes: torch.Tensor | None = None
    sink: torch.Tensor | None = None

    @property
    def texts(self) -> Texts:
        """The wish in the language.

        Raises:
            ArgumentError: an attribute is no such value.
        """
        slopes = self.alibi_slopes
        if slopes is not None and not isinstance(slopes, torch.Tensor):
            raise ArgumentError("alibi_slopes", type(slopes).__name__, "a torch tensor of f32")
        of_head = "" if slopes is None else {1: "h", 2: "b, h"}.get(slopes.dim())
        if slopes is not None and of_head is None:
            must = "1 or 2: (num_heads_q) or (batch, num_heads_q)"
            raise ArgumentError("alibi_slopes", f"{slopes.dim()} dimensions", must)
        mask = _mask_of(self.window, self.chunk)
        score = _score_of(self.softcap)
        tensors = {}
        if of_head:
            score = f"{score} - alibi_slopes[{of_head}] * abs(q_pos - kv_idx)"
            tensors = {"alibi_slopes": "f32[num_heads_q]" if of_head == "h" else "f32[batch, num_heads_q]"}
        named = {"alibi_slopes": slopes, "sink": self.sink}
        passed = {name: x for name, x in named.items() if x is not None}
        return Texts(mask, score, tensors, passed, self.softmax_scale)


@constant
def _mask_of(window: Window, chunk: Any) -> str:
    """Which keys a query sees. Sizes stand in the text: as scalars they cost 64-bit bounds, and registers."""
    if not isinstance(chunk, int) or not 0 <= chunk <= LARGEST_LENGTH:
        raise ArgumentError("attention_chunk", shown(chunk), "a number of keys, or 0 for all")
    left, right = window
    sides = [] if left is None else [f"kv_idx >= q_pos - {left}"]
    if right is not None:
        sides.append(f"kv_idx <= q_pos + {right}" if right else "causal")
    if chunk:
        sides.append(f"chunked({chunk})")
    return " and ".join(sides) or "full"


@constant
def _score_of(softcap: Any) -> str:
    """What becomes of a score. Its bounds stand in the text: kernels of small ones need no maximum."""
    cap = scalar_of("softcap", "f32", softcap)
    if not 0 <= cap <= HIGHEST_CAP:
        raise ArgumentError("softcap", shown(softcap), "a number above 0, or 0 for none")
    return f"softcap(score, {cap!r})" if cap else "score"


@constant
def window_of(window_size: Any, causal: Any, unbounded: int | None) -> Window:
    """A window as one of the libraries writes it.

    Args:
        window_size: (left, right), keys before and behind the place of a query.
        causal: whether no key behind that place is seen, whatever `right` says.
        unbounded: what a side is that has no bound: -1, and with it any number below 0, or None. Beside None a number
            below 0 leaves keys next to the query out, and a window of less than one key is none.

    Raises:
        ArgumentError: an argument is no such thing.
    """
    if not isinstance(causal, bool):
        raise ArgumentError("causal", shown(causal), "True or False")
    try:
        left, right = (None if size is None and unbounded is None else index(size) for size in window_size)
    except (TypeError, ValueError):
        must = f"(left, right), each a number of keys, or {unbounded} for all"
        raise ArgumentError("window_size", shown(window_size), must) from None
    right = 0 if causal else right
    is_void = left is not None and right is not None and left + right < 0
    if unbounded is None and is_void:
        return (None, 0) if causal else OPEN
    lowest = 0 if unbounded is not None else -LARGEST_LENGTH
    left, right = (
        None if size is None or not lowest <= size <= LARGEST_LENGTH else size for size in (left, right)
    )
    return left, right

"""What a mask asks of a key alone, held against every pair: where it does not hold, no query sees the key."""

import pytest
import torch
from hypothesis import given
from strategies import MASKS

from attngen.expr import evaluate, free_names, parse_mask, shown_keys
from attngen.expr.declare import read_declarations

B, H, Q, K = torch.meshgrid(*map(torch.arange, (2, 3, 7, 9)), indexing="ij")
ENV = {"b": B, "h": H, "h_kv": H // 3, "q_idx": Q, "kv_idx": K, "seqlen_q": 7, "seqlen_k": 9}
DECLARED = read_declarations(
    {"n": "i32 = 3"}, {"pad": "bool[batch, seqlen_k]", "doc": "i32[batch, seqlen_k]"}, {}
).declarations


@pytest.mark.parametrize(
    ("mask", "shown"),
    [
        ("full", None),
        ("causal", None),
        ("document(doc)", None),
        ("prefix(4)", None),
        ("h < 2 and causal", None),
        ("pad[b, kv_idx] != causal", None),
        ("sinks(4)", "kv_idx <= 3"),
        ("causal and pad[b, kv_idx]", "pad[b, kv_idx]"),
        (
            "kv_idx % 3 != 0 and doc[b, kv_idx] != n and window(4, 2)",
            "doc[b, kv_idx] != n and kv_idx % 3 != 0",
        ),
        ("causal and pad[b, kv_idx] or window(4, 2) and pad[b, kv_idx]", "pad[b, kv_idx]"),
        ("causal and kv_idx > 5 or kv_idx < 2", "kv_idx >= 6 or kv_idx <= 1"),
        ("pad[b, kv_idx] and not (causal and kv_idx == 3)", "pad[b, kv_idx]"),
        ("pad[b, kv_idx] and (h == 0 or kv_idx > 4)", "pad[b, kv_idx] and (kv_idx >= 5 or h == 0)"),
    ],
)
def test_what_is_asked_of_a_key(mask: str, shown: str | None) -> None:
    """Conjuncts without a query stay, of a choice one for each way; a comparison with a query hides no key."""
    found = shown_keys(parse_mask(mask, DECLARED))
    assert found is (None if shown is None else parse_mask(shown, DECLARED))


@given(MASKS)
def test_a_key_that_is_not_shown_is_seen_by_no_query(text: str) -> None:
    """Of every random mask."""
    mask = parse_mask(text, DECLARED)
    if (shown := shown_keys(mask)) is None:
        return
    assert "kv_idx" in free_names(shown) and "q_idx" not in free_names(shown)
    sees, may_see = (torch.as_tensor(evaluate(each, ENV)).expand(B.shape) for each in (mask, shown))
    assert not (sees & ~may_see).any()

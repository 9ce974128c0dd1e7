"""Caches in e4m3 by FlashAttention-3's names: appended to, read, and what is refused."""

from typing import Any

import pytest
import torch

import attngen
from attngen.errors import ArgumentError
from attngen.flash_attn import version2, version3
from tests.faces.attention64 import attention64, draw

E4M3 = torch.float8_e4m3fn
DESCALES: dict[str, torch.Tensor | None] = {
    "none": None,
    "a number": torch.tensor(0.01),
    "of heads": torch.tensor([0.01, 0.02]),
    "of requests": torch.tensor([[0.01, 0.02], [0.03, 0.015]]),
    "strides of 0": torch.tensor(0.01).expand(2, 2),
}


def caches(
    pages: int = 9, page: int = 16, head_dim: int = 64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two caches of NaN and a table of two requests."""
    k, v = (torch.full((pages, page, 2, head_dim), torch.nan).to(E4M3) for _ in range(2))
    return k, v, torch.randperm(pages, generator=torch.Generator().manual_seed(0))[:8].int().view(2, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("descales", DESCALES)
def test_new_keys_are_divided_appended_and_read(descales: str, dtype: torch.dtype) -> None:
    """What is read is what the cache stands for: numbers of it times the descale that new ones were divided by."""
    k_cache, v_cache, table = caches()
    q, k, v = (x.to(dtype) for x in draw((2, 3, 4, 64), (2, 40, 2, 64), (2, 40, 2, 64)))
    by = DESCALES[descales]
    out, lse = version3.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=torch.zeros(2, dtype=torch.int32), page_table=table,
        k_descale=by, v_descale=by, causal=True, return_softmax_lse=True,
    )  # fmt: skip
    of_heads = torch.ones(()) if by is None else by.expand(2, 2)[:, None, :, None] if by.dim() else by
    if by is not None and by.dim() == 1:
        of_heads = by[None, None, :, None]
    keys, values = (x[table.long()].flatten(1, 2)[:, :40].double() * of_heads for x in (k_cache, v_cache))
    for stored, x in ((keys, k), (values, v)):
        assert (stored - x).abs().max() <= 2**-4 * x.abs().max() + 2**-10 * of_heads.max()
    mask = torch.ones(3, 40).tril(37).bool()
    for b in range(2):
        exact, exact_lse = attention64(q[b : b + 1].double(), keys[b : b + 1], values[b : b + 1], mask)
        assert (out[b] - exact[0]).abs().max() <= 2 * torch.finfo(dtype).eps * values[b].abs().max()
        assert (lse[b] - exact_lse[0]).abs().max() <= 1e-5


def test_contiguous_caches_and_those_of_version_2() -> None:
    """Without a table, of all keys; descales are 1 where a function has none."""
    q, k, v = draw((2, 3, 4, 64), (2, 40, 2, 64), (2, 40, 2, 64))
    k, v = k.to(E4M3), v.to(E4M3)
    q = q.bfloat16()
    one = {"k_descale": torch.ones(()), "v_descale": torch.ones(2)}
    expected = version3.flash_attn_with_kvcache(q, k, v, causal=True, **one)
    assert torch.equal(version2.flash_attn_with_kvcache(q, k, v, causal=True), expected)
    assert torch.equal(version3.flash_attn_with_kvcache(q, k, v, causal=True), expected)
    assert torch.equal(attngen.attention(q, k, v, "causal", **one), expected)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a descale of q": ({"q_descale": torch.ones(())}, "q_descale"),
    "descales of 16 bits": ({"k_cache": torch.bfloat16, "v_cache": torch.bfloat16}, "k_descale: got Tensor"),
    "two formats": ({"v_cache": torch.bfloat16}, "v_cache: got dtype"),
    "f32 queries": ({"q": torch.float32}, "k_cache: got"),
    "a descale too many": ({"k_descale": torch.ones(3, 2)}, "k_descale: got shape"),
    "odd columns": ({"head_dim": 40}, "multiple of 16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_kernel_takes_is_refused_by_name(name: str) -> None:
    """Before a cache is written to."""
    change, says = REFUSED[name]
    head_dim = change.get("head_dim", 64)
    k_cache, v_cache, table = caches(head_dim=head_dim)
    q, k, v = draw((2, 3, 4, head_dim), (2, 3, 2, head_dim), (2, 3, 2, head_dim))
    given: dict[str, Any] = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k_descale": torch.ones(2)}
    given["q"] = q.bfloat16()
    for key, value in change.items():
        if isinstance(value, torch.dtype):
            given[key] = given[key].float().to(value)
        elif key != "head_dim":
            given[key] = value
    k, v = (x.to(given["q"].dtype) for x in (k, v))
    lengths = {"cache_seqlens": torch.zeros(2, dtype=torch.int32), "page_table": table}
    with pytest.raises(ArgumentError, match=says):
        version3.flash_attn_with_kvcache(**given, k=k, v=v, **lengths)
    assert bool(given["k_cache"].float().isnan().all())


def test_queries_of_other_types_and_with_gradients_are_refused() -> None:
    """Beside keys of e4m3, by `attention` too."""
    q, k, v = draw((1, 3, 4, 64), (1, 9, 2, 64), (1, 9, 2, 64))
    k, v = k.to(E4M3), v.to(E4M3)
    one = {"k_descale": torch.ones(()), "v_descale": torch.ones(())}
    with pytest.raises(ArgumentError, match="q: got dtype torch.float32.*beside k of e4m3"):
        attngen.attention(q.float(), k, v, **one)
    with pytest.raises(ArgumentError, match="keys of e4m3 have no backward pass"):
        attngen.attention(q.bfloat16().requires_grad_(), k, v, **one)

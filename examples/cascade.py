"""Attention to a prefix that requests share, read once for all of them: `python examples/cascade.py [--device cpu]`.

Every request has the keys of the prefix (a system prompt, say) and some of its own. Instead of one call over both, of
which each request reads the prefix anew, there are two, and a merge: the queries of all requests, as one sequence, see
the prefix; those of each request see its own keys; and `attngen.merge_states` makes of the two results that of one call
over all. On the CPU attngen is its simulator, and all is f32; on a GPU all is bf16.
"""

import argparse

import torch
from torch import Tensor

import attngen

HEADS, HEADS_KV, HEAD_DIM = 8, 2, 64
PREFIX = {"cpu": 300, "cuda": 8192}
OWN_KEYS = (5, 1, 130, 64)
QUERIES = (1, 1, 4, 1)  # the last tokens of each request, three of which decode


def starts(lengths: tuple[int, ...], device: str) -> Tensor:
    """Where each of some sequences begins, and where the last one ends."""
    return torch.tensor((0, *lengths), device=device).cumsum(0).int()


def cascade(q: Tensor, prefix: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Out and lse of all requests, by two calls and a merge.

    Args:
        q: (tokens_q, heads, head_dim), the queries of one request after another.
        prefix: keys and values that all share, (keys, heads_kv, head_dim).
        own: keys and values of one request after another, (tokens_k, heads_kv, head_dim).
    """
    device = q.device.type
    # Every query sees the whole prefix: all of them are one sequence of a batch of one, and there is no mask.
    shared = attngen.attention(q[None], prefix[0][None], prefix[1][None], return_lse=True)
    cut = {"cu_seqlens_q": starts(QUERIES, device), "cu_seqlens_k": starts(OWN_KEYS, device)}
    ragged = {"queries": "ragged", "keys": "ragged"}
    kernel = attngen.compile(
        {
            "problem": {"head_dim": HEAD_DIM, **ragged},
            "precision": {"inputs": "f32" if device == "cpu" else "bf16"},
            "mask": "causal",
        },
        arch="simulator" if device == "cpu" else None,
    )
    rest = kernel(q, *own, return_lse=True, **cut)
    outs, lses = (
        [shared[0][0], rest[0]],
        [shared[1][0], rest[1]],
    )  # both (tokens_q, ...) and (heads, tokens_q)
    merged: tuple[Tensor, Tensor] = attngen.merge_states(outs, lses, return_lse=True)
    return merged


def one_call(q: Tensor, prefix: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Out and lse of all requests, each of whose keys are the prefix and its own; arguments as of `cascade`."""
    device, length = q.device.type, len(prefix[0])
    k, v = (
        torch.cat([part for x in whole.split(OWN_KEYS) for part in (shared, x)])
        for shared, whole in zip(prefix, own, strict=True)
    )
    lengths = tuple(length + keys for keys in OWN_KEYS)
    out = attngen.varlen_attn(
        q, k, v, starts(QUERIES, device), starts(lengths, device), max(QUERIES), max(lengths),
        window_size=(-1, 0), enable_gqa=True, return_aux=argparse.Namespace(lse=True),
    )  # fmt: skip
    assert isinstance(out, tuple)
    return out


def main() -> None:
    """Print how far the two ways lie apart, and what the cascade reads less."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    draw = torch.Generator(device).manual_seed(0)
    rows = ((sum(QUERIES), HEADS), *[(PREFIX[device], HEADS_KV)] * 2, *[(sum(OWN_KEYS), HEADS_KV)] * 2)
    q, *kv = (torch.randn(*shape, HEAD_DIM, generator=draw, device=device).to(dtype) for shape in rows)
    prefix, own = (kv[0], kv[1]), (kv[2], kv[3])
    found, wanted = cascade(q, prefix, own), one_call(q, prefix, own)
    for name, x, y in zip(("out", "lse"), found, wanted, strict=True):
        # Each of the three results is rounded to its type once, and sums in f32 differ in their order.
        rounding = 2 * torch.finfo(x.dtype).eps + 1e-6
        apart, size = ((x - y).abs().max().item(), y.abs().max().item())
        says = "as near as rounding lets them" if apart <= rounding * size else "NOT the same"
        print(f"{name}: two calls and a merge, and one call: {says} ({apart:.1e} apart, of up to {size:.2f})")
    read, once = PREFIX[device] + sum(OWN_KEYS), PREFIX[device] * len(OWN_KEYS) + sum(OWN_KEYS)
    print(f"keys read: {read:,} instead of {once:,}")


if __name__ == "__main__":
    main()

"""Calls on a cache in e4m3: descales that are drawn, and the real keys and values that a cache stands for.

The oracles take these; nothing here is shared with the simulator or the kernels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attngen.check.cuts import NO_PAGE
from attngen.check.inputs import Shape
from attngen.check.paging import as_padded
from attngen.dtypes import E4M3, F16, torch_dtype
from attngen.plan import CACHE_SCALES, CacheDescales, CacheScales, Lengths
from attngen.quantize import DESCALES
from attngen.spec import Spec
from attngen.torch_state import torch_defaults

OF_CACHE = DESCALES[1:]
"""What a call passes for a cache: the descales of K and of V."""
CACHE_TYPE, PROBABILITIES = torch_dtype(E4M3), torch_dtype(F16)
"""Of numbers of such a cache, and of P beside it."""


def has_cache(spec: Spec) -> bool:
    """Whether K and V of calls lie in a cache of e4m3, beside queries of 16 bits."""
    return spec.precision.cache == "e4m3"


@torch_defaults()
def drawn_descales(
    spec: Spec, shape: Shape, device: torch.device | str = "cpu", seed: int = 0, are_one: bool = False
) -> dict[str, Tensor]:
    """Descales of a drawn call, by name; none of a spec without a cache. NaN stands where no key counts.

    Args:
        spec: of the call.
        shape: of the call.
        device: where they shall be.
        seed: of what is drawn, from 1/4 to 4.
        are_one: all are 1, so that the numbers of a cache are real ones.
    """
    if not has_cache(spec):
        return {}
    generator = torch.Generator().manual_seed(seed)
    lengths = Lengths(spec.problem.queries, spec.problem.keys)
    tokens_k = shape.keys.rows if shape.keys else 0
    sizes = {
        "batch": shape.batch,
        "num_heads_kv": shape.heads_kv,
        "seqlen_k": shape.stored("k")[1],
        "tokens_k": tokens_k,
        **shape.page_sizes,
    }
    found = {}
    for name in OF_CACHE:
        of = CacheDescales(name, _scales_of(spec), lengths)
        sizes_of = [1] if of.scales == "per_tensor" else [sizes[size] for size in of.shape]
        numbers = torch.randint(-8, 9, sizes_of, generator=generator)
        found[name] = torch.exp2(numbers.float() * (0.0 if are_one else 0.25))
        if of.is_by_key and shape.keys is not None:
            found[name] = _poisoned(found[name], of, shape).contiguous()
    return {name: x.to(device) for name, x in found.items()}


def _scales_of(spec: Spec) -> CacheScales:
    scales = spec.precision.scales
    return next((each for each in CACHE_SCALES if each == scales), "per_head")


def _poisoned(x: Tensor, of: CacheDescales, shape: Shape) -> Tensor:
    """Descales of keys, NaN for keys and pages that no sequence counts."""
    cut = shape.keys
    assert cut is not None
    if cut.kind != "paged":
        rows = cut.unused_rows if cut.kind == "padded" else cut.unused_rows[0]
        return x.masked_fill(rows.unsqueeze(-1), torch.nan)
    table = cut.block_table.long()
    counts = torch.zeros(cut.pool_pages, cut.page, dtype=torch.bool)
    counts[table[table != NO_PAGE]] = ~cut.unused_rows.view(*table.shape, cut.page)[table != NO_PAGE]
    seen = counts.any(1) if of.scales == "per_page" else counts
    return x.masked_fill(~seen.unsqueeze(-1), torch.nan)


@torch_defaults()
def real_cache(
    spec: Spec, k: Tensor, v: Tensor, passed: Mapping[str, Any], layout: str = "bshd"
) -> tuple[Lengths, Tensor, Tensor, dict[str, Any]]:
    """A call on a cache as one of the keys and values that it stands for, f32.

    Args:
        spec: of the call.
        k: as the call takes it, like v.
        v: see k.
        passed: what it passes by name, descales too.
        layout: "bhsd" exchanges seqlen and heads in k and v that have batches.

    Returns:
        how keys are cut, k, v, and what is passed by name without descales. Keys in pages come padded.
    """
    lengths, scales = Lengths(spec.problem.queries, spec.problem.keys), _scales_of(spec)
    others = {name: x for name, x in passed.items() if name not in OF_CACHE}
    descales = [passed[name] for name in OF_CACHE]
    turns = layout == "bhsd" and k.dim() == 4
    k, v = (x.transpose(1, 2).float() if turns else x.float() for x in (k, v))
    if scales == "per_page":
        descales = [x[:, None] for x in descales]
    if CacheDescales("", scales, lengths).is_by_key:
        k, v = (x * descale[..., None] for x, descale in zip((k, v), descales, strict=True))
    cut, k, v, others = as_padded(lengths, k, v, others)
    if not CacheDescales("", scales, lengths).is_by_key:
        k, v = (x * _of_rows(descale, x, cut, others) for x, descale in zip((k, v), descales, strict=True))
    k, v = (x.transpose(1, 2) if turns else x for x in (k, v))
    return cut, k, v, others


def _of_rows(descale: Tensor, x: Tensor, lengths: Lengths, passed: Mapping[str, Any]) -> Tensor:
    """Descales of heads as they multiply rows of heads: of ragged ones each has that of its sequence."""
    if descale.numel() == 1:
        return descale.reshape(())
    if descale.dim() == 1:
        return descale[:, None]
    if not lengths.is_by_token("keys"):
        return descale[:, None, :, None]
    starts = passed["cu_seqlens_k"].long()[1:]
    sequence = torch.searchsorted(starts, torch.arange(len(x), device=x.device), right=True)
    return descale[sequence.clamp(max=len(starts) - 1)][..., None]

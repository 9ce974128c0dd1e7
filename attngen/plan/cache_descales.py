"""Places of the descales of a cache: what its e4m3 numbers are multiplied by to be real ones."""

from dataclasses import dataclass
from typing import Literal, get_args

from attngen.plan.lengths import Lengths

CacheScales = Literal["per_tensor", "per_head", "per_token", "per_page"]
CACHE_SCALES: tuple[CacheScales, ...] = get_args(CacheScales)
"""What shares a descale of a cache: all of it, a head (of a sequence, or of all), a key of a head, a page of a head."""


@dataclass(frozen=True)
class CacheDescales:
    """What the numbers of K or V in a cache are multiplied by: f32 in device memory, any strides.

    Attributes:
        scales: what shares one.
        lengths: how keys are cut, which says where a key lies.
    """

    name: str
    scales: CacheScales
    lengths: Lengths

    @property
    def is_by_key(self) -> bool:
        """Whether keys of a head may have descales of their own; else a tile has one."""
        return self.scales in ("per_token", "per_page")

    @property
    def shape(self) -> tuple[str, ...]:
        """Its dimensions, as names of sizes."""
        if not self.is_by_key:
            return ("batch", "num_heads_kv")
        if self.scales == "per_page":
            return ("pages", "num_heads_kv")
        rows = {"paged": ("pages", "page_size"), "ragged": ("tokens_k",)}
        return (*rows.get(self.lengths.keys, ("batch", "seqlen_k")), "num_heads_kv")

    def __str__(self) -> str:
        return self.name

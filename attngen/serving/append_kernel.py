"""The kernel that appends keys and values to a cache: its parameters and its text."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from attngen.dtypes import DType
from attngen.emit.environment import POINTEES, macros
from attngen.plan import Param
from attngen.serving.lone_kernel import LoneKernel

Rotation = Literal["none", "halves", "interleaved"]
CHUNK = 8
"""Elements of a row that a thread takes at a time."""
MADE = "q_rotated"
"""What the kernel makes, where there is q."""
TENSORS = {
    **dict.fromkeys(("k_new", "v_new", "q"), ("batch", "seqlen", "head")),
    MADE: (),
    **dict.fromkeys(("k_cache", "v_cache"), ("page", "slot", "head")),
    **dict.fromkeys(("cos", "sin"), ("position",)),
    "block_table": ("row", "page"),
    **dict.fromkeys(("k_scale", "v_scale"), ("batch", "head")),
    **dict.fromkeys(("seqused_k", "cu_seqlens_q", "cache_batch_idx", "leftpad_k"), ()),
}
"""What the kernel is passed, and of each tensor the dimensions, first ones, whose steps it takes, in elements."""
SIZES = (
    "batch", "tokens", "seqlen_new", "num_heads_kv", "num_heads_q", "k_chunks", "v_chunks", "rotary_chunks",
    "positions", "page_size", "pages", "max_pages", "rows", "q_advances",
)  # fmt: skip


@dataclass(frozen=True)
class AppendRows(LoneKernel):
    """Write new keys and values to a cache, a block of threads for all heads of a token; rotate K and q first.

    Attributes:
        new: format of keys, values and queries: f16, bf16 or f32.
        cache: format of the cache: f16, bf16, f32 or e4m3.
        rotation: which columns turn together.
        turns: format of the tables of cosines and sines.
    """

    new: DType
    cache: DType
    rotation: Rotation
    turns: DType
    threads: ClassVar[int] = 128
    blocks_per_sm: ClassVar[int] = 8
    """What a multiprocessor has room for at least: said to ptxas, which else spills where elements are divided."""

    @property
    def name(self) -> str:
        """Entry name of the kernel."""
        rotated = "" if self.rotation == "none" else f"_{self.rotation}_{self.turns.name}"
        return f"attn_append_{self.arch.token}_{self.new.name}_to_{self.cache.name}{rotated}"

    @property
    def params(self) -> tuple[Param, ...]:
        """Fields of the struct: a pointer and steps of each tensor, scales that are numbers, sizes."""
        of_tensors = (
            param
            for name, axes in TENSORS.items()
            for param in (
                Param(name, "pointer", f"{name}.ptr"),
                *(Param(f"{name}_stride_{axis}", "i64", f"{name}.stride_{axis}") for axis in axes),
            )
        )
        scales = (Param(name, "f32", name) for name in ("k_scale_of_all", "v_scale_of_all"))
        return (*of_tensors, *scales, *(Param(name, "i32", name) for name in SIZES))

    def body(self) -> str:
        """The text of the kernel and its own functions."""
        of_cache = POINTEES["u8" if self.cache.bits == 8 else self.cache.name]
        return str(macros("serving/append.cuh.j2").AppendRows(self, of_cache))

"""FlashAttention's functions by attngen's kernels, as a kernel that the `kernels` library loads from this folder."""

from attngen.flash_attn import *  # noqa: F403 all of them, and nothing else

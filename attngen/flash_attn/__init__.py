"""FlashAttention's functions, by attngen's kernels: change the line that imports them.

The functions of flash_attn 2 stand here and in `version2`, those of flash_attn_interface in `version3`, those of
flash_attn.cute in `version4`. Names, order and defaults of parameters are theirs, and so are shapes of what is
returned. What has no kernel here is refused by name; nothing is passed over.
"""

from attngen.flash_attn.version2 import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

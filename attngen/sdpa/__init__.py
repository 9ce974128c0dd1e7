"""attngen behind torch.nn.functional.scaled_dot_product_attention: `enable`, and `explain` what becomes of a call."""

from attngen.sdpa.flash_backend import register_flash_attention
from attngen.sdpa.override import disable, enable, enabled
from attngen.sdpa.report import Answer, Report, explain

__all__ = ["Answer", "Report", "disable", "enable", "enabled", "explain", "register_flash_attention"]

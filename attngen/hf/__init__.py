"""attngen in models of Hugging Face transformers: `register()` once, then `attn_implementation="attngen"`.

transformers is imported by `register`, and not before.
"""

from inspect import signature

NAME = "attngen"
"""What `attn_implementation` says. Names with "flash", "sdpa" or a slash in them mean other things to transformers."""


def register() -> None:
    """Make `attn_implementation="attngen"` known to transformers: how attention is computed, and what masks are.

    Models that are loaded or built with it, or get it by `model.set_attn_implementation("attngen")`, call attngen's
    kernels in every layer; CPU tensors run on the simulator. Nothing else of transformers changes, and calling it again
    changes nothing. What a layer asks for and no kernel serves raises `attngen.ModelError`.

    Raises:
        ToolchainError: transformers is not installed, or older than 5.6.
    """
    from attngen.errors import ToolchainError

    cure = "pip install 'attngen[hf]'"
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, __version__, masking_utils
    except ImportError as error:
        raise ToolchainError(
            f"transformers with an interface for attention is not here: {error}", cure
        ) from None
    if "q_offset" not in signature(masking_utils.sdpa_mask).parameters:
        raise ToolchainError(f"transformers {__version__} tells masks no offsets, as 5.6 and later do", cure)
    from attngen.hf.model_attention import attend
    from attngen.hf.model_masks import make_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)

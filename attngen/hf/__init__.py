"""attngen in models of Hugging Face transformers: `register()` once, then `attn_implementation="attngen"`.

transformers is imported by `register`, and not before.
"""

NAME = "attngen"
"""What `attn_implementation` says. Names with "flash", "sdpa" or a slash in them mean other things to transformers."""


def register() -> None:
    """Make `attn_implementation="attngen"` known to transformers: how attention is computed, and what masks are.

    Models that are loaded or built with it, or get it by `model.set_attn_implementation("attngen")`, call attngen's
    kernels in every layer; CPU tensors run on the simulator. Nothing else of transformers changes, and calling it again
    changes nothing. What a layer asks for and no kernel serves raises `attngen.ModelError`.

    Raises:
        ToolchainError: transformers is not installed, or older than the version that lets attention be registered.
    """
    from attngen.errors import ToolchainError

    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        message = f"transformers cannot be imported, or is older than 5.0: {error}"
        raise ToolchainError(message, "pip install 'attngen[hf]'") from None
    from attngen.hf.model_attention import attend
    from attngen.hf.model_masks import make_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)

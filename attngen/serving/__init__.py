"""What serving does beside attention: merging partial results. Each is one launch of a kernel of its own."""

from attngen.serving.merging import merge_states

__all__ = ["merge_states"]

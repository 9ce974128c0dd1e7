"""What serving does beside attention: caches are appended to, partial results merged; each by a kernel of its own."""

from attngen.serving.appending import append
from attngen.serving.merging import merge_states

__all__ = ["append", "merge_states"]

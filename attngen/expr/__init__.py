"""The expression language of masks and scores: one hash-consed tree and its readings.

Text to tree (`parse_mask`, `parse_score`), tree to text (`to_text`), to CUDA (`to_cuda`), to a torch value
(`evaluate`), and to the range of keys a query sees (`key_range`, `extremes`).
"""

from attngen.expr.cuda import to_cuda
from attngen.expr.keys import KeyRange, extremes, key_range
from attngen.expr.logic import conjunction, disjunction, equal, less, less_equal, negate
from attngen.expr.parse import Locate, definitions, parse_mask, parse_score
from attngen.expr.text import to_text
from attngen.expr.torch_value import evaluate
from attngen.expr.tree import (
    FALSE,
    INDEX_NAMES,
    LARGEST_INDEX,
    LARGEST_LENGTH,
    LARGEST_TILE,
    TRUE,
    Expr,
    add,
    affine,
    affine_parts,
    const,
    free_names,
    name,
    scale,
    sub,
    substitute,
)

__all__ = [
    "FALSE",
    "INDEX_NAMES",
    "LARGEST_INDEX",
    "LARGEST_LENGTH",
    "LARGEST_TILE",
    "TRUE",
    "Expr",
    "KeyRange",
    "Locate",
    "add",
    "affine",
    "affine_parts",
    "conjunction",
    "const",
    "definitions",
    "disjunction",
    "equal",
    "evaluate",
    "extremes",
    "free_names",
    "key_range",
    "less",
    "less_equal",
    "name",
    "negate",
    "parse_mask",
    "parse_score",
    "scale",
    "sub",
    "substitute",
    "to_cuda",
    "to_text",
]

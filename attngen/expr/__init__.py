"""The expression language of masks and scores: one hash-consed tree and its readings.

Text to tree (`parse_mask`, `parse_score`), tree to text (`to_text`), to CUDA (`to_cuda`), to a torch value
(`evaluate`), to static ranges (`index_range`, `real_range`), to the range of keys a query sees (`key_range`,
`extremes`), and to conditions over a tile (`tile_classes`).
"""

from attngen.expr.boundaries import Boundary
from attngen.expr.cuda import Body, Leaves, c_type, cuda_body, places_of, to_cuda
from attngen.expr.declarations import (
    NO_DECLARATIONS,
    PAGE_SIZES,
    SINK,
    SIZE_NAMES,
    TOKENS,
    VALUE_TYPES,
    Declarations,
    Definition,
    Scalar,
    TensorType,
)
from attngen.expr.declare import read_declarations
from attngen.expr.derivative import derivative
from attngen.expr.given_blocks import (
    ALL_KEPT,
    GIVEN_BLOCKS,
    SOME_KEPT,
    block_sizes,
    blocks_of_tile,
    kept_block,
    mask_of_pairs,
    most_blocks,
    without_blocks,
)
from attngen.expr.gradient_sites import GradientSite, Owner, gradient_sites
from attngen.expr.index_range import IndexRange, extremes, key_range, row_range
from attngen.expr.key_conditions import shown_keys
from attngen.expr.logic import conjunction, disjunction, equal, less, less_equal, negate
from attngen.expr.parse import definitions, ignores_score, parse_mask, parse_score
from attngen.expr.ranges import index_range, never_holds
from attngen.expr.real_ranges import magnitude, real_range
from attngen.expr.scope import LocateOf, check_definitions, prelude
from attngen.expr.syntax import Locate
from attngen.expr.tables import Table
from attngen.expr.text import to_text
from attngen.expr.tile_classes import TileClasses, tile_classes
from attngen.expr.torch_boundaries import find_boundaries
from attngen.expr.torch_tables import fill_tables
from attngen.expr.torch_value import evaluate
from attngen.expr.tree import (
    FALSE,
    INDEX_NAMES,
    LARGEST_INDEX,
    LARGEST_LENGTH,
    LARGEST_TILE,
    TILE_NAMES,
    TRUE,
    Expr,
    add,
    affine,
    affine_parts,
    const,
    found_of,
    free_names,
    name,
    nodes,
    scalar,
    scale,
    sub,
    tensor_names,
    with_nodes,
)
from attngen.expr.weights import LARGEST_INLINE, LARGEST_KERNEL, WEIGHT_OF_TABLE, weight

__all__ = [
    "ALL_KEPT",
    "FALSE",
    "GIVEN_BLOCKS",
    "INDEX_NAMES",
    "LARGEST_INDEX",
    "LARGEST_INLINE",
    "LARGEST_KERNEL",
    "LARGEST_LENGTH",
    "LARGEST_TILE",
    "NO_DECLARATIONS",
    "SINK",
    "SIZE_NAMES",
    "SOME_KEPT",
    "TILE_NAMES",
    "PAGE_SIZES",
    "TOKENS",
    "TRUE",
    "VALUE_TYPES",
    "WEIGHT_OF_TABLE",
    "Body",
    "Boundary",
    "Declarations",
    "Definition",
    "Expr",
    "GradientSite",
    "IndexRange",
    "Leaves",
    "Locate",
    "LocateOf",
    "Owner",
    "Scalar",
    "Table",
    "TensorType",
    "TileClasses",
    "add",
    "affine",
    "affine_parts",
    "block_sizes",
    "blocks_of_tile",
    "c_type",
    "check_definitions",
    "conjunction",
    "const",
    "cuda_body",
    "definitions",
    "derivative",
    "disjunction",
    "equal",
    "evaluate",
    "extremes",
    "fill_tables",
    "find_boundaries",
    "found_of",
    "free_names",
    "gradient_sites",
    "ignores_score",
    "index_range",
    "kept_block",
    "key_range",
    "less",
    "less_equal",
    "magnitude",
    "mask_of_pairs",
    "most_blocks",
    "name",
    "negate",
    "never_holds",
    "nodes",
    "parse_mask",
    "parse_score",
    "places_of",
    "prelude",
    "read_declarations",
    "real_range",
    "row_range",
    "scalar",
    "scale",
    "shown_keys",
    "sub",
    "tensor_names",
    "tile_classes",
    "to_cuda",
    "to_text",
    "weight",
    "with_nodes",
    "without_blocks",
]

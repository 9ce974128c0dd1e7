"""Binding: what a call passes is checked, and becomes what it launches and allocates; for the GPU and the simulator."""

from attngen.bind.arguments import (
    PAGE_LAYOUTS,
    Given,
    check_arguments,
    check_length,
    check_rows_of_heads,
    q_types,
)
from attngen.bind.binder import Allocation, Bound, Region, bind
from attngen.bind.block_lists import BLOCKS, spread_blocks
from attngen.bind.declared import check_declared, declared_by
from attngen.bind.gradient_memory import check_differentiable, gradient_memory
from attngen.bind.kept import TableSignature, TileTables, made_of, passed_as
from attngen.bind.numbers import python_number, scalar_of, softmax_scale_of
from attngen.bind.operands import operands_of, spread_operands
from attngen.bind.overlap import check_overlap, extent
from attngen.bind.page_arguments import check_pages
from attngen.bind.sequences import bound_of_lengths, check_lengths, sequence_sizes
from attngen.bind.sorted_values import check_sorted
from attngen.bind.tensors import (
    ROW_ALIGNMENT,
    check_alignment,
    check_kept,
    check_no_derivative,
    check_no_tangent,
    check_not_recorded,
    check_plain,
)
from attngen.bind.writable import check_writable

__all__ = [
    "BLOCKS",
    "PAGE_LAYOUTS",
    "ROW_ALIGNMENT",
    "Allocation",
    "Bound",
    "Given",
    "Region",
    "TableSignature",
    "TileTables",
    "bind",
    "bound_of_lengths",
    "check_alignment",
    "check_arguments",
    "check_declared",
    "check_differentiable",
    "check_kept",
    "check_length",
    "check_lengths",
    "check_no_derivative",
    "check_no_tangent",
    "check_not_recorded",
    "check_overlap",
    "check_pages",
    "check_plain",
    "check_rows_of_heads",
    "check_sorted",
    "check_writable",
    "extent",
    "made_of",
    "passed_as",
    "declared_by",
    "gradient_memory",
    "operands_of",
    "python_number",
    "q_types",
    "scalar_of",
    "sequence_sizes",
    "softmax_scale_of",
    "spread_blocks",
    "spread_operands",
]

"""What a spec declares for its expressions: scalars, tensors and definitions."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from attngen.expr.arithmetic import call
from attngen.expr.tree import Expr, Type, add, const, lookup, name, scalar, sub

SIZE_NAMES = ("batch", "num_heads_q", "num_heads_kv", "seqlen_q", "seqlen_k")
"""The sizes of every call that a tensor's dimension may be; any other name is bound by the tensor that comes first."""

PAGE_SIZES = ("pages", "page_size", "max_pages", "table_rows")
"""Sizes of calls whose keys lie in pages: of a cache, of each page, of a row of the table, and its rows."""
TOKENS: Mapping[str, str] = MappingProxyType({"tokens_q": "q_idx", "tokens_k": "kv_idx"})
"""Sizes of calls with ragged lengths, and the index that counts a sequence's own part of such a dimension."""

SINK = "sink"
"""By which name a call passes a learned sink, where a spec has one, and `gradients` ask for its gradient."""

VALUE_TYPES: Mapping[str, Type] = MappingProxyType(
    {"bool": "bool", "u8": "i32", "i32": "i32", "f16": "f32", "bf16": "f32", "f32": "f32"}
)
"""The type that an element of a tensor has in an expression, by the tensor's number format."""

SORTED = "sorted"
"""The word behind a tensor's dimensions that says that its values never fall along the last of them."""
SORTED_DIMENSIONS = ("seqlen_q", "seqlen_k", "tokens_q", "tokens_k")
"""What the last dimension of such a tensor may be; of tokens it is sorted within each sequence."""


@dataclass(frozen=True)
class Scalar:
    """A number or truth value that every call may pass by keyword.

    Attributes:
        default: what a call that says nothing passes; None where every call must say.
    """

    name: str
    type: Type
    default: int | float | bool | None = None

    @property
    def expr(self) -> Expr:
        """The scalar in a tree."""
        return scalar(self.name, self.type)


@dataclass(frozen=True)
class TensorType:
    """A tensor that every call must pass by keyword.

    Attributes:
        dtype: a key of `VALUE_TYPES`.
        dims: a size of the call, a number, or a name that this declaration binds.
        is_sorted: values never fall along the last dimension; calls are trusted in that.
    """

    name: str
    dtype: str
    dims: tuple[str | int, ...]
    is_sorted: bool = False

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.dims))}]{f' {SORTED}' * self.is_sorted}"

    def at(self, *indices: Expr) -> Expr:
        """An element in a tree; along tokens indices count from where the sequence begins, and end where it does."""
        places = (_within_tokens(index, dim) for index, dim in zip(indices, self.dims, strict=True))
        return lookup(self.name, tuple(places), VALUE_TYPES[self.dtype])


def _within_tokens(index: Expr, dim: str | int) -> Expr:
    """The place of an index among the tokens of all sequences; what passes its sequence's end is kept within."""
    if dim not in TOKENS:
        return index
    own = TOKENS[str(dim)]
    if index is not name(own):
        last = sub(name("seqlen_q" if own == "q_idx" else "seqlen_k"), const(1))
        index = call("max", call("min", index, last), const(0))
    return add(index, name(f"{own}.start"))


@dataclass(frozen=True)
class Definition:
    """A name for an expression, `causal`, or a function of expressions, `window(left, right)`.

    Attributes:
        defaults: what the last parameters are where a call leaves them out.
    """

    name: str
    parameters: tuple[str, ...]
    text: str
    defaults: tuple[Expr, ...] = ()


@dataclass(frozen=True)
class Declarations:
    """All that a spec declares, by name.

    Attributes:
        blocks: queries and keys of a block of the map that tells which are kept (`given_blocks.py`); None where calls
            pass no map.
    """

    scalars: Mapping[str, Scalar] = field(default_factory=dict)
    tensors: Mapping[str, TensorType] = field(default_factory=dict)
    definitions: Mapping[str, Definition] = field(default_factory=dict)
    blocks: tuple[int, int] | None = None

    @property
    def sorted_tensors(self) -> frozenset[str]:
        """The names of the tensors that are declared sorted."""
        return frozenset(tensor.name for tensor in self.tensors.values() if tensor.is_sorted)


NO_DECLARATIONS = Declarations()

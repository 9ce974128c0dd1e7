"""Steps of the matrix products.

Which axis a product contracts, and how its operands lie in memory, follows from the axes of the three places: S = Q Kᵀ
contracts columns of both, O = P V keys, which are rows of V unless V is transposed.
"""

from dataclasses import dataclass

from attngen.dtypes import E4M3
from attngen.errors import InternalError
from attngen.plan.places import Axis, RegTile, View
from attngen.plan.steps.step import Step


@dataclass(frozen=True)
class Product:
    """acc = A B, or acc += A B: contracted over the axis of both operands.

    Attributes:
        acc: (rows of the product, its columns).
        a, b: operands; `a` may be in registers.
        starts_at_zero: whether what acc held does not count.
        first_column: of B, where it has more columns than acc.

    Raises:
        InternalError: the axes are not those of a product.
    """

    acc: RegTile
    a: View | RegTile
    b: View
    starts_at_zero: bool
    first_column: int = 0

    def __post_init__(self) -> None:
        a, b = set(self.a.axes), set(self.b.axes)
        if len(a & b) != 1 or self.acc.axes != (*(a - b), *(b - a)):
            places = ", ".join(f"{place} {place.axes}" for place in (self.acc, self.a, self.b))
            raise InternalError(f"these are not the axes of a product and its operands: {places}")

    @property
    def contracted(self) -> Axis:
        """The axis of both operands."""
        return next(axis for axis in self.a.axes if axis in self.b.axes)

    @property
    def a_is_transposed(self) -> bool:
        """Whether rows of A are contracted (MN-major), rather than its columns (K-major)."""
        return self.a.axes[0] == self.contracted

    @property
    def b_is_transposed(self) -> bool:
        """Whether columns of B are contracted (K-major), rather than its rows (MN-major)."""
        return self.b.axes[1] == self.contracted

    @property
    def depth(self) -> int:
        """How many elements of a row and a column are multiplied."""
        return self.b.buffer.cols if self.b_is_transposed else self.b.buffer.rows

    def __str__(self) -> str:
        a, b = f"{self.a}{'ᵀ' * self.a_is_transposed}", f"{self.b}{'ᵀ' * self.b_is_transposed}"
        some = f", columns from {self.first_column} on" if self.first_column else ""
        return f"{self.acc} {'=' if self.starts_at_zero else '+='} {a} {b}{some}"


@dataclass(frozen=True)
class Gemm(Product, Step):
    """A product that is there when the Step ends.

    Attributes:
        unroll: k-steps of the matrix instruction that are written out; fewer need fewer registers. None for all.
    """

    unroll: int | None = None

    @property
    def leaves_even_columns_first(self) -> bool:
        """Whether of every 16 columns of acc the even ones come first, then the odd ones.

        So rows of e4m3 are contracted that become f16 in registers: ldmatrix moves pairs of bytes, two neighbouring
        columns of a key, which fall to two instructions.
        """
        return self.b.buffer.dtype is E4M3 and not self.b_is_transposed

    def __str__(self) -> str:
        return super().__str__()


@dataclass(frozen=True)
class IssueGemm(Product, Step):
    """Start a product on the tensor core, and close the group. Asynchronous: see WaitGemm.

    Attributes:
        kept: the first columns of A, in registers; they are not read from shared memory.
    """

    kept: RegTile | None = None

    def __str__(self) -> str:
        kept = f", {self.kept.cols} columns as {self.kept}" if self.kept else ""
        return f"issue {super().__str__()}{kept}"


@dataclass(frozen=True)
class KeepColumns(Step):
    """Read the first columns of the warpgroup's own rows of an operand to registers, as products want them."""

    dst: RegTile
    src: View

    def __str__(self) -> str:
        return f"keep {self.dst} <- {self.dst.cols} columns of {self.src}"


@dataclass(frozen=True)
class WaitGemm(Step):
    """Wait until at most `pending` groups of this warpgroup's GEMMs are in flight, the newest ones.

    Attributes:
        lands: the register tiles that are the warpgroup's own again: accumulators and A operands.
    """

    pending: int
    lands: tuple[RegTile, ...]

    def __str__(self) -> str:
        newest = f", {self.pending} newest may be in flight" if self.pending else ""
        return f"wait for {', '.join(map(str, self.lands))}{newest}"

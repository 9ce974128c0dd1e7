"""Steps of the two matrix products, S = Q Kᵀ and O = P V."""

from dataclasses import dataclass

from attngen.plan.places import RegTile, View
from attngen.plan.steps.step import Step


@dataclass(frozen=True)
class ScoreGemm(Step):
    """acc = a bᵀ, both row by row in shared memory (contraction over their columns). Synchronous.

    Attributes:
        unroll: k-steps of the matrix instruction that are written out; fewer need fewer registers.
    """

    acc: RegTile
    a: View
    b: View
    unroll: int

    def __str__(self) -> str:
        return f"{self.acc} = {self.a} {self.b}ᵀ"


@dataclass(frozen=True)
class OutputGemm(Step):
    """acc += a b, a in registers, the rows of b in shared memory contracted. Synchronous."""

    acc: RegTile
    a: RegTile
    b: View

    def __str__(self) -> str:
        return f"{self.acc} += {self.a} {self.b}"


@dataclass(frozen=True)
class IssueScoreGemm(Step):
    """Start acc = a bᵀ on the tensor core, both in shared memory, and close the group. Asynchronous.

    Attributes:
        starts_at_zero: if not, acc += a bᵀ instead.
    """

    acc: RegTile
    a: View
    b: View
    starts_at_zero: bool = True

    def __str__(self) -> str:
        return f"issue {self.acc} {'=' if self.starts_at_zero else '+='} {self.a} {self.b}ᵀ"


@dataclass(frozen=True)
class IssueOutputGemm(Step):
    """Start acc += a b, a in registers, the keys of b in shared memory contracted, and close the group.

    Attributes:
        starts_at_zero: acc = a b instead.
        first_column: of b, where it has more columns than acc.
    """

    acc: RegTile
    a: RegTile
    b: View
    starts_at_zero: bool = False
    first_column: int = 0

    def __str__(self) -> str:
        some = f", columns from {self.first_column} on" if self.first_column else ""
        return f"issue {self.acc} {'=' if self.starts_at_zero else '+='} {self.a} {self.b}{some}"


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

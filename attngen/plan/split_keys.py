"""Keys of a tile that are cut into parts: how long these are, and the sheet that merges what they have come to."""

from dataclasses import dataclass

from attngen.plan.formulas import Formula
from attngen.plan.sheets import SheetInText
from attngen.plan.steps import FinishRows, walk


@dataclass(frozen=True)
class MergeParts(SheetInText):
    """Merge the parts of each tile whose keys are cut: O and lse, under the largest of their maxima, in a fixed order.

    Rows of a tile are dealt out to the blocks of threads of its parts. It takes the struct of the kernel.

    Attributes:
        plan: the kernel that leaves the parts.
    """

    word = "merge"
    threads = 128

    @property
    def reads(self) -> tuple[str, ...]:
        """What the kernel leaves of each part, and the list that says which there are."""
        return (*(place.name for place in self.plan.parts), self.plan.tile_list)

    @property
    def writes(self) -> tuple[str, ...]:
        """What the kernel writes of tiles that are not cut."""
        return (
            *(tensor.name for tensor in self.plan.outputs),
            *(rows.name for rows in self.plan.written_rows),
        )

    @property
    def finish(self) -> FinishRows:
        """How the kernel finishes rows."""
        return next(step for step in walk(self.plan.worker.program) if isinstance(step, FinishRows))

    @property
    def tiles(self) -> Formula:
        """Those of the kernel."""
        return self.plan.tiles

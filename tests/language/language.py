"""One run over random expressions: what is said of them on the CPU, and on a GPU what they come to."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.language.classes import ClassFailure, fuzz_classes
from tests.language.elementwise import Drawn, Mismatch, check_elementwise, draw_expressions, modules
from tests.language.functions import Measured, measure_functions
from tests.language.tiles_on_gpu import WrongTile, check_tiles

EXPRESSIONS = 1000
"""Expressions of a run that does not say how many."""
CLASSED = 50
"""Masks of each module whose tiles a GPU classes; a probe of tiles compiles longer than one of values."""


@dataclass
class LanguageReport:
    """What a run found.

    Attributes:
        expressions: that were tried.
        classed: masks among them whose tiles a GPU classed.
        failure: of a mask on the CPU, made small.
        mismatches: values that a GPU computed otherwise.
        wrong_tiles: tiles and tables that it classed or filled otherwise.
        functions: the largest errors of exact and of fast functions.
    """

    seed: int
    device: str
    expressions: int = 0
    classed: int = 0
    failure: ClassFailure | None = None
    mismatches: list[Mismatch] = field(default_factory=list)
    wrong_tiles: list[WrongTile] = field(default_factory=list)
    functions: dict[str, list[Measured]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether all of it is as it is said to be."""
        measured = [each for found in self.functions.values() for each in found]
        return not (self.failure or self.mismatches or self.wrong_tiles) and all(each.ok for each in measured)

    def __str__(self) -> str:
        lines = [f"{kind}: {each}" for kind, found in self.functions.items() for each in found]
        what = f"{self.expressions} expressions on {self.device}, seed {self.seed}"
        classed = f", tiles of {self.classed} masks" if self.classed else ""
        lines.append(f"{'ok' if self.ok else 'FAILED'}: {what}{classed}")
        lines += [str(self.failure)] if self.failure else []
        # The shortest text tells most; the rest may follow from the same fault.
        for found in (self.mismatches, self.wrong_tiles):
            if found:
                shortest = min(found, key=lambda each: len(each.text))
                lines.append(
                    f"{len(found)} {'values' if found is self.mismatches else 'classes'} wrong, such as"
                )
                lines.append(str(shortest))
        return "\n".join(lines)


def fuzz_language(
    expressions: int = EXPRESSIONS,
    device: str = "cpu",
    seed: int = 0,
    target: str = "",
) -> LanguageReport:
    """Try random expressions.

    Args:
        expressions: how many.
        device: "cpu" compares ranges and classes of tiles with all pairs; "cuda" also compares a GPU's values, classes
            and tables with torch's and the simulator's, and measures functions.
        seed: of everything that is drawn.
        target: of the GPU; the CPU needs none.

    Raises:
        ToolchainError: there is no such device.
    """
    report = LanguageReport(seed, device)
    report.failure = fuzz_classes(expressions, seed)
    if device != "cpu":
        for exact, kind in ((True, "in masks"), (False, "in scores")):
            report.functions[kind] = measure_functions(target, exact, device)
        for number, batch in enumerate(modules(draw_expressions(expressions, seed))):
            report.mismatches += check_elementwise(batch, target, seed + number, device)
            masks = masks_among(batch)[:CLASSED]
            report.wrong_tiles += check_tiles(masks, target, seed + number, device)
            report.classed += len(masks)
    report.expressions = expressions
    return report


def masks_among(drawn: Sequence[Drawn]) -> list[Drawn]:
    """The conditions that need no score."""
    return [each for each in drawn if each.expr.type == "bool"]

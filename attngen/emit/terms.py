"""What a kernel asks of the spec, read off its Steps and the blocks it visits, and what it looks up once for a tile."""

from attngen.expr import Expr, free_names, nodes
from attngen.plan import KernelPlan, walk
from attngen.plan.steps import (
    HidePairs,
    MaskScores,
    MaskScoresEach,
    ModifyScores,
    RecoverP,
    SeedScores,
    ZeroHidden,
)


def scores_of(plan: KernelPlan) -> tuple[Expr, ...]:
    """What the Steps make of a product: what it is added to, and what becomes of the sum."""
    found: dict[Expr, None] = {}
    for step in walk(plan.worker.program):
        if isinstance(step, SeedScores):
            found[step.added] = None
        elif isinstance(step, ModifyScores | RecoverP) and step.score is not None:
            found[step.score] = None
    return tuple(found)


def expressions_of(plan: KernelPlan) -> tuple[Expr, ...]:
    """All that a kernel works out of pairs and blocks, and its tables of lookups."""
    masks: list[Expr] = []
    for step in walk(plan.worker.program):
        if isinstance(step, MaskScoresEach | RecoverP | HidePairs) and step.mask is not None:
            masks.append(step.mask)
        elif isinstance(step, MaskScores):
            masks += (*step.visible.lower, *step.visible.upper)
        elif isinstance(step, ZeroHidden):
            masks.append(step.shown)
    blocks = plan.key_blocks.bounds if plan.key_blocks else ()
    classes = (plan.tile_classes.may, plan.tile_classes.must) if plan.tile_classes else ()
    return (*scores_of(plan), *masks, *blocks, *classes, *(table.lookup for table in plan.tables))


def score_terms(plan: KernelPlan) -> dict[Expr, str]:
    """What scores look up that is the same for all pairs of a tile, as a field each of the tile's terms.

    A load in the loop would stand between the GEMMs.
    """
    found: dict[Expr, str] = {}
    for each in nodes(*scores_of(plan)):
        if each.op == "lookup" and not free_names(each) & {"q_idx", "kv_idx", "score"}:
            found[each] = f"term{len(found)}_{each.name}"
    inner = {arg for each in found for arg in nodes(*each.args)}
    return {each: name for each, name in found.items() if each not in inner}

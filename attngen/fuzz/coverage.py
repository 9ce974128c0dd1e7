"""What the cases of a run have met: schedules, formats, masks, lengths beside the tiles' edges, strides, properties.

Read off cases and plans, without running anything.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from rich.table import Table

from attngen.check.inputs import Shape
from attngen.expr import free_names, key_range, tensor_names
from attngen.fuzz.case import Case
from attngen.plan import KernelPlan
from attngen.plan.hardware_rules import takes_warpgroups

Met = tuple[str, str]
"""A dimension and a value of it: ("schedule", "fa2")."""


def met_by(case: Case, plan: KernelPlan) -> Iterator[Met]:
    """What one case meets."""
    shape = case.shape
    dims = case.spec.problem.head_dim
    yield ("target", plan.arch.name)
    yield ("schedule", plan.schedule)
    yield ("dtype", plan.inputs.name)
    yield ("head_dim", str(dims.qk) if dims.qk == dims.v else f"{dims.qk}/{dims.v}")
    yield ("stages", str(plan.stages))
    yield ("order", case.spec.schedule.order)
    if takes_warpgroups(plan):
        yield ("warpgroups", str(plan.worker.warpgroups))
        yield ("overlap", "yes" if plan.overlap else "no")
        yield ("persistent", "yes" if plan.scheduler.persistent else "no")
    yield ("mask", _mask_class(plan))
    yield (
        "score",
        "plain" if not plan.has_score else "looks up" if tensor_names(plan.score) else "modified",
    )
    declared = {"scalars": plan.declarations.scalars, "tensors": plan.declarations.tensors}
    yield from (("declared", kind) for kind in [kind for kind in declared if declared[kind]] or ["nothing"])
    yield ("sink", case.spec.sink)
    yield ("split", "none" if plan.split is None else "auto" if plan.split.keys is None else "keys")
    yield ("blocks", "given" if case.spec.blocks else "none")
    yield from _sequences_met(shape, plan)
    of_axis = [("seqlen_q", shape.seqlen_q, plan.block_m), ("seqlen_k", shape.seqlen_k, plan.block_n)]
    if shape.cuts:
        of_axis = [
            (axis, length, block)
            for lengths in shape.lengths
            for (axis, _, block), length in zip(of_axis, lengths, strict=True)
        ]
    for axis, length, block in of_axis:
        if length == 0:
            yield (axis, "0")
        for name, unit in (("8", 8), ("16", 16), ("block", block)):
            for beside, text in ((-1, " - 1"), (0, ""), (1, " + 1")):
                if length > 0 and (length - beside) % unit == 0 and length - beside > 0:
                    yield (axis, name + text)
    if shape.heads_kv:
        yield ("group", str(shape.heads // shape.heads_kv))
    yield ("batch", str(shape.batch) if shape.batch < 3 else "3 and more")
    yield ("memory", case.memory)
    yield ("layout", case.layout)
    yield ("inputs", case.kind)
    if plan.quantizer is not None:
        yield ("scales", plan.quantizer.scales)
        yield ("incoherent", "none" if plan.quantizer.hadamard_seed is None else "hadamard")
        yield ("promote", "never" if case.spec.precision.promote == 0 else "every block")
    if plan.descales:
        yield ("cache", plan.descales[0].scales)
    scale = case.softmax_scale
    yield (
        "scale",
        "default" if scale is None else "zero" if scale == 0 else "negative" if scale < 0 else "positive",
    )
    has_gradients = bool(case.spec.gradients)
    yield ("gradients", ("of out and lse" if case.has_dlse else "of out") if has_gradients else "none")
    if has_gradients:
        yield ("sums of gradients", "in one order" if case.spec.deterministic else "in any order")
    yield ("property", case.rule)
    yield ("torch", case.state)


def _sequences_met(shape: Shape, plan: KernelPlan) -> Iterator[Met]:
    """What is met of sequences with lengths of their own."""
    yield ("queries x keys", f"{plan.lengths.queries} x {plan.lengths.keys}")
    if plan.lengths.is_paged("keys"):
        yield ("pages", "in pieces" if plan.takes_pieces else "by row")
    for letter, cut in shape.cuts.items():
        if cut.skipped:
            yield ("rows that do not count", "before keys")
        if cut.unused:
            yield ("rows that do not count", f"behind sequences of {letter}")
        if cut.tail:
            yield ("rows that do not count", f"behind all {letter}")
        if sorted(cut.lengths)[:-1] and sum(cut.lengths) < 2 * max(cut.lengths):
            yield ("sequences", f"one long {letter}")


def _mask_class(plan: KernelPlan) -> str:
    if plan.mask_text in ("full", "causal"):
        return plan.mask_text
    if plan.boundaries:
        return "boundaries"
    if free_names(plan.mask) & {"b", "h", "h_kv"}:
        return "by head"
    return "no closed form" if key_range(plan.mask) is None else "one range"


class Coverage:
    """Counts of cases by what they met; a case counts once for each."""

    def __init__(self, meets: Callable[[Case, KernelPlan], Iterable[Met]] = met_by) -> None:
        """Count what a function finds in each case."""
        self._meets = meets
        self.cases = 0
        self.counts: Counter[Met] = Counter()

    def add(self, case: Case, plan: KernelPlan) -> None:
        """Count a case."""
        self.cases += 1
        self.counts.update(dict.fromkeys(self._meets(case, plan), 1))

    def table(self) -> Table:
        """The counts, a line for each dimension."""
        table = Table(title=f"{self.cases} cases met", title_justify="left", show_edge=False)
        table.add_column("what", no_wrap=True)
        table.add_column("cases")
        for dimension in dict.fromkeys(name for name, _ in self.counts):
            met = {value: n for (name, value), n in self.counts.items() if name == dimension}
            values = sorted(met, key=_natural)
            table.add_row(dimension, "  ".join(f"[bold]{value}[/] {met[value]}" for value in values))
        return table


def _natural(value: str) -> tuple[int, str]:
    """Numbers by size, then words."""
    first = value.partition("/")[0]
    return (int(first), value) if first.isdigit() else (1 << 30, value)

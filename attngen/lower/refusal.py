"""Refusals: what a spec asks for that no plan can give, drawn where it is asked, with the nearest that would do.

The rules are `plan.rules`'; here their violations become diagnostics, beside what is refused before there is a plan.
"""

from collections.abc import Callable

from attngen.arch import ARCHS, Arch
from attngen.errors import Diagnostic
from attngen.expr import (
    LARGEST_INLINE,
    LARGEST_KERNEL,
    LARGEST_TILE,
    WEIGHT_OF_TABLE,
    weight,
)
from attngen.lower.choice import KNOBS, WARP_FIELDS, WARPGROUP_FIELDS
from attngen.lower.features import Features
from attngen.plan.hardware_rules import COSTS, MOST_STAGES, MOST_WARPGROUPS, OWNERS_OF_ROWS, Blame, Violation
from attngen.schedules import SCHEDULES, WARPGROUP_SCHEDULES
from attngen.spec import Spec

SCHEDULE_OF_PAGES = "fa2"
"""The schedule whose copies look up the page of each row of K and V."""
Passes = Callable[[str, int], bool]
"""Whether every rule passes with another value of one of the `KNOBS`."""


def diagnostics(
    spec: Spec, features: Features, violations: tuple[Violation, ...], passes: Passes
) -> tuple[Diagnostic, ...]:
    """The broken rules, each drawn where the spec says the value, with the nearest values that pass every rule.

    A rule that is broken by values left open alone is told where no other is. What a tile costs whose rows have no
    owner is not told where other owners or rows would do: those mend it too.
    """
    told: list[Diagnostic] = []
    said = [
        broken for broken in violations if any(KNOBS[each.path] in features.given for each in broken.blames)
    ]
    for broken in said or violations:
        is_mended = any(cause.rule in OWNERS_OF_ROWS and cause.nearest for cause in told)
        if broken.rule not in COSTS or not is_mended:
            told.append(_diagnostic(spec, features, broken, passes))
    return tuple(told)


def faults_of(violations: tuple[Violation, ...]) -> int:
    """How many rules are broken; costs of rows that have no owner do not count."""
    rules = [broken.rule for broken in violations]
    has_owners = set(rules).isdisjoint(OWNERS_OF_ROWS)
    return sum(has_owners or rule not in COSTS for rule in rules)


def _diagnostic(spec: Spec, features: Features, broken: Violation, passes: Passes) -> Diagnostic:
    """By the first value that the spec gives and that has another that would do; values left to auto are nobody's."""
    told = [
        Diagnostic(
            message=f"{each.path} = {each.value} {each.must}",
            rule=broken.rule,
            location=spec.locate(each.path),
            path=each.path,
            value=each.value,
            note=each.note,
            nearest=tuple(str(value) for value in _nearest(features.arch, each, passes)),
        )
        for each in _by_given_values(features, broken)
    ]
    return next((each for each in told if each.nearest), told[0])


def _by_given_values(features: Features, broken: Violation) -> list[Blame]:
    """The values that the spec gives and a broken rule can be told by, or the rule's first where all are auto."""
    return [each for each in broken.blames if KNOBS[each.path] in features.given] or [broken.blames[0]]


def _nearest(arch: Arch, blame: Blame, passes: Passes) -> list[int]:
    """The next smaller and the next larger value of the knob that pass, where there are any."""
    knob = KNOBS[blame.path]
    step = {"block_m": arch.mma.m, "block_n": arch.mma.k}.get(knob, 1)
    most = {
        "stages": MOST_STAGES,
        "warps": arch.threads_per_block // 32,
        "warpgroups": MOST_WARPGROUPS,
    }.get(knob, LARGEST_TILE)
    below = min(blame.value - 1, most) // step * step
    above = blame.value // step * step + step
    smaller = [value for value in range(below, 0, -step) if passes(knob, value)][:1]
    return smaller + [value for value in range(above, most + 1, step) if passes(knob, value)][:1]


def wrong(spec: Spec, features: Features, schedule: str) -> tuple[Diagnostic, ...]:
    """What is refused of a spec before there is a plan; `spec` tells where it is written."""
    return (
        *_wrong_dtype(spec, features),
        *_wrong_cache(spec, features),
        *_wrong_target(spec, features.arch, schedule),
        *_wrong_pages(spec, features, schedule),
        *_wrong_inputs(spec, features, schedule),
        *_wrong_fields(spec, features, schedule),
        *_wrong_weight(spec, features),
    )


def _wrong_target(spec: Spec, arch: Arch, schedule: str) -> tuple[Diagnostic, ...]:
    """A schedule that the target has no instructions for."""
    if schedule not in WARPGROUP_SCHEDULES or arch.wgmma:
        return ()
    able = tuple(known.name for known in ARCHS.values() if known.wgmma)
    return (
        Diagnostic(
            message=f"schedule.kind = {schedule} is not to be had on {arch.name}",
            rule="schedule-target",
            location=spec.locate("schedule.kind"),
            path="schedule.kind",
            value=schedule,
            note=f"it is made of wgmma and the copy engine, which {' and '.join(able)} have",
            nearest=tuple(SCHEDULES),
        ),
    )


def _wrong_pages(spec: Spec, features: Features, schedule: str) -> tuple[Diagnostic, ...]:
    """Keys in pages, and a schedule whose copies know rows that follow one another."""
    if not features.is_paged or schedule in (SCHEDULE_OF_PAGES, *WARPGROUP_SCHEDULES):
        return ()
    return (
        Diagnostic(
            message=f"schedule.kind = {schedule} does not take keys in pages",
            rule="schedule-pages",
            location=spec.locate("schedule.kind"),
            path="schedule.kind",
            value=schedule,
            note="it works on whole heads, whose keys follow one another",
            nearest=(SCHEDULE_OF_PAGES, *(WARPGROUP_SCHEDULES if features.arch.wgmma else ())),
        ),
    )


def _wrong_inputs(spec: Spec, features: Features, schedule: str) -> tuple[Diagnostic, ...]:
    """8-bit inputs and a schedule without the instruction that takes them, on a target that has it."""
    inputs, takes = features.inputs.name, features.arch.input_dtypes
    if features.inputs.bits > 8 or schedule in WARPGROUP_SCHEDULES or inputs not in takes:
        return ()
    return (
        Diagnostic(
            message=f"schedule.kind = {schedule} does not take {inputs} inputs",
            rule="schedule-inputs",
            location=spec.locate("schedule.kind"),
            path="schedule.kind",
            value=schedule,
            note=f"wgmma takes them, which {' and '.join(WARPGROUP_SCHEDULES)} are made of",
            nearest=tuple(WARPGROUP_SCHEDULES),
        ),
    )


def _wrong_fields(spec: Spec, features: Features, schedule: str) -> tuple[Diagnostic, ...]:
    """Fields that mean nothing to the schedule: they are not ignored in silence."""
    fields, others = (
        (WARP_FIELDS, SCHEDULES)
        if schedule in WARPGROUP_SCHEDULES
        else (WARPGROUP_FIELDS, WARPGROUP_SCHEDULES)
    )
    return tuple(
        Diagnostic(
            message=f"schedule.{field} = {str(value).lower()} means nothing to {schedule}",
            rule="schedule-field",
            location=spec.locate(f"schedule.{field}"),
            path=f"schedule.{field}",
            value=value,
            note=f"it is for {' and '.join(others)}",
            nearest=("auto",),
        )
        for field in fields
        if (value := features.given.get(field)) is not None
    )


def _wrong_weight(spec: Spec, features: Features) -> tuple[Diagnostic, ...]:
    """A mask and a score of more instructions than are compiled in the time that somebody waits."""
    arch = features.arch
    weights = {"mask": weight(features.mask), "score": weight(features.score)}
    if arch.emits and weights["mask"] > LARGEST_INLINE and features.walks:
        classes = features.classes()
        weights["mask"] += weight(classes.may) + weight(classes.must) + WEIGHT_OF_TABLE * len(classes.tables)
    total = sum(weights.values())
    if not arch.emits or total <= LARGEST_KERNEL:
        return ()
    path = max(weights, key=weights.__getitem__)
    return (
        Diagnostic(
            message=f"{path} means {weights[path]:,} instructions, of the {total:,} of mask and score",
            rule="expression-weight",
            location=spec.locate(path),
            path=path,
            value=weights[path],
            note=f"at most {LARGEST_KERNEL:,} are compiled; a tensor can hold what differs by constants",
            nearest=(f"{LARGEST_KERNEL - total + weights[path]:,} instructions",),
        ),
    )


def _wrong_cache(spec: Spec, features: Features) -> tuple[Diagnostic, ...]:
    """A cache in e4m3 on a target that has no instruction to make f16 of it."""
    arch = features.arch
    if features.cache is None or arch.converts_e4m3:
        return ()
    able = ", ".join(known.name for known in ARCHS.values() if known.converts_e4m3)
    return (
        Diagnostic(
            message=f"precision.cache = e4m3 is not to be had on {arch.name}",
            rule="cache-target",
            location=spec.locate("precision.cache"),
            path="precision.cache",
            value="e4m3",
            note=f"it has no instruction that makes f16 of e4m3; {able} do",
            nearest=("auto",),
        ),
    )


def _wrong_dtype(spec: Spec, features: Features) -> tuple[Diagnostic, ...]:
    """A format that the target has no instructions for."""
    arch, inputs = features.arch, features.inputs.name
    if inputs in arch.input_dtypes:
        return ()
    takers = " and ".join(known.name for known in ARCHS.values() if inputs in known.input_dtypes)
    *most, last = arch.input_dtypes
    takes = f"the matrix instruction of {arch.name} takes {', '.join(most)} and {last}"
    return (
        Diagnostic(
            message=f"precision.inputs = {inputs} is not to be had on {arch.name}",
            rule="input-dtype",
            location=spec.locate("precision.inputs"),
            path="precision.inputs",
            value=inputs,
            note=f"{takes}; {inputs} is for {takers}",
            nearest=arch.input_dtypes,
        ),
    )

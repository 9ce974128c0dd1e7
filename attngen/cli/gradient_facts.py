"""What `explain` knows of a backward pass: its gradients, and each of its kernels, as named lines of text."""

import math
from collections.abc import Mapping
from typing import Any

from attngen.check.inputs import Shape
from attngen.cli.facts import (
    MOST_COUNTED,
    UNKNOWN,
    memory_map,
    moved_text,
    occupancy_text,
    registers_text,
    resources_of,
    role_text,
    spills_text,
    tiles_to_count,
)
from attngen.cli.gradient_comparison import GRADIENTS_KEY
from attngen.cli.output import size_text
from attngen.dtypes import element_dtype
from attngen.kernel import Kernel
from attngen.lower.features import Features
from attngen.lower.fused_gradients import why_split
from attngen.plan import (
    GRADIENTS_INTAKE,
    FillTables,
    FindBoundaries,
    KernelPlan,
    ListTiles,
    Sheet,
    evaluate_formula,
)
from attngen.plan.hardware_rules import takes_warpgroups
from attngen.runtime import KernelResources
from attngen.simulate import Sizes, Traffic, added, count
from attngen.simulate.function_names import function_name


def kernels_of_pass(kernel: Kernel, shape: Shape) -> tuple[KernelPlan | Sheet, ...]:
    """The kernels that a backward pass launches, in order; none where the spec asks for no gradients."""
    manifest, of_forward = kernel.manifest, {place.name for place in kernel.plan.writes}
    intakes = [intake for intake in manifest.intakes if intake.name == GRADIENTS_INTAKE]
    given = {name for intake in intakes for name in intake.values} | {each.name for each in manifest.declared}
    outputs = [value.name for value in manifest.values if value.source == "output"]
    wanted = [name for name in outputs if name not in of_forward]
    launches = manifest.launches_for(given, wanted, _sizes(shape).values)
    return tuple(kernel.call.kernel_of[launch.kernel] for launch in launches)


def gradient_facts(
    kernel: Kernel, is_compiled: bool, shape: Shape, declared: Mapping[str, Any]
) -> dict[str, str]:
    """Every line of the table about gradients, by its name; what each kernel takes bears the kernel's name.

    Args:
        kernel: of a spec.
        is_compiled: whether there are cubins, or nothing to compile.
        shape: of the call that is counted.
        declared: what it passes; blocks that depend on more are all counted.
    """
    kernels = kernels_of_pass(kernel, shape)
    if not kernels:
        return {"gradients": f"none: {GRADIENTS_KEY} adds a backward pass"}
    names, titles = ", ".join(kernel.spec.gradients), ", ".join(map(kernel_title, kernels))
    lines = {"gradients": f"of {names}, by {titles}", "order of sums": _order_of_sums(kernel)}
    moved_by: list[Traffic] = []
    for each in kernels:
        used = resources_of(kernel, each) if is_compiled else None
        title = kernel_title(each)
        if isinstance(each, KernelPlan):
            moved = _counted(each, shape, declared)
            told = {**_decided(each), **_compiled(each, used)}
        else:
            moved = _read_once(kernel, each, shape)
            told = _compiled(each, used)
        if moved is not None:
            told |= {"FLOPs": f"{moved.flops:.4g}"} if moved.flops else {}
            told |= {"bytes": f"{size_text(moved.bytes_moved)} ({moved_text(moved)})"}
            moved_by.append(moved)
        lines |= {f"{title}: {name}": text for name, text in told.items()}
    whole = added(moved_by)
    lines["backward: FLOPs"] = f"{whole.flops:.4g}"
    lines["backward: bytes"] = size_text(whole.bytes_moved)
    return lines


def _order_of_sums(kernel: Kernel) -> str:
    """Whether dQ has an owner, or is added up in device memory, and why."""
    if any(plan.query_ranks for plan in kernel.call.gradients):
        order = "blocks of keys add to dQ in one order, each head's last keys first, and wait for their rank"
        return f"{order}\none kernel of five products a pair of blocks, whose blocks draw their numbers"
    if any(plan.query_sums for plan in kernel.call.gradients):
        free = "blocks of keys add to dQ in any order: its last bits vary from run to run"
        return f"{free}\none kernel of five products a pair of blocks, as deterministic: false allows"
    why = why_split(Features.of(kernel.spec, kernel.call.arch), takes_warpgroups(kernel.plan))
    owned = "each gradient has one owner, who adds in one order"
    return f"{owned}\ndQ has a kernel of its own: {why}"


def kernel_title(each: KernelPlan | Sheet) -> str:
    """What tells a kernel of a pass from the others."""
    if isinstance(each, KernelPlan):
        return each.schedule
    if isinstance(each, FindBoundaries):
        return f"{function_name(type(each))} among {each.among}"
    of = f" of {each.plan.schedule}" if isinstance(each, FillTables | ListTiles) else ""
    return f"{function_name(type(each))}{of}"


def _decided(plan: KernelPlan) -> dict[str, str]:
    stages = f"{plan.stages} stage{'s' * (plan.stages != 1)}"
    return {
        "tile": f"{plan.block_m} queries x {plan.block_n} keys, {stages}",
        "block": "\n".join([*map(role_text, plan.roles), f"{plan.threads} threads in all"]),
        "shared memory": size_text(plan.smem_bytes),
        "memory map": memory_map(plan),
    }


def _compiled(each: KernelPlan | Sheet, used: KernelResources | None) -> dict[str, str]:
    if not each.arch.emits:
        return {}
    if used is None:
        return {"registers": UNKNOWN}
    if not isinstance(each, KernelPlan):
        return {"registers": f"{used.registers} a thread", "spills": spills_text(used)}
    return {
        "registers": registers_text(each, used),
        "spills": spills_text(used),
        "occupancy": occupancy_text(each, used),
    }


def _counted(plan: KernelPlan, shape: Shape, declared: Mapping[str, Any]) -> Traffic | None:
    """FLOPs and bytes of a kernel of programs; None where counting them would take minutes."""
    if tiles_to_count(plan, shape) > MOST_COUNTED:
        return None
    sizes = (shape.seqlen_q, shape.seqlen_k, shape.batch, shape.heads, shape.heads_kv)
    return count(plan, *sizes, declared=declared, tokens=shape.tokens)


def _read_once(kernel: Kernel, sheet: Sheet, shape: Shape) -> Traffic | None:
    """Bytes of a sheet, which reads and writes its values once; None where one has a size of its own."""
    values, sizes = kernel.manifest.value_of, _sizes(shape).values

    def bytes_of(name: str) -> int:
        dims = (evaluate_formula(dim, sizes) for dim in values[name].shape)
        return math.prod(dims) * element_dtype(values[name].dtype).itemsize

    wanted = kernel.gradients_of({})  # of a value in several formats one
    writes = (name for name in sheet.writes if name in wanted or not values[name].optional)
    try:
        read, written = ({name: bytes_of(name) for name in names} for names in (sheet.reads, writes))
    except KeyError:
        return None
    return Traffic(read=read, written=written)


def _sizes(shape: Shape) -> Sizes:
    of_q, of_k = shape.tokens
    sizes = (shape.batch, shape.seqlen_q, shape.seqlen_k, shape.heads, shape.heads_kv)
    return Sizes(*sizes, tokens_q=of_q, tokens_k=of_k)

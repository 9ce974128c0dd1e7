"""What `explain` knows of a kernel, as named lines of text."""

from collections.abc import Mapping
from typing import Any

from attngen.check.inputs import Shape
from attngen.cli.occupancy import occupancy
from attngen.cli.output import seconds_text, size_text
from attngen.cli.shapes import shape_text
from attngen.cli.tiles import TileMap, over_approximated, sizes_of_call
from attngen.dtypes import BF16
from attngen.errors import SpecError
from attngen.expr import SINK
from attngen.kernel import Kernel
from attngen.plan import (
    OPERANDS,
    SINK_FORMATS,
    TENSORS,
    Buffer,
    Descales,
    KernelPlan,
    Role,
    Sheet,
    page_values,
    source_of,
    walk,
)
from attngen.plan.hardware_rules import (
    RULES,
    binding,
    margins,
    promoted_parts,
    takes_warpgroups,
    tile_registers,
)
from attngen.plan.steps import RowMax, SeedScores
from attngen.runtime import KernelResources
from attngen.simulate import Traffic, added, closed_form, count, standard_algorithm
from attngen.simulate.visits import ceil_div, heads_alike

UNKNOWN = "unknown"
MOST_COUNTED = 2**18
"""Tiles of all heads that differ up to which the program is run to count what it moves: half a minute."""
SWEEP_COLUMNS = ("tile", "registers", "spills [B]", "shared memory", "occupancy", "binding or refusing rule")
"""What `sweep_facts` and `refused_facts` tell."""


def facts(
    kernel: Kernel,
    used: KernelResources | None,
    shape: Shape,
    declared: Mapping[str, Any],
    tiles: TileMap | None = None,
) -> dict[str, str]:
    """Every line of the table, by its name.

    Args:
        kernel: of a spec.
        used: None where nothing was or could be compiled.
        shape: of the call that is counted.
        declared: what it passes; blocks of keys that depend on more are all counted.
        tiles: of that call; None where the values of scalars are not known.
    """
    plan = kernel.plan
    lines = {
        "kernel": plan.name,
        "target": plan.arch.name,
        "schedule": _schedule(plan),
        **_sequences(plan),
        "mask": plan.mask_text,
        "score": kernel.spec.score,
        "before the GEMM": _added(plan),
        "row maximum": _row_maximum(plan),
        "a call passes": _declared(plan),
        "blocks of keys": _key_blocks(plan),
        "inputs -> output": f"{plan.inputs.name} -> {plan.output.name}",
        **_of_8bit(kernel),
        **_of_cache(plan),
        "head_dim": f"{plan.head_dim_qk} (q, k), {plan.head_dim_v} (v)",
        "tile": f"{plan.block_m} queries x {plan.block_n} keys, {plan.stages} stage{'s' * (plan.stages != 1)}",
        **_parts(plan),
        "block": _block(plan),
        "for some calls": _others(kernel),
        "shared memory": size_text(plan.smem_bytes),
        "memory map": memory_map(plan),
    }
    lines |= _compiled(kernel, used)
    # The simulator's limits are numbers for the rules, not facts for people.
    left = margins(plan) if plan.arch.emits else {}
    lines |= {f"rule {rule}": str(left.get(rule, "-")) for rule in RULES}
    lines["binds"] = _binding(plan) if plan.arch.emits else "nothing: the simulator has no limits"
    lines |= _traffic(plan, shape, declared)
    if tiles is not None:
        lines["tiles of head 0"] = str(tiles)
        if waste := over_approximated(tiles):
            lines["over-approximated"] = waste
    return lines


def role_text(role: Role) -> str:
    """Who runs a role's program: `consumer, 2 warpgroups of 4 warps, 240 registers`."""
    warps = f"{role.warps // role.warpgroups} warp{'s' * (role.warps != role.warpgroups)}"
    groups = f"{role.warpgroups} warpgroups of {warps}" if role.warpgroups > 1 else warps
    who = f"1 thread of {groups}" if role.single_thread else groups
    held = f", {role.registers} registers" if role.registers is not None else ""
    return f"{role.name}, {who}{held}"


def resources_of(kernel: Kernel, each: KernelPlan | Sheet) -> KernelResources | None:
    """What ptxas says of a kernel of a call; None on the simulator, or where an edited source names it otherwise."""
    known = kernel.modules[each.module].compiled.resources if each.arch.emits else ()
    return next((used for used in known if used.name == each.name), None)


def attention_resources(kernel: Kernel) -> KernelResources | None:
    """What ptxas says of the attention kernel; None as of `resources_of`."""
    return resources_of(kernel, kernel.plan)


def sweep_facts(plan: KernelPlan, used: KernelResources | None) -> tuple[str, ...]:
    """The `SWEEP_COLUMNS` of a legal kernel; `used` is None where nothing was or could be compiled."""
    workers = f"warpgroups {plan.worker.warpgroups}" if takes_warpgroups(plan) else f"warps {plan.warps}"
    tile = f"{plan.block_m}x{plan.block_n}, stages {plan.stages}, {workers}"
    known = (UNKNOWN, UNKNOWN) if used is None else (str(used.registers), spills_text(used))
    held = UNKNOWN if used is None else occupancy_text(plan, used)
    if not plan.arch.emits:
        return (tile, "-", "-", size_text(plan.smem_bytes), "-", "-")
    return (tile, *known, size_text(plan.smem_bytes), held, _binding(plan))


def refused_facts(fault: SpecError) -> tuple[str, ...]:
    """The `SWEEP_COLUMNS` of what has no legal kernel: the rules it breaks, and the first of them in words."""
    first, *_ = fault.diagnostics
    rules = ", ".join(dict.fromkeys(diagnostic.rule for diagnostic in fault.diagnostics))
    return (*("-" for _ in SWEEP_COLUMNS[:-1]), f"refused [rule {rules}] {first.message}")


def _sequences(plan: KernelPlan) -> dict[str, str]:
    """How queries and keys are cut, and by what a call says so; nothing of dense ones."""
    if plan.lengths.are_dense:
        return {}
    names = [f"{each.name}{', or none' * each.is_optional}" for each in plan.lengths.arguments]
    names += [f"{each.name}{', or none' * each.optional}" for each in page_values(plan.lengths)]
    by = "\n".join((*names, *(f"{name}, or none" for name in plan.lengths.bounds)))
    kinds = f"queries {plan.lengths.queries}, keys {plan.lengths.keys}"
    return {"sequences": kinds, "their lengths by": by}


def _parts(plan: KernelPlan) -> dict[str, str]:
    """How the keys of a tile are cut, and whose rows it has; nothing where they are not."""
    if plan.split is None:
        return {}
    if plan.split.keys is not None:
        parts = f"at multiples of {plan.split.keys} keys of a sequence: its bits hang on no other"
    else:
        parts = f"as many as fill the GPU, of {plan.split.least} keys at least"
    packed = (
        "all query heads that share its keys"
        if plan.scheduler.packs_group
        else "one head, for which is asked"
    )
    return {"parts of keys": parts, "rows of a tile": packed}


def _added(plan: KernelPlan) -> str:
    """What of the score the score GEMM adds to."""
    steps = walk(plan.worker.program)
    return next((f"+ {step.added}" for step in steps if isinstance(step, SeedScores)), "-")


def _row_maximum(plan: KernelPlan) -> str:
    """What exponentials are taken relative to."""
    maxima = [step for step in walk(plan.worker.program) if isinstance(step, RowMax)]
    if not maxima:
        return "none: scores are bounded"
    return "running, three integers at a time" if maxima[0].by_integers else "running"


def _declared(plan: KernelPlan) -> str:
    """The tensors and scalars that every call passes by name, one a line."""
    scalars = plan.declarations.scalars.values()
    lines = [f"{tensor.name}: {tensor}" for tensor in plan.declarations.tensors.values()]
    lines += [
        f"{each.name}: {each.type}" + ("" if each.default is None else f" = {_text(each.default)}")
        for each in scalars
    ]
    lines += [f"{SINK}: {', '.join(SINK_FORMATS)} [num_heads_q]"] if plan.has_sink else []
    return "\n".join(lines) or "-"


def _of_8bit(kernel: Kernel) -> dict[str, str]:
    """What 8-bit inputs have beside their format; nothing of others."""
    plan, quantizer = kernel.plan, kernel.plan.quantizer
    if quantizer is None:
        return {}
    seed = quantizer.hadamard_seed
    parts = {tile.cols for tile in promoted_parts(plan)}
    slices = "".join(f", {cols} of {plan.v_cols} columns at a time" for cols in parts if cols < plan.v_cols)
    sources = {source_of(name, "bf16") for name in TENSORS}
    launches = kernel.manifest.launches_for(sources, OPERANDS, {"seqlen_k": 0})
    names = [launch.kernel.removeprefix(f"{plan.name}_") for launch in launches]
    return {
        "scales": "\n".join((quantizer.scales, *map(_scale_text, plan.scales))),
        "before quantising": "-"
        if seed is None
        else f"q and k times a Hadamard matrix, signs of seed {seed}",
        "promotion": f"every block of keys{slices}" if parts else "never",
        "quantises": f"bf16 or f16 q, k and v: {', then '.join(names)} (CPU tensors: torch)",
    }


def _of_cache(plan: KernelPlan) -> dict[str, str]:
    """What a cache of e4m3 has beside the format of queries; nothing of others."""
    if not plan.descales:
        return {}
    made = "exactly f16 in registers" + (", and Q, by rows, in shared memory" if plan.inputs is BF16 else "")
    return {"cache": f"e4m3, {plan.descales[0].scales}; {made}"}


def _scale_text(of: Descales) -> str:
    """What shares one: `q_descale: 64 rows of a head`."""
    rows, heads = ("rows", "a query head") if of.axis == "queries" else ("keys", "a head of k and v")
    if of.granule is None:
        return f"{of.name}: {'a group of query heads' if of.axis == 'queries' else heads}"
    return f"{of.name}: {f'{of.granule} {rows}' if of.granule > 1 else f'each of the {rows}'} of {heads}"


def _text(default: int | float | bool) -> str:
    """A default as a spec writes it."""
    return str(default).lower()


def _key_blocks(plan: KernelPlan) -> str:
    """How those that a row sees are found, and what is worked out for it before."""
    if plan.key_blocks is not None:
        found = (f"{each.name}: the first key for which {each.condition}" for each in plan.boundaries)
        return "\n".join(["from bounds in closed form", *found])
    lines = ["by a walk, each block classed empty, partial or full"]
    blocks = {"q": f"{plan.block_m} rows", "k": f"{plan.block_n} keys"}
    for table in plan.tables:
        over = " and ".join(blocks[letter] for letter in table.reads)
        lines.append(f"table {table.name}: extremes of {table.lookup} over blocks of {over}")
    return "\n".join(lines)


def _block(plan: KernelPlan) -> str:
    """The roles, where there are several, and the threads of all."""
    if not takes_warpgroups(plan):
        return f"{plan.warps} warp{'s' * (plan.warps != 1)}, {plan.threads} threads"
    return "\n".join([*map(role_text, plan.roles), f"{plan.threads} threads in all"])


def _others(kernel: Kernel) -> str:
    """The kernels that take calls of fewer keys, or of pages that are pieces for the copy engine."""
    lines = (
        f"{'pages of 8 rows or a multiple' if each.takes_pieces else f'up to {each.up_to}'}: {each.schedule}, "
        f"{each.block_m} queries x {each.block_n} keys, stages {each.stages}"
        for each in kernel.call.programs[:-1]
    )
    return "\n".join(lines) or "-"


def _schedule(plan: KernelPlan) -> str:
    if not takes_warpgroups(plan):
        return plan.schedule
    flags = {"overlap": plan.overlap, "persistent": plan.scheduler.persistent}
    return ", ".join([plan.schedule, *(f"{name}: {str(flag).lower()}" for name, flag in flags.items())])


def _binding(plan: KernelPlan) -> str:
    rule, margin = binding(plan)
    return f"{rule} ({margin.share:.0%})"


def _compiled(kernel: Kernel, used: KernelResources | None) -> dict[str, str]:
    plan = kernel.plan
    if not plan.arch.emits:
        return {"registers": "none: nothing is emitted for the simulator"}
    if used is None:
        return {"registers": f"{UNKNOWN}; {_in_tiles(plan)}", "occupancy": UNKNOWN}
    return {
        "registers": registers_text(plan, used),
        "spills": f"{spills_text(used)} bytes stored + loaded",
        "stack": f"{used.stack_bytes} bytes",
        "compiled in": "cached" if kernel.was_cached else seconds_text(kernel.compile_seconds),
        "occupancy": occupancy_text(plan, used),
    }


def _in_tiles(plan: KernelPlan) -> str:
    return f"{sum(tile_registers(plan).values())} a thread in tiles"


def registers_text(plan: KernelPlan, used: KernelResources) -> str:
    """What a thread holds: what the launch gives it, and from setmaxnreg on what its role keeps."""
    later = ", ".join(f"{role.name} {role.registers}" for role in plan.roles if role.registers is not None)
    return f"{used.registers} a thread{f' at launch, then {later}' if later else ''} ({_in_tiles(plan)})"


def spills_text(used: KernelResources) -> str:
    """Bytes spilled: stored, and loaded again."""
    return f"{used.spill_stores} + {used.spill_loads}"


def occupancy_text(plan: KernelPlan, used: KernelResources) -> str:
    """How many blocks of threads a multiprocessor holds."""
    smem = plan.smem_bytes + used.static_smem_bytes
    return str(occupancy(plan.arch, plan.threads, used.registers, smem))


def memory_map(plan: KernelPlan) -> str:
    """One line a buffer: its bytes, what it holds, and what it overlays; then the mbarriers of the rings."""
    kernel = plan
    places = [(buffer.offset, buffer.size_bytes, _contents(buffer)) for buffer in kernel.buffers]
    for ring in kernel.rings:
        stages = f" x {ring.stages} stages" if ring.stages > 1 else ""
        places.append(
            (kernel.ring_offset(ring), ring.size_bytes, f"{ring.name} ring: mbarriers full, empty{stages}")
        )
    if kernel.scheduler.persistent or kernel.scheduler.in_turn:
        slot, which = kernel.tile_slot_offset, "next " * kernel.scheduler.persistent
        places.append((slot, kernel.smem_bytes - slot, f"number of the {which}tile"))
    return "\n".join(f"{start:>6} .. {start + size - 1:<6} {text}" for start, size, text in places)


def _contents(buffer: Buffer) -> str:
    stages = f" x {buffer.stages} stages" if buffer.stages > 1 else ""
    panels = f", {buffer.panels} panel{'s' * (buffer.panels != 1)}" if buffer.in_panels else ""
    over = f", over {buffer.overlays}" if buffer.overlays else ""
    return f"{buffer.name}: {buffer.rows} x {buffer.cols} {buffer.dtype.name}{stages}{panels}{over}"


def tiles_to_count(plan: KernelPlan, shape: Shape) -> int:
    """Tiles of all heads that differ, which are run to count what a kernel moves."""
    alike = heads_alike(plan, sizes_of_call(plan, shape, shape.arguments()))
    heads = (members[0] for members in alike)
    return sum(
        ceil_div(head.seqlen_q, plan.block_m) * ceil_div(head.seqlen_k, plan.block_n) for head in heads
    )


def _traffic(plan: KernelPlan, shape: Shape, declared: Mapping[str, Any]) -> dict[str, str]:
    """FLOPs and bytes of one call: counted, by formula, and of the standard algorithm."""
    sizes = (shape.seqlen_q, shape.seqlen_k, shape.batch, shape.heads, shape.heads_kv)
    about: dict[str, Any] = {"declared": declared, "tokens": shape.tokens, "return_lse": True}
    tiles = tiles_to_count(plan, shape)
    formula = closed_form(plan, *sizes, **about)
    kernel = (plan.inputs, plan.head_dim_qk, plan.head_dim_v)
    alike = shape.lengths if shape.cuts else [(shape.seqlen_q, shape.seqlen_k)]
    times = 1 if shape.cuts else shape.batch
    standard = added(standard_algorithm(*kernel, *each, times, shape.heads) for each in alike)
    flops = moved = f"not counted: {tiles} tiles"
    if tiles <= MOST_COUNTED:
        counted = count(plan, *sizes, **about)
        flops = f"{counted.flops:.4g}, of which {counted.useful_flops:.4g} on rows and keys that exist"
        moved = f"{size_text(counted.bytes_moved)} ({moved_text(counted)})"
    return {
        "for one call of": shape_text(shape),
        "FLOPs, counted": flops,
        "FLOPs, closed form": f"{formula.flops:.4g}",
        "FLOPs, standard": f"{standard.flops:.4g}",
        "bytes, counted": moved,
        "bytes, closed form": size_text(formula.bytes_moved),
        "bytes, standard": f"{size_text(standard.bytes_moved)} ({moved_text(standard)})",
    }


def moved_text(traffic: Traffic) -> str:
    """Bytes by place, read and written."""
    read = ", ".join(f"{name} {size_text(size)}" for name, size in traffic.read.items())
    written = ", ".join(f"{name} {size_text(size)}" for name, size in traffic.written.items())
    return f"reads {read or 'nothing'}; writes {written or 'nothing'}"

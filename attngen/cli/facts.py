"""What `explain` knows of a kernel, as named lines of text."""

from attngen.api import Kernel
from attngen.cli.limits import binding, margins, occupancy
from attngen.cli.output import seconds_text, size_text
from attngen.cli.shapes import shape_text
from attngen.errors import SpecError
from attngen.inputs import Shape
from attngen.plan import Plan
from attngen.runtime import KernelResources
from attngen.simulate import Traffic, closed_form, count, standard_algorithm

UNKNOWN = "unknown"
SWEEP_COLUMNS = ("tile", "registers", "spills [B]", "shared memory", "occupancy", "binding or refusing rule")
"""What `sweep_facts` and `refused_facts` tell."""


def facts(kernel: Kernel, used: KernelResources | None, shape: Shape) -> dict[str, str]:
    """Every line of the table, by its name; `used` is None where nothing was or could be compiled."""
    plan = kernel.plan
    lines = {
        "kernel": plan.name,
        "target": plan.arch.name,
        "schedule": plan.schedule,
        "mask": plan.mask_text,
        "inputs -> output": f"{plan.inputs.name} -> {plan.output.name}",
        "head_dim": f"{plan.head_dim_qk} (q, k), {plan.head_dim_v} (v)",
        "tile": f"{plan.block_m} queries x {plan.block_n} keys, {plan.stages} stage{'s' * (plan.stages != 1)}",
        "block": f"{plan.warps} warp{'s' * (plan.warps != 1)}, {plan.kernel.threads} threads",
        "shared memory": size_text(plan.kernel.smem_bytes),
        "memory map": _memory_map(plan),
    }
    lines |= _compiled(kernel, used)
    for margin in margins(plan):
        # The simulator's limits are numbers for the rules, not facts for people.
        lines[f"rule {margin.rule}"] = str(margin) if plan.arch.emits else "-"
    lines["binds"] = _binding(plan) if plan.arch.emits else "nothing: the simulator has no limits"
    return lines | _traffic(plan, shape)


def attention_resources(kernel: Kernel) -> KernelResources | None:
    """What ptxas says of the attention kernel; None on the simulator, or where an edited source names it otherwise."""
    known = kernel.resources if kernel.plan.arch.emits else ()
    return next((used for used in known if used.name == kernel.plan.kernel.name), None)


def sweep_facts(kernel: Kernel, used: KernelResources | None) -> tuple[str, ...]:
    """The `SWEEP_COLUMNS` of a legal kernel; `used` is None where nothing was or could be compiled."""
    plan = kernel.plan
    tile = f"{plan.block_m}x{plan.block_n}, stages {plan.stages}, warps {plan.warps}"
    known = (UNKNOWN, UNKNOWN) if used is None else (str(used.registers), _spills(used))
    held = UNKNOWN if used is None else _occupancy(plan, used)
    if not plan.arch.emits:
        return (tile, "-", "-", size_text(plan.kernel.smem_bytes), "-", "-")
    return (tile, *known, size_text(plan.kernel.smem_bytes), held, _binding(plan))


def refused_facts(fault: SpecError) -> tuple[str, ...]:
    """The `SWEEP_COLUMNS` of what has no legal kernel: the rules it breaks, and the first of them in words."""
    first, *_ = fault.diagnostics
    rules = ", ".join(dict.fromkeys(diagnostic.rule for diagnostic in fault.diagnostics))
    return (*("-" for _ in SWEEP_COLUMNS[:-1]), f"refused [rule {rules}] {first.message}")


def _binding(plan: Plan) -> str:
    bound = binding(plan)
    return f"{bound.rule} ({bound.share:.0%})"


def _compiled(kernel: Kernel, used: KernelResources | None) -> dict[str, str]:
    plan = kernel.plan
    accumulators = f"{plan.kernel.accumulator_registers} a thread in tiles"
    if not plan.arch.emits:
        return {"registers": "none: nothing is emitted for the simulator"}
    if used is None:
        return {"registers": f"{UNKNOWN}; {accumulators}", "occupancy": UNKNOWN}
    return {
        "registers": f"{used.registers} a thread ({accumulators})",
        "spills": f"{_spills(used)} bytes stored + loaded",
        "stack": f"{used.stack_bytes} bytes",
        "compiled in": "cached" if kernel.was_cached else seconds_text(kernel.compile_seconds),
        "occupancy": _occupancy(plan, used),
    }


def _spills(used: KernelResources) -> str:
    return f"{used.spill_stores} + {used.spill_loads}"


def _occupancy(plan: Plan, used: KernelResources) -> str:
    smem = plan.kernel.smem_bytes + used.static_smem_bytes
    return str(occupancy(plan.arch, plan.kernel.threads, used.registers, smem))


def _memory_map(plan: Plan) -> str:
    """One line a buffer: its bytes, what it holds, and what it overlays."""
    lines = []
    for buffer in plan.kernel.buffers:
        stages = f" x {buffer.stages} stages" if buffer.stages > 1 else ""
        over = f", over {buffer.overlays}" if buffer.overlays else ""
        lines.append(
            f"{buffer.offset:>6} .. {buffer.offset + buffer.size_bytes - 1:<6} {buffer.name}: "
            f"{buffer.rows} x {buffer.cols} {buffer.dtype.name}{stages}{over}"
        )
    return "\n".join(lines)


def _traffic(plan: Plan, shape: Shape) -> dict[str, str]:
    """FLOPs and bytes of one call: counted, by formula, and of the standard algorithm."""
    sizes = (shape.seqlen_q, shape.seqlen_k, shape.batch, shape.heads)
    counted = count(plan, *sizes, shape.heads_kv, return_lse=True)
    formula = closed_form(plan, *sizes, shape.heads_kv, return_lse=True)
    standard = standard_algorithm(plan.inputs, plan.head_dim_qk, plan.head_dim_v, *sizes)
    return {
        "for one call of": shape_text(shape),
        "FLOPs, counted": f"{counted.flops:.4g}, of which {counted.useful_flops:.4g} on rows and keys that exist",
        "FLOPs, closed form": f"{formula.flops:.4g}",
        "FLOPs, standard": f"{standard.flops:.4g}",
        "bytes, counted": f"{size_text(counted.bytes_moved)} ({_moved(counted)})",
        "bytes, closed form": size_text(formula.bytes_moved),
        "bytes, standard": f"{size_text(standard.bytes_moved)} ({_moved(standard)})",
    }


def _moved(traffic: Traffic) -> str:
    read = ", ".join(f"{name} {size_text(size)}" for name, size in traffic.read.items())
    written = ", ".join(f"{name} {size_text(size)}" for name, size in traffic.written.items())
    return f"reads {read or 'nothing'}; writes {written or 'nothing'}"

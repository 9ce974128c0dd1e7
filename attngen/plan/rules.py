"""The rule table: named hardware rules that every plan passes before any compiler runs.

Each rule looks at a finished plan and names the value of the spec that breaks it. What would be the nearest valid
value is lowering's to find, since only it can make another plan.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from attngen.expr import LARGEST_TILE
from attngen.plan.places import RegTile
from attngen.plan.plan import KernelPlan
from attngen.plan.steps import StageScales, walk
from attngen.quantize import KEY_BLOCK

SPARE_REGISTERS = 47
"""Registers a thread needs beside its accumulators for operands, addresses and row values.

128x64 tiles of head_dim 128 over 4 warps (208 - 16 in accumulators) compile without spills on NVRTC 13.0.88.
"""


@dataclass(frozen=True)
class RegisterShare:
    """How warpgroups share out the registers of a block.

    Attributes:
        consumer, producer: what a thread of each holds after setmaxnreg, in eights.
        spare: of the consumer's, beside its tiles; here P has registers of its own.
    """

    consumer: int
    producer: int
    spare: int


WARPGROUP_REGISTERS = {2: RegisterShare(240, 24, spare=24), 3: RegisterShare(160, 32, spare=32)}
"""By consumer warpgroups: 65536 registers are there for all. A single consumer needs no more than the launch gives.
24 and 32 are also what FlashAttention-4's search on sm_90 keeps free."""
SPARE_8BIT, SPARE_PROMOTED, SPARE_BY_KEY = 24, 12, 40
"""The same for 8-bit inputs: beside tiles; beside tiles and scales where O is promoted, since a part of O is not held
through the softmax; beside these and all row values where each key has a scale. What NVRTC 13.0.88 made of 251 tiles of
head_dim 64, 128 and 256 tells them: all that pass compile without spills."""
REGISTERS_OF_STAGED_GROUP = 6
"""Of a producer's thread, for the scales of a group of columns on their way to shared memory; likewise."""
MOST_STAGES = 8
MOST_WARPGROUPS = 3
MOST_WGMMA_COLUMNS = 256
"""Source: PTX ISA, wgmma.mma_async, shapes .m64n8k16 to .m64n256k16."""


@dataclass(frozen=True)
class Violation:
    """A rule that a plan breaks, by the value of the spec that is most easily changed.

    Attributes:
        others: the same, by other values that have a part in it; which of them a spec gives, a plan does not know.
    """

    rule: str
    path: str
    value: int
    must: str
    note: str
    others: tuple["Violation", ...] = ()


def takes_warpgroups(plan: KernelPlan) -> bool:
    """Whether consumer warpgroups compute, with wgmma."""
    return len(plan.roles) > 1


def _largest_tile(plan: KernelPlan) -> Iterator[Violation]:
    for path, size in (("tile.block_m", plan.block_m), ("tile.block_n", plan.block_n)):
        if plan.arch.emits and size > LARGEST_TILE:
            yield Violation(
                "largest-tile",
                path,
                size,
                f"must be at most {LARGEST_TILE}",
                "indices past the end of the longest sequence fit 32 bits",
            )


def _mma_rows(plan: KernelPlan) -> Iterator[Violation]:
    if takes_warpgroups(plan):
        return
    step = plan.arch.mma.m * plan.warps
    if plan.block_m % step:
        note = f"each of {plan.warps} warps owns rows in steps of {plan.arch.mma.m}"
        shares = f"must share the {plan.block_m} rows of a tile in steps of {plan.arch.mma.m}"
        yield Violation(
            "mma-rows",
            "tile.block_m",
            plan.block_m,
            f"must be a multiple of {step}",
            note,
            (Violation("mma-rows", "schedule.warps", plan.warps, shares, note),),
        )


def _wgmma_rows(plan: KernelPlan) -> Iterator[Violation]:
    if not takes_warpgroups(plan) or plan.arch.wgmma is None:
        return
    step, count = plan.arch.wgmma.m, plan.worker.warpgroups
    if plan.block_m % count or (plan.arch.has_mma_granularity and plan.block_m != step * count):
        if step > 1:
            must = f"must be {step} for each consumer warpgroup"
            shares = f"must be one for every {step} of the {plan.block_m} rows of a tile"
            note = f"{step * count} for {count}: each owns the rows of one wgmma"
        else:
            must = f"must be a multiple of {count}"
            shares = f"must divide the {plan.block_m} rows of a tile"
            note = "warpgroups share the rows"
        yield Violation(
            "wgmma-rows",
            "tile.block_m",
            plan.block_m,
            must,
            note,
            (Violation("wgmma-rows", "schedule.warpgroups", count, shares, note),),
        )


def _wgmma_columns(plan: KernelPlan) -> Iterator[Violation]:
    if takes_warpgroups(plan) and plan.arch.emits and plan.block_n > MOST_WGMMA_COLUMNS:
        yield Violation(
            "wgmma-columns",
            "tile.block_n",
            plan.block_n,
            f"must be at most {MOST_WGMMA_COLUMNS}",
            "S of a block is one wgmma wide",
        )


def _warpgroups(plan: KernelPlan) -> Iterator[Violation]:
    count, wgmma = plan.worker.warpgroups, plan.arch.wgmma
    if count > MOST_WARPGROUPS and wgmma is not None:
        note = "a fourth would leave each thread fewer than 128 registers"
        rows = Violation(
            "warpgroups",
            "tile.block_m",
            plan.block_m,
            f"must be at most {MOST_WARPGROUPS * wgmma.m}",
            f"each consumer warpgroup owns {wgmma.m} rows, and {note}",
        )
        yield Violation(
            "warpgroups",
            "schedule.warpgroups",
            count,
            f"must be at most {MOST_WARPGROUPS}",
            note,
            (rows,) if plan.arch.has_mma_granularity else (),
        )


def _mma_k_step(plan: KernelPlan) -> Iterator[Violation]:
    step = plan.arch.k_step(plan.inputs)
    if plan.block_n % step:
        yield Violation(
            "mma-k-step",
            "tile.block_n",
            plan.block_n,
            f"must be a multiple of {step}",
            f"P·V consumes block_n in k-steps of {step} for {plan.inputs.name}",
        )


def _cost(rule: str, plan: KernelPlan, must: str, note: str, *paths: str) -> Violation:
    """A sum that is too large, by each of the values that it grows or shrinks with."""
    values = {
        "tile.block_m": plan.block_m,
        "tile.block_n": plan.block_n,
        "schedule.stages": plan.stages,
        "schedule.warps": plan.warps,
        "schedule.warpgroups": plan.worker.warpgroups,
    }
    first, *others = (Violation(rule, path, values[path], must, note) for path in paths)
    return replace(first, others=tuple(others))


def _shared_memory(plan: KernelPlan) -> Iterator[Violation]:
    limit = plan.arch.smem_bytes_per_block
    if plan.smem_bytes > limit:
        sizes = {buffer.name: buffer.size_bytes for buffer in plan.buffers if buffer.overlays is None}
        if rest := plan.smem_bytes - sum(sizes.values()):
            sizes["barriers"] = rest
        parts = " + ".join(f"{name} {size}" for name, size in sizes.items())
        yield _cost(
            "shared-memory",
            plan,
            f"asks for {plan.smem_bytes} bytes of shared memory and {plan.arch.name} has {limit}",
            f"{parts} = {plan.smem_bytes} bytes",
            *("tile.block_n", "schedule.stages", "tile.block_m"),
            *(("schedule.warpgroups",) if takes_warpgroups(plan) else ()),
        )


def free_registers(plan: KernelPlan) -> int:
    """Registers a thread of the computing role has for its tiles."""
    worker = plan.worker
    counted = (vector for vector in worker.reg_vecs if vector.is_counted)
    vectors = {vector: vector.registers_per_thread(worker.warps) for vector in counted}
    if plan.arch.emits and any(scale.axis == "k" and scale.granule == 1 for scale in plan.scales):
        held = worker.registers or WARPGROUP_REGISTERS[2].consumer  # one warpgroup has no more use for them
        return held - SPARE_BY_KEY - sum(vectors.values())
    if worker.registers is None or not plan.arch.emits:
        return plan.arch.registers_per_thread - SPARE_REGISTERS
    if plan.inputs.bits == 16:
        return worker.registers - WARPGROUP_REGISTERS[worker.warpgroups].spare
    if _promotes(plan):
        of_scales = sum(registers for vector, registers in vectors.items() if vector.groups)
        return worker.registers - SPARE_PROMOTED - of_scales
    return worker.registers - SPARE_8BIT


def _promotes(plan: KernelPlan) -> bool:
    """Whether O is added up from parts that the tensor core sums."""
    return any(tile.name == "part_o" for tile in plan.worker.reg_tiles)


def tiles_in_registers(plan: KernelPlan) -> tuple[RegTile, ...]:
    """The tiles that have registers of their own: P shares those of S, except where it outlives the next S."""
    tiles = plan.worker.reg_tiles
    return tiles if takes_warpgroups(plan) else tuple(tile for tile in tiles if tile.layout == "accumulator")


def _registers(plan: KernelPlan) -> Iterator[Violation]:
    free, warps = free_registers(plan), plan.worker.warps
    used = {tile.name: tile.registers_per_thread(warps) for tile in tiles_in_registers(plan)}
    if sum(used.values()) > free:
        parts = " + ".join(f"{name} {count}" for name, count in used.items())
        of_promotion = "; part_o is what precision.promote: 0 does without" if _promotes(plan) else ""
        yield _cost(
            "registers",
            plan,
            f"asks for {sum(used.values())} registers a thread in tiles and {free} are free",
            f"{parts} = {sum(used.values())}{of_promotion}",
            *("tile.block_n", "tile.block_m"),
            "schedule.warpgroups" if takes_warpgroups(plan) else "schedule.warps",
        )


def staged_groups(plan: KernelPlan) -> tuple[int, int] | None:
    """Groups of columns whose scales the producer stages, if it does, and how many it has registers for."""
    if not takes_warpgroups(plan) or (registers := plan.roles[1].registers) is None:
        return None
    staged = [step.groups for step in walk(plan.roles[1].program) if isinstance(step, StageScales)]
    return (staged[0], registers // REGISTERS_OF_STAGED_GROUP) if staged and plan.arch.emits else None


def _staged_scales(plan: KernelPlan) -> Iterator[Violation]:
    found = staged_groups(plan)
    if found and found[0] > found[1]:
        yield Violation(
            "staged-scales",
            "tile.block_n",
            plan.block_n,
            f"must lie in at most {found[1]} groups of columns that share a scale",
            f"with granules of {KEY_BLOCK} keys it lies in {found[0]}, and the producer stages the scales of each",
        )


def _threads(plan: KernelPlan) -> Iterator[Violation]:
    limit = plan.arch.threads_per_block // 32
    if not takes_warpgroups(plan) and plan.warps > limit:
        yield Violation(
            "threads-per-block",
            "schedule.warps",
            plan.warps,
            f"must be at most {limit}",
            f"a block has at most {plan.arch.threads_per_block} threads",
        )


def _stages(plan: KernelPlan) -> Iterator[Violation]:
    if plan.schedule == "serial" and plan.stages != 1:
        yield Violation(
            "serial-stages", "schedule.stages", plan.stages, "must be 1", "serial overlaps nothing"
        )
    if plan.stages > MOST_STAGES:
        yield Violation(
            "stages",
            "schedule.stages",
            plan.stages,
            f"must be at most {MOST_STAGES}",
            "copies in flight are few",
        )


RULES: dict[str, Callable[[KernelPlan], Iterator[Violation]]] = {
    "threads-per-block": _threads,
    "stages": _stages,
    "warpgroups": _warpgroups,
    "largest-tile": _largest_tile,
    "mma-rows": _mma_rows,
    "wgmma-rows": _wgmma_rows,
    "wgmma-columns": _wgmma_columns,
    "mma-k-step": _mma_k_step,
    "shared-memory": _shared_memory,
    "registers": _registers,
    "staged-scales": _staged_scales,
}
OWNERS_OF_ROWS = ("threads-per-block", "warpgroups", "mma-rows", "wgmma-rows")
"""Rules of who owns which rows."""
COSTS = ("shared-memory", "registers")
"""Rules of what a tile costs. Where rows have no owner, that is the cost of a tile that nobody can run."""


def verify(plan: KernelPlan) -> tuple[Violation, ...]:
    """Every violation of every rule."""
    return tuple(violation for rule in RULES.values() for violation in rule(plan))

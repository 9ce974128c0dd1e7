"""The rule table: named hardware rules that every plan passes before any compiler runs.

Each rule reads off a finished plan what it uses of what is allowed, and names the values of the spec that have a part
in it. What would be the nearest valid value is lowering's to find, since only it can make another plan.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from attngen.expr import LARGEST_TILE
from attngen.plan.places import RegTile
from attngen.plan.plan import KernelPlan
from attngen.plan.steps import Promote, StageScales, walk
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
"""Registers of a consumer's thread that tiles of 8-bit inputs leave free; tiles and scales where O is promoted, since a
part of O is not held through the softmax; these and all row values where each key has a scale. What NVRTC 13.0.88 made
of 251 tiles of head_dim 64, 128 and 256 tells them: all that pass compile without spills."""
REGISTERS_OF_STAGED_GROUP = 6
"""Of a producer's thread, for the scales of a group of columns on their way to shared memory; from the same tiles."""
REGISTERS_PER_ALLOCATION = 8
"""Registers of a thread come in eights (256 a warp). Source: CUDA occupancy data, compute capability 8.0 to 12.0."""
SUBPARTITIONS = 4
"""Parts of a multiprocessor; each has a quarter of the registers, and a warp lives in one. Source: cuda_occupancy.h."""
MOST_STAGES = 8
MOST_WARPGROUPS = 3
MOST_WGMMA_COLUMNS = 256
"""Source: PTX ISA, wgmma.mma_async, shapes .m64n8k16 to .m64n256k16."""


@dataclass(frozen=True)
class Blame:
    """How a broken rule is told by one value of the spec."""

    path: str
    value: int
    must: str
    note: str


@dataclass(frozen=True)
class Margin:
    """What a plan uses of what one rule allows.

    Attributes:
        used, limit: of a rule about an amount; of a rule about a multiple, the number and its step.
        unit: of both.
        blames: the values of the spec that have a part in it, the most easily changed first; which of them a spec
            gives, a plan does not know. None where another rule tells of them.
        allows: what `used` may be. Only an amount has a margin, and binds.
    """

    used: int
    limit: int
    unit: str
    blames: tuple[Blame, ...] = ()
    allows: Literal["at most", "multiples", "exactly"] = "at most"

    @property
    def is_kept(self) -> bool:
        """Whether the plan passes."""
        return {
            "at most": self.used <= self.limit,
            "multiples": self.used % self.limit == 0,
            "exactly": self.used == self.limit,
        }[self.allows]

    @property
    def share(self) -> float:
        """What part of an amount is used; 0 of a multiple."""
        return self.used / self.limit if self.allows == "at most" else 0.0

    def __str__(self) -> str:
        if self.allows != "at most":
            return f"{self.used} = {self.used // self.limit} x {self.limit} {self.unit}"
        return f"{self.used} of {self.limit} {self.unit} ({self.limit - self.used} left)"


@dataclass(frozen=True)
class Violation:
    """A rule that a plan breaks, and the values of the spec that it can be told by."""

    rule: str
    blames: tuple[Blame, ...]


def takes_warpgroups(plan: KernelPlan) -> bool:
    """Whether consumer warpgroups compute, with wgmma."""
    return len(plan.roles) > 1


def _threads(plan: KernelPlan) -> Iterator[Margin]:
    limit = plan.arch.threads_per_block
    must, note = f"must be at most {limit // 32}", f"a block has at most {limit} threads"
    warps = Blame("schedule.warps", plan.warps, must, note)
    yield Margin(plan.threads, limit, "threads", () if takes_warpgroups(plan) else (warps,))


def _serial_stages(plan: KernelPlan) -> Iterator[Margin]:
    if plan.schedule == "serial":
        blame = Blame("schedule.stages", plan.stages, "must be 1", "serial overlaps nothing")
        yield Margin(plan.stages, 1, "stages", (blame,))


def _stages(plan: KernelPlan) -> Iterator[Margin]:
    must = f"must be at most {MOST_STAGES}"
    blame = Blame("schedule.stages", plan.stages, must, "copies in flight are few")
    yield Margin(plan.stages, MOST_STAGES, "stages", (blame,))


def _warpgroups(plan: KernelPlan) -> Iterator[Margin]:
    if not takes_warpgroups(plan) or plan.arch.wgmma is None:
        return
    count, rows = plan.worker.warpgroups, plan.arch.wgmma.m
    note = "a fourth would leave each thread fewer than 128 registers"
    blames = [Blame("schedule.warpgroups", count, f"must be at most {MOST_WARPGROUPS}", note)]
    if plan.arch.has_mma_granularity:
        must = f"must be at most {MOST_WARPGROUPS * rows}"
        owned = f"each consumer warpgroup owns {rows} rows, and {note}"
        blames.append(Blame("tile.block_m", plan.block_m, must, owned))
    yield Margin(count, MOST_WARPGROUPS, "consumer warpgroups", tuple(blames))


def _largest_tile(plan: KernelPlan) -> Iterator[Margin]:
    must = f"must be at most {LARGEST_TILE}"
    note = "indices past the end of the longest sequence fit 32 bits"
    if plan.arch.emits:
        for path, size in (("tile.block_m", plan.block_m), ("tile.block_n", plan.block_n)):
            yield Margin(size, LARGEST_TILE, "rows or keys", (Blame(path, size, must, note),))


def _mma_rows(plan: KernelPlan) -> Iterator[Margin]:
    if takes_warpgroups(plan):
        return
    rows = plan.arch.mma.m
    if plan.shares_keys:
        must, note = f"must be a multiple of {rows}", "each warp has all rows of a tile whose keys are split"
        blame = Blame("tile.block_m", plan.block_m, must, note)
        yield Margin(plan.block_m, rows, "rows", (blame,), "multiples")
        return
    who = f"each of {plan.warps} warps" if plan.warps > 1 else "a warp"
    step, note = rows * plan.warps, f"{who} owns rows in steps of {rows}"
    shares = f"must share the {plan.block_m} rows of a tile in steps of {rows}"
    blames = (
        Blame("tile.block_m", plan.block_m, f"must be a multiple of {step}", note),
        Blame("schedule.warps", plan.warps, shares, note),
    )
    yield Margin(plan.block_m, step, "rows", blames, "multiples")


def _wgmma_rows(plan: KernelPlan) -> Iterator[Margin]:
    if not takes_warpgroups(plan) or plan.arch.wgmma is None:
        return
    rows, count, is_exact = plan.arch.wgmma.m, plan.worker.warpgroups, plan.arch.has_mma_granularity
    if is_exact:
        must = f"must be {rows} for each consumer warpgroup"
        shares = f"must be one for every {rows} of the {plan.block_m} rows of a tile"
        note = f"{rows * count} for {count}: each owns the rows of one wgmma"
    else:
        must = f"must be a multiple of {count}"
        shares = f"must divide the {plan.block_m} rows of a tile"
        note = "warpgroups share the rows"
    blames = (
        Blame("tile.block_m", plan.block_m, must, note),
        Blame("schedule.warpgroups", count, shares, note),
    )
    yield Margin(plan.block_m, rows * count, "rows", blames, "exactly" if is_exact else "multiples")


def _wgmma_columns(plan: KernelPlan) -> Iterator[Margin]:
    if takes_warpgroups(plan) and plan.arch.emits:
        must = f"must be at most {MOST_WGMMA_COLUMNS}"
        blame = Blame("tile.block_n", plan.block_n, must, "S of a block is one wgmma wide")
        yield Margin(plan.block_n, MOST_WGMMA_COLUMNS, "keys", (blame,))


def _mma_k_step(plan: KernelPlan) -> Iterator[Margin]:
    step = plan.arch.k_step(plan.inputs)
    note = f"P·V consumes block_n in k-steps of {step} for {plan.inputs.name}"
    warps = plan.warps if plan.shares_keys else 1
    if warps > 1:
        note = f"each of {warps} warps has keys of its own, in k-steps of {step} for {plan.inputs.name}"
    blames = [Blame("tile.block_n", plan.block_n, f"must be a multiple of {step * warps}", note)]
    if warps > 1:
        must = f"must share the {plan.block_n} keys of a block in steps of {step}"
        blames.append(Blame("schedule.warps", plan.warps, must, note))
    yield Margin(plan.block_n, step * warps, "keys", tuple(blames), "multiples")


def _cost(plan: KernelPlan, must: str, note: str, *paths: str) -> tuple[Blame, ...]:
    """A sum that is too large, by each of the values that it grows or shrinks with."""
    values = {
        "tile.block_m": plan.block_m,
        "tile.block_n": plan.block_n,
        "schedule.stages": plan.stages,
        "schedule.warps": plan.warps,
        "schedule.warpgroups": plan.worker.warpgroups,
    }
    return tuple(Blame(path, values[path], must, note) for path in paths)


def _shared_memory(plan: KernelPlan) -> Iterator[Margin]:
    limit = plan.arch.smem_bytes_per_block
    sizes = {buffer.name: buffer.size_bytes for buffer in plan.buffers if buffer.overlays is None}
    if rest := plan.smem_bytes - sum(sizes.values()):
        sizes["barriers"] = rest
    parts = " + ".join(f"{name} {size}" for name, size in sizes.items())
    blames = _cost(
        plan,
        f"asks for {plan.smem_bytes} bytes of shared memory and {plan.arch.name} has {limit}",
        f"{parts} = {plan.smem_bytes} bytes",
        *("tile.block_n", "schedule.stages", "tile.block_m"),
        *(("schedule.warpgroups",) if takes_warpgroups(plan) else ()),
    )
    yield Margin(plan.smem_bytes, limit, "bytes", blames)


def free_registers(plan: KernelPlan) -> int:
    """Registers a thread of the computing role has for its tiles."""
    worker = plan.worker
    counted = (vector for vector in worker.reg_vecs if vector.is_counted)
    vectors = {vector: vector.registers_per_thread(worker.warps) for vector in counted}
    if plan.arch.emits and any(scale.axis == "keys" and scale.granule == 1 for scale in plan.scales):
        held = worker.registers or WARPGROUP_REGISTERS[2].consumer  # one warpgroup has no more use for them
        return held - SPARE_BY_KEY - sum(vectors.values())
    if worker.registers is None or not plan.arch.emits:
        warps = -(-plan.threads // (32 * SUBPARTITIONS)) * SUBPARTITIONS
        shared_out = plan.arch.registers_per_sm // (32 * warps)
        granted = shared_out // REGISTERS_PER_ALLOCATION * REGISTERS_PER_ALLOCATION
        return min(plan.arch.registers_per_thread, granted) - SPARE_REGISTERS
    if plan.inputs.bits == 16:
        return worker.registers - WARPGROUP_REGISTERS[worker.warpgroups].spare
    if promoted_parts(plan):
        of_scales = sum(registers for vector, registers in vectors.items() if vector.groups)
        return worker.registers - SPARE_PROMOTED - of_scales
    return worker.registers - SPARE_8BIT


def promoted_parts(plan: KernelPlan) -> set[RegTile]:
    """The parts that the tensor core sums and of which O is added up."""
    return {step.part for step in walk(plan.worker.program) if isinstance(step, Promote)}


def tile_registers(plan: KernelPlan) -> dict[str, int]:
    """Registers that a thread of the computing role spends on each tile that has its own.

    P shares those of S, except where it outlives the next S.
    """
    worker = plan.worker
    return {
        tile.name: tile.registers_per_thread(worker.warps)
        for tile in worker.reg_tiles
        if takes_warpgroups(plan) or tile.layout == "accumulator"
    }


def _registers(plan: KernelPlan) -> Iterator[Margin]:
    free, parts = free_registers(plan), tile_registers(plan)
    used = sum(parts.values())
    of_promotion = "; part_o is what precision.promote: 0 does without" if promoted_parts(plan) else ""
    blames = _cost(
        plan,
        f"asks for {used} registers a thread in tiles and {free} are free",
        f"{' + '.join(f'{name} {count}' for name, count in parts.items())} = {used}{of_promotion}",
        *("tile.block_n", "tile.block_m"),
        "schedule.warpgroups" if takes_warpgroups(plan) else "schedule.warps",
    )
    unit = "tile registers" if takes_warpgroups(plan) else "accumulator registers"
    yield Margin(used, free, unit, blames)


def _parts(plan: KernelPlan) -> Iterator[Margin]:
    """A part of the keys is whole blocks."""
    if plan.split and plan.split.keys is not None:
        must, note = f"must divide {plan.split.keys}", "the keys of a part are whole blocks"
        blame = Blame("tile.block_n", plan.block_n, must, note)
        yield Margin(plan.split.keys, plan.block_n, "keys", (blame,), "multiples")


def _staged_scales(plan: KernelPlan) -> Iterator[Margin]:
    """Groups of columns whose scales a producer stages, which pass through its registers."""
    if not takes_warpgroups(plan) or not plan.arch.emits or (held := plan.roles[1].registers) is None:
        return
    staged = [step.groups for step in walk(plan.roles[1].program) if isinstance(step, StageScales)]
    for groups in staged[:1]:
        limit = held // REGISTERS_OF_STAGED_GROUP
        must = f"must lie in at most {limit} groups of columns that share a scale"
        note = f"with granules of {KEY_BLOCK} keys it lies in {groups}, and the producer stages the scales of each"
        yield Margin(groups, limit, "groups of columns", (Blame("tile.block_n", plan.block_n, must, note),))


RULES: dict[str, Callable[[KernelPlan], Iterator[Margin]]] = {
    "threads-per-block": _threads,
    "serial-stages": _serial_stages,
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
    "parts": _parts,
}
"""By name; a rule that says nothing of a plan's schedule has no margin there."""
OWNERS_OF_ROWS = ("threads-per-block", "warpgroups", "mma-rows", "wgmma-rows")
"""Rules of who owns which rows."""
COSTS = ("shared-memory", "registers")
"""Rules of what a tile costs. Where rows have no owner, that is the cost of a tile that nobody can run."""
CHOSEN = ("serial-stages", "stages", "threads-per-block", "warpgroups")
"""Rules about what the spec counts out itself; a tile is bound by what it costs."""


def verify(plan: KernelPlan) -> tuple[Violation, ...]:
    """Every violation of every rule."""
    return tuple(
        Violation(rule, margin.blames)
        for rule, measure in RULES.items()
        for margin in measure(plan)
        if margin.blames and not margin.is_kept
    )


def margins(plan: KernelPlan) -> dict[str, Margin]:
    """What a plan that passes leaves of every rule that says something of it; of several amounts the fullest."""
    found = {
        rule: max(measure(plan), key=lambda margin: margin.share, default=None)
        for rule, measure in RULES.items()
    }
    return {rule: margin for rule, margin in found.items() if margin is not None}


def binding(plan: KernelPlan) -> tuple[str, Margin]:
    """The rule that a larger tile would break first: the one whose allowance is most used up."""
    costs = ((rule, margin) for rule, margin in margins(plan).items() if rule not in CHOSEN)
    return max(costs, key=lambda cost: cost[1].share)

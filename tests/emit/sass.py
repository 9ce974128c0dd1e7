"""What ptxas made of a kernel: its loops, read from the disassembly, and the table of docs/sass.md."""

import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import attngen
from attngen.arch import ARCHS
from attngen.compiled_module import Module
from attngen.lower import lower
from attngen.plan import KernelPlan
from attngen.resources import shipped_names

TABLE = Path(__file__).resolve().parents[2] / "docs" / "sass.md"
HEAD = """# What ptxas makes of the shipped specs

NVRTC 13.0.88; `python tests/emit/regenerate.py` rewrites this, a test holds all but the seconds (two cores, two
compilers at a time) in step. The hot loop is the one densest in matrix instructions and exponentials; it covers one
block of keys. R2UR in it means that descriptors of wgmma do not stay in uniform registers.

| spec | keys | schedule, tile | registers | spilled bytes | loop | HGMMA, QGMMA, HMMA | MUFU | R2UR | compiled in [s] |
|---|---|---|---|---|---|---|---|---|---|
"""
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)([^;]*);")
_WANTS_WAITING = re.compile(
    r"\b(?:LDG?|LDGSTS|STG?|ATOMG?|REDG?|UTMALDG|UTMASTG|UTMAREDG|UBLKCP|PREEXIT)\b[^;]*"
)


def loops(sass: str) -> Iterator[list[str]]:
    """The instructions of every loop, from its label to the branch back."""
    found: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif instruction := _LINE.search(line):
            found.append(instruction[1])
            target = re.search(r"\.L_x_\d+", instruction[2])
            if instruction[1].startswith("BRA") and target and target[0] in labels:
                yield found[labels[target[0]] :]


def hot_loop(sass: str) -> Counter[str]:
    """How often each instruction is in the loop that is densest in matrix instructions and exponentials."""
    bodies = (Counter(name.split(".")[0] for name in body) for body in loops(sass))
    hot = (body for body in bodies if body["MUFU"] and matrix_instructions(body))
    return max(hot, key=lambda body: (body["MUFU"] + matrix_instructions(body)) / body.total())


def done_before_waiting(sass: str) -> list[str]:
    """Of kernels that start early: what accesses device memory, or lets the next one start, ahead of its own wait.

    ptxas may move a load that it takes for one of constants ahead of anything.
    """
    found = []
    for kernel in re.split(r"^\.text\.", sass, flags=re.MULTILINE)[1:]:
        before, *_ = kernel.partition("ACQBULK")
        found += [f"{kernel.split(':')[0]}: {done}" for done in _WANTS_WAITING.findall(before)]
    return found


def matrix_instructions(body: Counter[str]) -> int:
    """Of warpgroups, of 16-bit inputs and of 8-bit ones, and of warps."""
    return body["HGMMA"] + body["QGMMA"] + body["HMMA"]


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    cells: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        return f"| {' | '.join(self.cells)} | {self.seconds:.1f} |"


def row(name: str, plan: KernelPlan, module: Module) -> Row:
    """The line of an attention kernel of a spec."""
    compiled, loop = module.compiled, hot_loop(module.sass())
    used = next(used for used in compiled.resources if used.name == plan.name)
    keys = f"up to {plan.up_to}" if plan.up_to else "any"
    tile = f"{plan.schedule} {plan.block_m}x{plan.block_n}"
    counts = (
        used.registers,
        used.spill_stores,
        loop.total(),
        matrix_instructions(loop),
        loop["MUFU"],
        loop["R2UR"],
    )
    return Row((name, keys, tile, *map(str, counts)), compiled.seconds)


def rows() -> list[Row]:
    """The whole table, in the order of the shipped specs."""
    named = []
    for name in shipped_names():
        spec = attngen.load(name)
        if ARCHS[spec.target].emits:
            kernel = attngen.Kernel(spec, lower(spec, ARCHS[spec.target]))
            named += [(name, plan, kernel.modules[plan.module]) for plan in reversed(kernel.call.programs)]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda each: row(*each), named))


def write_table() -> None:
    """Rewrite docs/sass.md."""
    TABLE.write_text(HEAD + "".join(f"{line}\n" for line in rows()), encoding="utf-8")


def committed_cells() -> list[tuple[str, ...]]:
    """The lines of docs/sass.md, without the seconds."""
    lines = TABLE.read_text(encoding="utf-8").removeprefix(HEAD).splitlines()
    return [tuple(cell.strip() for cell in line.strip("|").split("|")[:-1]) for line in lines]

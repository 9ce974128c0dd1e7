"""Classes of tiles, and the tables of extremes they read, as a GPU finds them against what the simulator does.

The functions that are run are those of the emitted kernels: `visits` and `is_full`, or `key_blocks` where the mask has
bounds in closed form.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attngen.arch import ARCHS
from attngen.expr import Declarations, Expr, fill_tables, free_names, tensor_names
from attngen.fuzz.draw_expressions import DECLARATIONS
from attngen.lower import lower
from attngen.plan import FillTables, KernelPlan, evaluate_formula
from attngen.simulate import Sizes, block_bounds
from attngen.simulate.visits import Declared, Member, walk_of
from tests.language.declared import random_scalars, random_tensors
from tests.language.elementwise import Drawn
from tests.language.probe import Field, Probe, moved, parameters, spec_of
from tests.language.probe_sources import PROBE_THREADS, classes_source

TILE = (16, 16)
MOST_ROWS = 150
BATCH, HEADS, HEADS_KV = 2, 4, 2


@dataclass(frozen=True)
class WrongTile:
    """A mask whose classes or tables differ."""

    text: str
    sizes: Sizes
    complaint: str

    def __str__(self) -> str:
        lengths = f"seqlen_q = {self.sizes.seqlen_q}, seqlen_k = {self.sizes.seqlen_k}"
        return f"{self.text}\n{self.complaint}, {lengths}"


def plan_of_mask(mask: Drawn, target: str) -> KernelPlan:
    """The plan of a kernel with that mask and what it reads."""
    spec = spec_of(str(mask.expr), _read_by(mask.expr), target, TILE)
    return lower(spec, ARCHS[target]).attention


def _read_by(mask: Expr) -> Declarations:
    names, tensors = free_names(mask), tensor_names(mask)
    return Declarations(
        {name: scalar for name, scalar in DECLARATIONS.scalars.items() if name in names},
        {name: tensor for name, tensor in DECLARATIONS.tensors.items() if name in tensors},
    )


def source_of_classes(plans: Sequence[KernelPlan]) -> str:
    """The file of a kernel for each plan."""
    return classes_source({_kernel(place): plan for place, plan in enumerate(plans)})


def _kernel(place: int) -> str:
    return f"classes_{place}"


def check_tiles(masks: Sequence[Drawn], target: str, seed: int = 0, device: str = "cuda") -> list[WrongTile]:
    """Class all tiles of random calls on a GPU; one complaint for each mask that is wrong."""
    plans = [plan_of_mask(mask, target) for mask in masks]
    probe = Probe(source_of_classes(plans), target, device)
    generator = torch.Generator().manual_seed(seed)
    wrong = []
    for place, (mask, plan) in enumerate(zip(masks, plans, strict=True)):
        rows, keys = torch.randint(1, MOST_ROWS + 1, (2,), generator=generator).tolist()
        sizes = Sizes(BATCH, rows, keys, HEADS, HEADS_KV)
        tensors = random_tensors(plan.declarations, sizes.values, generator, is_wild=place % 2 == 1)
        scalars = random_scalars(plan.declarations, generator, is_wild=place % 4 == 1)
        complaint = _complaint(probe, _kernel(place), plan, sizes, scalars, tensors)
        wrong += [WrongTile(mask.text, sizes, complaint)] if complaint else []
    return wrong


def _complaint(
    probe: Probe,
    kernel: str,
    plan: KernelPlan,
    sizes: Sizes,
    scalars: dict[str, Any],
    tensors: dict[str, torch.Tensor],
) -> str | None:
    on_gpu = moved(tensors, probe.device)
    expected: Mapping[str, torch.Tensor] = {}
    spaces: dict[str, torch.Tensor] = {}
    if plan.tables:
        expected = fill_tables(plan.tables, sizes.values, scalars, tensors, *TILE)
        spaces = filled_on_gpu(probe, plan, sizes, scalars, on_gpu, expected)
    for name, table in expected.items():
        got = spaces[name].cpu().to(table.dtype)
        if not torch.equal(got, table):
            at = tuple((got != table).nonzero()[0].tolist())
            return f"{name}[{', '.join(map(str, at))}] is {got[at].item()} on the GPU, {table[at].item()} is right"
    blocks = [
        -(-length // block) for length, block in zip((sizes.seqlen_q, sizes.seqlen_k), TILE, strict=True)
    ]
    found = torch.zeros(BATCH, HEADS, *blocks, dtype=torch.int64, device=probe.device)
    fields: list[Field] = [("pointer", found.data_ptr())]
    fields += [("i32", size) for size in (BATCH, HEADS, sizes.group, *blocks)]
    known = parameters(plan, sizes.values, scalars, on_gpu, spaces)
    probe.run(kernel, -(-found.numel() // PROBE_THREADS), known, fields)
    right = simulated_classes(plan, sizes, Declared(scalars, tensors | dict(expected)), blocks)
    got = found.cpu()
    if torch.equal(got, right):
        return None
    b, h, m, n = (got != right).nonzero()[0].tolist()
    words = ("empty", "partial", "full")
    where = f"tile ({m}, {n}) of head {h} of batch {b}"
    return f"{where} is {words[int(got[b, h, m, n])]} on the GPU, {words[int(right[b, h, m, n])]} in the simulator"


def filled_on_gpu(
    probe: Probe,
    plan: KernelPlan,
    sizes: Sizes,
    scalars: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    like: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The tables of a plan, filled by its own kernel."""
    kernel = FillTables(plan)
    spaces = {
        name: torch.full(
            table.shape,
            77,
            dtype=torch.float32 if table.is_floating_point() else torch.int32,
            device=probe.device,
        )
        for name, table in like.items()
    }
    known = parameters(plan, sizes.values, scalars, tensors, spaces)
    probe.run(kernel.name, evaluate_formula(kernel.grid, sizes.values), known, threads=kernel.threads)
    return spaces


def simulated_classes(
    plan: KernelPlan, sizes: Sizes, declared: Declared, blocks: Sequence[int]
) -> torch.Tensor:
    """0 for an empty tile, 1 for a partial one, 2 for a full one: (batch, num_heads_q, m, n)."""
    sizes = Sizes(
        sizes.batch, sizes.seqlen_q, sizes.seqlen_k, sizes.num_heads_q, sizes.num_heads_kv, declared=declared
    )
    found = torch.zeros(sizes.batch, sizes.num_heads_q, *blocks, dtype=torch.int64)
    for b, h, m in torch.cartesian_prod(*(torch.arange(size) for size in found.shape[:3])).tolist():
        member = Member(b, h, h // sizes.group, sizes.seqlen_q, sizes.seqlen_k)
        if plan.key_blocks is None:
            for block in walk_of(plan, sizes, m, member):
                found[b, h, m, block.n] = 1 if block.is_partial else 2
        else:
            (bounds,) = block_bounds(plan, sizes, [m], member)
            found[b, h, m, bounds.n_min : bounds.n_max] = 1
            found[b, h, m, bounds.n_full_begin : bounds.n_full_end] = 2
    return found

"""Running a whole plan on the CPU: its launches, block after block, for values or only to count."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from attngen.dtypes import torch_dtype
from attngen.plan import STEPS, KernelPlan, Plan, Step, evaluate_formula
from attngen.quantize import unpack_values
from attngen.simulate import control, copies, gemms, scales, softmax, sync
from attngen.simulate.blocks import Block, Call, scale_params
from attngen.simulate.device_memory import DeviceMemory
from attngen.simulate.faults import SimulationFault
from attngen.simulate.roles import Event, StepFunction
from attngen.simulate.threads import one_thread
from attngen.simulate.tiles import LOCKSTEP, TileSource, tiles
from attngen.simulate.traffic import Traffic
from attngen.simulate.visits import Sizes, declared_values
from attngen.torch_state import torch_defaults


def _function_of(step: type[Step]) -> StepFunction:
    """The function that has the Step's name in the spelling of functions: ForTiles, for_tiles."""
    name = re.sub(r"(?<!^)([A-Z])", r"_\1", step.__name__).lower()
    found: StepFunction = next(vars(module)[name] for module in _STEP_MODULES if name in vars(module))
    return found


_STEP_MODULES = (control, sync, copies, gemms, softmax, scales)
STEPS_SIMULATED: dict[type[Step], StepFunction] = {step: _function_of(step) for step in STEPS}
"""What each Step does."""


@torch_defaults()
@one_thread()
def simulate(
    plan: Plan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    layout: str = "bshd",
    observer: Callable[[Event], None] | None = None,
    steps: Mapping[type[Step], StepFunction] | None = None,
    memory: Traffic | None = None,
    declared: Mapping[str, Any] | None = None,
    descales: Mapping[str, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention as the plan's kernels do: same tiles, same order, same roundings.

    Args:
        plan: what to run.
        q: (batch, seqlen_q, num_heads_q, head_dim_qk), the plan's input type, on the CPU; arguments have been
            checked by the caller.
        k: (batch, seqlen_k, num_heads_kv, head_dim_qk).
        v: (batch, seqlen_k, num_heads_kv, head_dim_v).
        softmax_scale: any finite number; 1/sqrt(head_dim_qk) where None.
        return_lse: whether to compute lse.
        layout: "bshd"; "bhsd" exchanges the seqlen and heads dimensions of q, k, v and out.
        observer: called after every Step; heads then run one by one.
        steps: functions to use instead of `STEPS_SIMULATED`'s, to see what a fault of theirs would do.
        memory: where to count FLOPs and bytes.
        declared: the scalars and tensors of the spec, by name.
        descales: of 8-bit q, k and v, by the names of `Plan.scales`: (batch, heads), or (batch, heads, granules). v is
            then as `attngen.quantize.Operands` has it: transposed, and keys in the order of fragments.

    Returns:
        out: (batch, seqlen_q, num_heads_q, head_dim_v), the plan's output type.
        lse: (batch, num_heads_q, seqlen_q), f32, or None.

    Raises:
        SimulationFault: a program broke a rule.
    """
    q_heads, k_heads = (x if layout == "bhsd" else x.transpose(1, 2) for x in (q, k))
    if plan.scales:  # the order of 16 keys is for the registers of a lane, which simulated tiles do not have
        v_heads = unpack_values(v, k_heads.shape[2]).permute(0, 2, 3, 1)
    else:
        v_heads = v if layout == "bhsd" else v.transpose(1, 2)
    batch, num_heads_q, seqlen_q, _ = q_heads.shape
    sizes = Sizes(batch, seqlen_q, k_heads.shape[2], num_heads_q, k_heads.shape[1])
    sizes = replace(sizes, declared=declared_values(plan, sizes, declared or {}))
    out = torch.full((*q.shape[:3], plan.head_dim_v), math.nan, dtype=torch_dtype(plan.output))
    lse = torch.full((batch, num_heads_q, seqlen_q), math.nan, dtype=torch.float32) if return_lse else None
    tensors = {
        "q": q_heads,
        "k": k_heads,
        "v": v_heads,
        "out": out if layout == "bhsd" else out.transpose(1, 2),
        **(descales or {}),
    }
    if lse is not None:
        tensors["lse"] = lse
    scale = 1 / math.sqrt(plan.head_dim_qk) if softmax_scale is None else softmax_scale
    call = Call(
        plan,
        sizes,
        scale=scale_params(plan, scale),
        device=DeviceMemory(plan, sizes, tensors, memory),
        steps={**STEPS_SIMULATED, **(steps or {})},
        observer=observer,
    )
    _launch(call, lockstep=LOCKSTEP if observer is None else 1)
    return out, lse


@torch_defaults()
def count(
    plan: Plan,
    seqlen_q: int,
    seqlen_k: int,
    batch: int = 1,
    heads: int = 1,
    heads_kv: int | None = None,
    *,
    return_lse: bool = False,
    declared: Mapping[str, Any] | None = None,
) -> Traffic:
    """The FLOPs and bytes of a call, by running its programs without values.

    Heads that take the same way through the program are run once and counted as often as there are. Blocks of keys
    that depend on what `declared` does not hold are all visited.
    """
    sizes = Sizes(batch, seqlen_q, seqlen_k, heads, heads if heads_kv is None else heads_kv)
    sizes = replace(sizes, declared=declared_values(plan, sizes, declared or {}))
    traffic = Traffic()
    device = DeviceMemory(plan, sizes, None, traffic, wanted=("lse",) if return_lse else ())
    _launch(Call(plan, sizes, scale_params(plan, 1.0), device, STEPS_SIMULATED), lockstep=batch * heads)
    return traffic


def _launch(call: Call, lockstep: int) -> None:
    """Run every launch of the plan."""
    plan, sizes = call.plan, call.sizes
    if sizes.batch * sizes.seqlen_q * sizes.num_heads_q == 0:
        return  # the output is empty and nothing is launched
    for launch in plan.launches:
        kernel = next(kernel for kernel in plan.kernels if kernel.name == launch.kernel)
        grid = evaluate_formula(launch.grid, sizes.values)
        source = TileSource(tiles(plan, kernel, sizes, lockstep), kernel.scheduler.persistent, grid)
        expected = evaluate_formula(launch.tiles, sizes.values)
        if source.heads != expected or (grid != expected and not source.is_drawn_from):
            message = (
                f"{kernel.name} is launched on {grid} blocks for {expected} tiles and has {source.heads}"
            )
            raise SimulationFault("wrong grid", message)
        _run_blocks(call, kernel, source)
    if missing := call.device.unwritten(plan):
        name, m = missing
        raise SimulationFault(
            "never written", f"block {m} of {name} is not written once by every head", place=name
        )


def _run_blocks(call: Call, kernel: KernelPlan, source: TileSource) -> None:
    """Run the blocks of a launch: those of a persistent kernel in turns, the others one after another."""
    at_a_time = source.blocks if source.is_drawn_from else 1
    for first in range(0, source.blocks, at_a_time):
        blocks = [Block(call, kernel, source, i) for i in range(first, first + at_a_time)]
        while running := [block for block in blocks if not block.is_done]:
            for block in running:
                block.go_on()
    if source.counter:
        raise SimulationFault(
            "never reset", f"the tile counter of {kernel.name} stands at {source.counter} at the end"
        )

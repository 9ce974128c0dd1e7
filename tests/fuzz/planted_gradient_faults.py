"""Faults of a backward pass as people make them, planted in the simulator or in its programs; the forward is right."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from planted_faults import Edit, rewritten, with_programs

from attngen.api import compile
from attngen.bind import bind, check_arguments
from attngen.fuzz.trial import Make
from attngen.plan import GRADIENTS_INTAKE, KernelPlan, Step
from attngen.plan.steps import ForHeads, HidePairs, LoadTile, RecoverP, ScaleGradient, ScoreGradient
from attngen.simulate import SIMULATED_SMS, STEPS_SIMULATED, RoleRun, StepFunction, run_call
from attngen.simulate.roles import Run
from attngen.simulate.simulated_copies import rounded
from attngen.spec import Spec
from attngen.spec_call import GRADIENTS


@dataclass(frozen=True)
class GradientFault:
    """A slip.

    Attributes:
        steps: functions in place of the simulator's.
        edit: what becomes of each Step of the pass; None where it is left out.
        forgets_dlse: the gradient of lse has no part.
    """

    steps: Mapping[type[Step], StepFunction] = field(default_factory=dict)
    edit: Edit = lambda step: step
    forgets_dlse: bool = False


class PlantedGradients:
    """A kernel whose backward pass has a fault."""

    def __init__(self, spec: Spec, fault: GradientFault) -> None:
        self.kernel = compile(spec)
        self.plan, self.fault = self.kernel.plan, fault
        call = self.kernel.call
        edited = (self._edited(each) if each in call.gradients else each for each in call.kernels)
        self.call = replace(call, kernels=tuple(edited))

    def _edited(self, plan: KernelPlan) -> KernelPlan:
        return with_programs(plan, lambda program: rewritten(program, self.fault.edit))

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.kernel(*arguments, **options)

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        dlse: torch.Tensor | None,
        softmax_scale: float | None,
        layout: str,
        **declared: Any,
    ) -> tuple[torch.Tensor, ...]:
        rows = {
            name: x if layout == "bshd" else x.transpose(1, 2) for name, x in (("dout", dout), ("out", out))
        }
        of_lse = {} if dlse is None or self.fault.forgets_dlse else {"dlse": dlse}
        named, manifest = {**declared, **rows, "lse": lse, **of_lse}, self.kernel.manifest
        given = check_arguments(manifest, q, k, v, softmax_scale, {}, layout, named, GRADIENTS_INTAKE)
        bound = bind(manifest, given, GRADIENTS, SIMULATED_SMS, softmax_scale)
        made = run_call(self.call, bound, layout=layout, steps=self.fault.steps)
        return tuple(made[name] for name in GRADIENTS)


def plant_gradients(fault: GradientFault) -> Make:
    """Builds every spec with the fault in its backward pass."""
    return lambda spec: PlantedGradients(spec, fault)


def _delta_forgotten(step: ScoreGradient, role: RoleRun) -> None:
    s, dp = role.read(step.s), role.read(step.dp)
    role.write(step.ds, lambda: rounded(s * dp, step.ds.dtype))


def _first_head_of_the_group(step: ForHeads, role: RoleRun) -> Run:
    """dK and dV of the first query head alone."""
    role.see_queries()
    yield from role.run(step.body)


def _head_of_the_group_forgotten(step: LoadTile, role: RoleRun) -> None:
    """Q and dO are always those of the group's first head."""
    tile, members = role.tile, role.tile.members
    if step.src.heads == "q":
        group = role.call.sizes.group
        first = tuple(each._replace(head=each.head // group * group) for each in members)
        role.tile = replace(tile, members=first)
    STEPS_SIMULATED[LoadTile](step, role)
    role.tile = tile


def _scaled_twice(step: ScaleGradient, role: RoleRun) -> None:
    for _ in range(2):
        STEPS_SIMULATED[ScaleGradient](step, role)


def _slope_forgotten(step: Step) -> Step:
    return replace(step, slope=None) if isinstance(step, RecoverP) else step


def _mask_forgotten(step: Step) -> Step | None:
    """Queries and keys that the mask hides, or that there are not, count."""
    if isinstance(step, HidePairs):
        return None
    return replace(step, mask=None) if isinstance(step, RecoverP) else step


def _last_block_dropped(step: RecoverP, role: RoleRun) -> None:
    """Probabilities of the last block of keys are 0."""
    STEPS_SIMULATED[RecoverP](step, role)
    keys = dict(zip(step.s.axes, (step.s.rows, step.s.cols), strict=True))["keys"]
    if role.index(step.block) == (role.tile.seqlen_k - 1) // keys:
        for place in (step.s, step.p) if step.p else (step.s,):
            role.write(place, torch.zeros_like, role.read(place))


GRADIENT_FAULTS: dict[str, GradientFault] = {
    "delta forgotten": GradientFault({ScoreGradient: _delta_forgotten}),
    "dlse forgotten": GradientFault(forgets_dlse=True),
    "slope forgotten": GradientFault(edit=_slope_forgotten),
    "mask forgotten": GradientFault(edit=_mask_forgotten),
    "scale forgotten": GradientFault(edit=lambda step: None if isinstance(step, ScaleGradient) else step),
    "scaled twice": GradientFault({ScaleGradient: _scaled_twice}),
    "one head of the group": GradientFault({ForHeads: _first_head_of_the_group}),
    "head of the group forgotten": GradientFault({LoadTile: _head_of_the_group_forgotten}),
    "last block dropped": GradientFault({RecoverP: _last_block_dropped}),
}

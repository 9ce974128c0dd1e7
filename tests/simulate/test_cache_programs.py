"""Every Step that a cache in e4m3 adds to a program has a reason; and what the simulator finds where one is wrong."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from test_deletion import Path, without

import attngen
from attngen.kernel import Kernel
from attngen.plan import KernelPlan, Program, Step, body_of
from attngen.plan.steps import (
    Clear,
    FitRows,
    Gemm,
    LoadDescales,
    OrderColumns,
    RaiseReference,
    ReadDescale,
    ScaleColumns,
    ScaleRows,
    SyncThreads,
    WaitCopies,
)
from attngen.simulate import SimulationFault, simulate
from tests.simulate.cache_calls import CacheCall

ADDED = (FitRows, LoadDescales, OrderColumns, RaiseReference, ReadDescale, ScaleColumns)
BY = ("score_scale", "value_scale", "raised")


def kernel(inputs: str, scales: str, stages: int) -> Kernel:
    """Small enough for every range of a program to hold many blocks."""
    return attngen.compile(
        {
            "target": "simulator",
            "problem": {"head_dim": 32},
            "precision": {"inputs": inputs, "cache": "e4m3", "scales": scales},
            "mask": "causal and kv_idx % 9 != 4",
            "tile": {"block_m": 8, "block_n": 8},
            "schedule": {"kind": "fa2", "stages": stages},
        }
    )


def added(program: Program, prefix: Path = ()) -> Iterator[tuple[Step, Path]]:
    """The Steps of a cache in a program, and where they stand; those between Q's copy and its conversion too."""
    for i, step in enumerate(program):
        next_fits = any(isinstance(each, FitRows) for each in program[i + 1 : i + 3])
        clears = isinstance(step, Clear) and step.dst.name == "value_scale"
        scales = isinstance(step, ScaleRows) and step.by.name in BY
        if (
            isinstance(step, ADDED)
            or clears
            or scales
            or (next_fits and isinstance(step, WaitCopies | SyncThreads))
        ):
            yield step, (*prefix, i)
        yield from added(body_of(step), (*prefix, i))


def run(plan: KernelPlan, call: CacheCall) -> tuple[torch.Tensor, torch.Tensor | None]:
    q, k, v = call.tensors
    return simulate(plan, q, k, v, softmax_scale=0.3, return_lse=True, descales=call.passed)


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("scales", ["per_head", "per_token"])
@pytest.mark.parametrize("inputs", ["bf16", "f16"])
def test_every_step_of_a_cache_has_a_reason(inputs: str, scales: str, stages: int) -> None:
    """Without it the simulator faults, or another result comes out."""
    of = kernel(inputs, scales, stages)
    call = CacheCall.drawn(of.spec, (70, 70), (61, 61))
    for name, x in call.passed.items():  # V's descales rise from right to left, as blocks are visited
        x *= torch.linspace(64.0, 0.25, 70).view(1, -1, 1) if scales == "per_token" else 1.0
        assert name.endswith("descale")
    plan = of.plan
    out, lse = run(plan, call)
    (role,) = plan.roles
    found = dict(added(role.program))
    assert len(found) >= 4
    for step, path in found.items():
        other = replace(plan, roles=(replace(role, program=without(role.program, path)),))
        try:
            got = run(other, call)
        except SimulationFault:
            continue
        same = all(
            torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-3)
            for a, b in zip(got, (out, lse), strict=True)
        )
        assert not same, f"{step} at {path} is not missed"


@pytest.mark.parametrize(("kind", "says"), [(WaitCopies, "in flight"), (FitRows, "as f16, and holds bf16")])
def test_products_want_f16_and_the_fit_what_has_landed(kind: type[Step], says: str) -> None:
    """Q is converted where it lies, by the warps that own its rows."""
    of = kernel("bf16", "per_head", 2)
    (role,) = of.plan.roles
    (path,) = (path for step, path in added(role.program) if isinstance(step, kind))
    other = replace(of.plan, roles=(replace(role, program=without(role.program, path)),))
    with pytest.raises(SimulationFault, match=says):
        run(other, CacheCall.drawn(of.spec, (30, 30), (9, 9)))


def test_products_with_rows_of_e4m3_alone_exchange_columns() -> None:
    """Those of K, whose columns are contracted, leave all where they are."""
    (role,) = kernel("bf16", "per_head", 2).plan.roles
    gemms = {step.acc.name: step for step, _ in _all(role.program) if isinstance(step, Gemm)}
    assert gemms["acc_o"].leaves_even_columns_first and not gemms["acc_s"].leaves_even_columns_first


def _all(program: Program) -> Iterator[tuple[Step, Path]]:
    for step in program:
        yield step, ()
        yield from _all(body_of(step))

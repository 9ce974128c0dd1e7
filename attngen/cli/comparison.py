"""Running one kernel on one input and holding the output against the reference."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

import torch
from rich.table import Table

from attngen.accuracy import Accuracy, compare
from attngen.api import Kernel
from attngen.bench import Point, measure
from attngen.cli.output import seconds_text, table
from attngen.cli.shapes import shape_text
from attngen.dtypes import torch_dtype
from attngen.inputs import Shape, random_inputs
from attngen.simulate import trace

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Outcome:
    """One call, judged.

    Attributes:
        label: which kernel.
        seconds: device time of a call on a GPU (median), wall time of the simulator otherwise.
        tflops: None on the simulator, whose time says nothing about the kernel.
        board: what `--trace` prints; empty where it was not asked for.
    """

    label: str
    shape: Shape
    accuracy: Accuracy
    seconds: float
    tflops: float | None
    board: str = ""


def draw_inputs(kernel: Kernel, shape: Shape, device: str, seed: int) -> Inputs:
    """Random inputs that the kernel takes."""
    plan = kernel.plan
    return random_inputs(
        shape, plan.head_dim_qk, plan.head_dim_v, torch_dtype(plan.inputs), device=device, seed=seed
    )


def execute(kernel: Kernel, inputs: Inputs, label: str, *, with_trace: bool = False) -> Outcome:
    """Call a kernel, compare, and time it.

    Raises:
        ArgumentError: inputs that the kernel does not take.
    """
    q, k, v = inputs
    kernel.explain_launch(q, k, v)  # refuses what the kernel does not take, before anything is read off it
    shape = Shape(q.shape[0], q.shape[2], k.shape[2], q.shape[1], k.shape[1])
    board = ""
    started = time.perf_counter()
    if with_trace:
        traced = trace(kernel.plan, q, k, v)
        out, lse, board = traced.out, traced.lse, str(traced)
    else:
        out, lse = kernel(q, k, v, return_lse=True)
    seconds, tflops = time.perf_counter() - started, None
    accuracy = compare(out, lse, q, k, v, kernel.spec.mask_expr, block_n=kernel.plan.block_n)
    if q.is_cuda:
        seconds = median(measure({label: lambda: kernel(q, k, v)})[label]) / 1e3
        point = Point(shape, q.shape[3], v.shape[3], kernel.plan.mask_text == "causal")
        tflops = point.flops / seconds / 1e12
    return Outcome(label, shape, accuracy, seconds, tflops, board)


def outcomes_table(outcomes: Iterable[Outcome], *, on_simulator: bool) -> Table:
    """Error, bound and time of every call."""
    time_column = "time (simulator)" if on_simulator else "time"
    rows = []
    for outcome in outcomes:
        accuracy = outcome.accuracy
        rows.append(
            (
                outcome.label,
                shape_text(outcome.shape),
                _error(accuracy.max_error, accuracy.max_bound),
                _error(accuracy.rmse, accuracy.rmse_bound),
                _error(accuracy.lse_error, accuracy.lse_bound),
                seconds_text(outcome.seconds),
                "-" if outcome.tflops is None else f"{outcome.tflops:.1f}",
                "ok" if accuracy.ok else "FAILED",
            )
        )
    return table(
        (
            "spec",
            "shape",
            "max error / bound",
            "rmse / bound",
            "lse error / bound",
            time_column,
            "TFLOPS",
            "verdict",
        ),
        rows,
        numbers_from=2,
    )


def _error(error: float | None, bound: float | None) -> str:
    return "-" if error is None or bound is None else f"{error:.2e} / {bound:.2e}"

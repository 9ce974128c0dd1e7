"""Running one kernel on one input and holding the output against the reference."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.table import Table

from attngen.check.accuracy import Accuracy
from attngen.check.caches import drawn_descales
from attngen.check.declared_inputs import NOTHING_GIVEN, Given, declared_inputs
from attngen.check.inputs import Kind, Shape
from attngen.check.judging import Inputs, draw, judge
from attngen.check.timing import Point, measure
from attngen.cli.output import seconds_text, table
from attngen.cli.shapes import shape_text
from attngen.errors import ArgumentError
from attngen.kernel import Kernel
from attngen.simulate import trace


@dataclass(frozen=True)
class Outcome:
    """One call, judged.

    Attributes:
        label: which kernel.
        seconds: device time of a call on a GPU (median), of one on operands if inputs are e4m3; wall time of the
            simulator otherwise.
        tflops: None on the simulator, whose time says nothing about the kernel.
        board: what `--trace` prints; empty where it was not asked for.
    """

    label: str
    shape: Shape
    accuracy: Accuracy
    seconds: float
    tflops: float | None
    board: str = ""


def draw_inputs(kernel: Kernel, shape: Shape, device: str, seed: int, kind: Kind = "randn") -> Inputs:
    """Random inputs that the kernel takes."""
    return draw(kernel.plan, shape, device, seed, kind=kind)


def shape_of(kernel: Kernel, inputs: Inputs) -> Shape:
    """The shape of a call on these inputs, whose sequences are dense.

    Raises:
        ArgumentError: inputs that the kernel does not take.
    """
    q, k, v = inputs
    kernel.explain_launch(q, k, v)  # refuses what the kernel does not take, before anything is read off it
    return Shape(q.shape[0], q.shape[2], k.shape[2], q.shape[1], k.shape[1])


def draw_declared(
    kernel: Kernel, inputs: Inputs, seed: int, given: Given = NOTHING_GIVEN, shape: Shape | None = None
) -> dict[str, Any]:
    """What a call on these inputs passes by name: for what the spec declares, and lengths of sequences.

    Raises:
        ArgumentError: as of `declared_inputs` and, where the shape is None, of `shape_of`.
    """
    shape = shape or shape_of(kernel, inputs)
    device = inputs[0].device
    drawn = declared_inputs(kernel.spec.arguments, shape, device, seed, given)
    return {**drawn, **shape.arguments(device), **drawn_descales(kernel.spec, shape, device, seed)}


def execute(
    kernel: Kernel,
    inputs: Inputs,
    label: str,
    declared: Mapping[str, Any] | None = None,
    shape: Shape | None = None,
    *,
    with_trace: bool = False,
) -> Outcome:
    """Call a kernel, compare, and time it.

    Args:
        kernel: what is called.
        inputs: q, k and v.
        label: of the outcome.
        declared: of `draw_declared`; all that is passed by name.
        shape: of the call; read off the inputs where None.
        with_trace: whether to run on the simulator and keep what it writes on the board.

    Raises:
        ArgumentError: inputs that the kernel does not take.
    """
    q, k, v = inputs
    shape, passed = shape or shape_of(kernel, inputs), dict(declared or {})
    board = ""
    started = time.perf_counter()
    if with_trace and (kernel.takes_operands or kernel.plan.descales):
        must = "16-bit or f32 inputs: the board has no place for scales"
        raise ArgumentError("--trace", f"a kernel of {kernel.plan.inputs.name} inputs", must)
    if with_trace and shape.cuts:
        raise ArgumentError("--trace", "sequences with lengths of their own", "dense queries and keys")
    if with_trace:
        traced = trace(kernel.plan, q, k, v, declared=passed)
        out, lse, board = traced.out, traced.lse, str(traced)
    else:
        out, lse = kernel(q, k, v, return_lse=True, **passed)
    seconds, tflops = time.perf_counter() - started, None
    accuracy = judge(kernel.spec, kernel.plan, out, lse, q, k, v, declared=passed)
    if q.is_cuda:
        call = (kernel.quantize(q, k, v),) if kernel.takes_operands else inputs
        seconds = median(measure({label: lambda: kernel(*call, **passed)})[label]) / 1e3
        point = Point(shape, q.shape[-1], v.shape[-1], kernel.plan.mask_text == "causal")
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
                error_text(accuracy.max_error, accuracy.max_bound),
                error_text(accuracy.rmse, accuracy.rmse_bound),
                error_text(accuracy.lse_error, accuracy.lse_bound),
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


def error_text(error: float | None, bound: float | None) -> str:
    """An error beside what it may be; a dash where there is none."""
    return "-" if error is None or bound is None else f"{error:.2e} / {bound:.2e}"

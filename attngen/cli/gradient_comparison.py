"""Running the backward pass of one kernel on one input and holding its gradients against the reference."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.table import Table

from attngen.check.gradients import GradientAccuracy
from attngen.check.inputs import Shape, poison_unused, random_like
from attngen.check.judging import Inputs, judge_gradients
from attngen.check.timing import Point, measure
from attngen.cli.comparison import error_text, shape_of
from attngen.cli.output import seconds_text, table
from attngen.cli.shapes import shape_text
from attngen.errors import Diagnostic, SpecError
from attngen.kernel import Kernel
from attngen.simulate import trace_backward
from attngen.spec import Spec

GRADIENTS_KEY = "gradients: [q, k, v]"
"""What a spec must say for a backward pass."""


@dataclass(frozen=True)
class BackwardOutcome:
    """One backward pass, judged; attributes as of `comparison.Outcome`, of all kernels of the pass together."""

    label: str
    shape: Shape
    accuracy: GradientAccuracy
    seconds: float
    tflops: float | None
    board: str = ""


def check_has_gradients(spec: Spec, label: str) -> None:
    """Refuse a spec that asks for no gradients, where `--backward` wants them.

    Raises:
        SpecError: it does not; the key and what may stand there are named.
    """
    if spec.gradients:
        return
    location = spec.locate("gradients")
    whose = "" if location else f"{label}: "
    message = f"{whose}gradients = [] must say what has gradients, for --backward"
    note = "without the key there are kernels of the forward pass alone"
    raise SpecError(
        (Diagnostic(message, "backward-has-gradients", location, "gradients", [], note, (GRADIENTS_KEY,)),)
    )


def execute_backward(
    kernel: Kernel,
    inputs: Inputs,
    label: str,
    declared: Mapping[str, Any] | None = None,
    seed: int = 0,
    shape: Shape | None = None,
    *,
    with_trace: bool = False,
) -> BackwardOutcome:
    """Call a kernel, then its backward pass on a gradient of out from N(0, 1); compare, and time the pass.

    Args:
        kernel: of a spec that asks for gradients.
        inputs: q, k and v.
        label: of the outcome.
        declared: of `draw_declared`; all that is passed by name.
        seed: of the gradient of out, which holds poison where no sequence counts.
        shape: of the call; read off the inputs where None.
        with_trace: whether to run on the simulator and keep what it writes on the board.

    Raises:
        ArgumentError: inputs that the kernel does not take.
    """
    q, k, v = inputs
    shape, passed, board = shape or shape_of(kernel, inputs), dict(declared or {}), ""
    out, lse = kernel(q, k, v, return_lse=True, **passed)
    dout = poison_unused(random_like(out, seed), shape.queries)
    started = time.perf_counter()
    if with_trace:
        wanted = kernel.gradients_of(passed)
        traced = trace_backward(kernel.call, dout, q, k, v, out, lse, wanted, declared=passed)
        gradients, board = tuple(traced.gradients[name] for name in wanted), str(traced)
    else:
        gradients = kernel.backward(dout, q, k, v, out, lse, **passed)
    seconds, tflops = time.perf_counter() - started, None
    accuracy = judge_gradients(kernel.spec, gradients, inputs, dout, out, lse, declared=passed)
    if q.is_cuda:
        runs = {label: lambda: kernel.backward(dout, q, k, v, out, lse, **passed)}
        seconds = median(measure(runs)[label]) / 1e3
        point = Point(shape, q.shape[-1], v.shape[-1], kernel.plan.mask_text == "causal")
        tflops = point.backward_flops / seconds / 1e12
    return BackwardOutcome(label, shape, accuracy, seconds, tflops, board)


def gradients_table(outcomes: Iterable[BackwardOutcome], *, on_simulator: bool) -> Table:
    """Error and bound of every gradient, and the time of the pass that made them."""
    rows = []
    for outcome in outcomes:
        tflops = "-" if outcome.tflops is None else f"{outcome.tflops:.1f}"
        whose, took = (outcome.label, shape_text(outcome.shape)), (seconds_text(outcome.seconds), tflops)
        for name, accuracy in outcome.accuracy.by_name.items():
            largest = error_text(accuracy.max_error, accuracy.max_bound)
            rmse = error_text(accuracy.rmse, accuracy.rmse_bound)
            rows.append((*whose, name, largest, rmse, *took, "ok" if accuracy.ok else "FAILED"))
            whose, took = ("", ""), ("", "")  # those of the whole pass stand in its first row
    time_column = "time (simulator)" if on_simulator else "time"
    errors = ("max error / bound", "rmse / bound")
    return table(
        ("spec", "shape", "gradient", *errors, time_column, "TFLOPS", "verdict"), rows, numbers_from=3
    )

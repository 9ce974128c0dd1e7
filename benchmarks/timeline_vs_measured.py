"""Times that the timeline predicts beside measured ones: `python benchmarks/timeline_vs_measured.py FILE.json ...`.

Takes what bench_hopper.py (its grid), bench_fa2.py and bench_backward.py write, with batch·seqlen = 16384
and heads·head_dim = 2048. Kernels are lowered anew, so the tables of the present tree hold, not those of the
measurement. The last column is the clock at which the two would be equal: below what the GPU really ran at, the
schedule loses time that the model does not know of. `--clock` puts a measured clock in the table's place.
"""

import argparse
import dataclasses
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import attngen
from attngen.arch import ARCHS
from attngen.check.timing import Point, geometric_mean, grid_shape
from attngen.cli.facts import resources_of
from attngen.cli.output import console, table
from attngen.cli.timeline import resident_blocks
from attngen.errors import ToolchainError
from attngen.lower import lower
from attngen.plan import KernelPlan
from attngen.simulate import Costs, costs_of, predict
from attngen.spec import load

ARCH = ARCHS["sm_90a"]
NAME = re.compile(
    r"attn_fwd_sm90a_(?P<inputs>[a-z0-9]+)_d(?P<qk>\d+)(x(?P<v>\d+))?_(?P<mask>full|causal)"
    r"_(?P<kind>serial|fa2|warp_specialized|pingpong)_[0-9a-f]+"
)
"""A kernel's entry name; other masks are known by their digest alone and are passed over."""


@dataclass(frozen=True)
class Measured:
    """What ran at one length: a forward kernel, or the kernels of a backward pass that are programs."""

    label: str
    kernel: attngen.Kernel
    plans: tuple[KernelPlan, ...]
    seqlen: int
    milliseconds: float


def measured(rows: list[dict[str, Any]]) -> Iterator[Measured]:
    """The points of a file that can be predicted."""
    for row in rows:
        if "kernel" not in row:
            yield backward(row)
            continue
        found = NAME.match(row["kernel"])
        if found and row.get("group", "grid") == "grid":
            spec = load(
                {
                    "target": ARCH.name,
                    "problem": {"head_dim": {"qk": int(found["qk"]), "v": int(found["v"] or found["qk"])}},
                    "mask": found["mask"],
                    "precision": {"inputs": found["inputs"]},
                    "schedule": {} if "group" in row else {"kind": found["kind"]},
                }
            )
            kernel = attngen.Kernel(spec, lower(spec, ARCH))
            served = kernel.call.serving({"seqlen_k": row["seqlen"]})
            yield Measured(found["kind"], kernel, (served,), row["seqlen"], median(row["ms"]["attngen"]))


def backward(row: dict[str, Any]) -> Measured:
    """A point of bench_backward.py."""
    spec = load(
        {
            "target": ARCH.name,
            "problem": {"head_dim": row["head_dim"]},
            "mask": "causal" if row["causal"] else "full",
            "gradients": ["q", "k", "v"],
        }
    )
    kernel = attngen.Kernel(spec, lower(spec, ARCH))
    milliseconds = median(row["ms"]["attngen"])
    return Measured("backward", kernel, kernel.call.gradients, row["seqlen"], milliseconds)


def seconds_of(point: Measured, costs: Costs) -> float:
    """What is predicted for all kernels of a point."""
    shape = grid_shape(point.seqlen, point.kernel.plan.head_dim_qk)
    sizes = (shape.seqlen_q, shape.seqlen_k, shape.batch, shape.heads)
    total = 0.0
    for plan in point.plans:
        used = None
        with suppress(ToolchainError):
            used = resources_of(point.kernel, plan)
        total += predict(plan, *sizes, costs=costs, slots=resident_blocks(plan, used)).seconds
    return total


def main(files: list[Path], clock_hz: float | None) -> None:
    """Print a row a point, then the geometric mean and the spread of predicted over measured."""
    costs = costs_of(ARCH)
    if clock_hz is not None:
        costs = dataclasses.replace(costs, clock_hz=clock_hz)
    cells, ratios = [], []
    for path in files:
        for point in measured(json.loads(path.read_text(encoding="utf-8"))["rows"]):
            plan = point.kernel.plan
            seconds, shape = seconds_of(point, costs), grid_shape(point.seqlen, plan.head_dim_qk)
            counted = Point(shape, plan.head_dim_qk, plan.head_dim_v, plan.mask_text == "causal")
            flops = counted.backward_flops if point.label == "backward" else counted.flops
            ratio = seconds * 1e3 / point.milliseconds
            ratios.append(ratio)
            tflops = (flops / seconds / 1e12, flops / point.milliseconds / 1e9)
            cells.append(
                (
                    str(plan.head_dim_qk), plan.mask_text, str(point.seqlen), point.label,
                    f"{seconds * 1e3:.3f}", f"{point.milliseconds:.3f}", *(f"{x:.0f}" for x in tflops),
                    f"{ratio:.3f}", f"{costs.clock_hz * ratio / 1e9:.2f}",
                )
            )  # fmt: skip
    columns = ("head_dim", "mask", "seqlen", "kernel", "predicted [ms]", "measured [ms]")
    columns += ("predicted [TFLOPS]", "measured [TFLOPS]", "predicted / measured", "equal at [GHz]")
    console().print(table(columns, cells, numbers_from=4))
    if ratios:
        mean = geometric_mean(ratios)
        print(f"predicted / measured at {costs.clock_hz / 1e9:.3f} GHz: geometric mean {mean:.3f}, ", end="")
        print(f"from {min(ratios):.3f} to {max(ratios):.3f}, {len(ratios)} points")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    parser.add_argument("--clock", type=float, metavar="GHZ", help="what the GPU ran at")
    given = parser.parse_args()
    main(given.files, None if given.clock is None else given.clock * 1e9)
